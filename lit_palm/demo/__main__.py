"""The verbs of the demo: `python -m lit_palm.demo run|data|judge|control|report|addition`, each with --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

RUNS = Path("runs")
DATA = RUNS / "demo" / "data"
JUDGE = RUNS / "demo" / "judge.safetensors"


def run_data(args: argparse.Namespace) -> None:
    """Fetch the ratings and write the files of every stage."""
    from lit_palm.demo.ratings import SHA256, Snippet, fetch, read_snippets
    from lit_palm.demo.splits import SplitArguments, write_data
    from lit_palm.folders import cache_folder

    def read() -> list[Snippet]:
        cache = args.cache or cache_folder() / "demo"
        print(f"human ratings of Hutto & Gilbert (2014): fetched once (2.5 MB) into {cache}", flush=True)
        return read_snippets(fetch(args.cache))

    arguments = SplitArguments(seed=args.seed, train_rounds=args.train_rounds)
    manifest, written = write_data(args.output, read, arguments, origin=SHA256)
    print(f"{args.output}: {'written' if written else 'already there, unchanged'}")
    for name, file in manifest["files"].items():
        print(f"  {name:<34} {file['rows']:>6} rows")


def run_judge(args: argparse.Namespace) -> None:
    """Fit the judge on its own ratings; measure it and VADER on held-out pairs."""
    from lit_palm.demo.judge import fit_judge

    figures, fitted = fit_judge(args.data, args.output)
    print(f"{args.output}: {'fitted' if fitted else 'already there, unchanged'}")
    print(f"  {figures['num_snippets']} rated snippets, {figures['num_terms']} terms, alpha {figures['alpha']:g}")
    print(f"  accuracy on {figures['num_pairs']} held-out pairs: judge {figures['judge']:.3f}, "
          f"VADER {figures['vader']:.3f}, chance {figures['chance']:.3f}")  # fmt: skip


def run_control(args: argparse.Namespace) -> None:
    """Keep one ended completion of each prompt at random."""
    from lit_palm.demo.control import write_control

    print(f"{args.output}: {write_control(args.samples, args.output, args.seed)} completions kept")


def run_report(args: argparse.Namespace) -> int:
    """Print the table and write it as JSON."""
    from lit_palm.demo.report import write_report
    from lit_palm.demo.table import render

    report = write_report(dict(args.samples), dict(args.metrics), args.judge, args.output)
    print(render(report))
    print(f"Written to {args.output}")
    return 1 if args.strict and not report["passed"] else 0


def run_addition(args: argparse.Namespace) -> None:
    """Write the data of one-digit addition."""
    from lit_palm.demo.addition import write_addition

    for name, rows in write_addition(args.output, args.copies, args.correct, args.slip, args.seed).items():
        print(f"  {args.output / name}: {rows} rows")


def run_recipe(args: argparse.Namespace) -> int:
    """Run a recipe from beginning to end, printing each command."""
    from lit_palm.demo.run import run

    return run(args.recipe, args.seed, args.folder, args.fast, args.core)


def named_path(text: str) -> tuple[str, Path]:
    """NAME=FILE as a pair."""
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text!r}")
    return name, Path(path)


def parser() -> argparse.ArgumentParser:
    """All verbs with their arguments."""
    top = argparse.ArgumentParser(prog="python -m lit_palm.demo", description="Data and measurements of the demo.")
    verbs = top.add_subparsers(dest="verb", required=True)

    whole = verbs.add_parser("run", help=run_recipe.__doc__, description=run_recipe.__doc__)
    whole.add_argument("--recipe", choices=("ratings", "addition"), default="ratings", help="(%(default)s)")
    whole.add_argument("--seed", type=int, default=0, help="of every stage (%(default)s)")
    whole.add_argument("--folder", help="where to write, instead of runs/demo or runs/addition")
    whole.add_argument("--fast", action="store_true", help="a few steps of everything: that it runs, not that it works")
    whole.add_argument("--core", action="store_true", help="without the objectives that plugins bring")
    whole.set_defaults(run=run_recipe)

    data = verbs.add_parser("data", help=run_data.__doc__, description=run_data.__doc__)
    data.add_argument("--output", type=Path, default=DATA, help="folder to write to (%(default)s)")
    data.add_argument("--cache", type=Path, help="for the download ($LIT_PALM_CACHE/demo or ~/.cache/lit_palm/demo)")
    data.add_argument("--seed", type=int, default=0, help="of splits and pairs (%(default)s)")
    data.add_argument("--train-rounds", type=int, default=4, help="training pairs of each snippet (%(default)s)")
    data.set_defaults(run=run_data)

    judge = verbs.add_parser("judge", help=run_judge.__doc__, description=run_judge.__doc__)
    judge.add_argument("--data", type=Path, default=DATA, help="what `data` wrote (%(default)s)")
    judge.add_argument("--output", type=Path, default=JUDGE, help="the judge; figures go beside it (%(default)s)")
    judge.set_defaults(run=run_judge)

    control = verbs.add_parser("control", help=run_control.__doc__, description=run_control.__doc__)
    control.add_argument("--samples", type=Path, required=True, help="jsonl with prompt, completion, ended")
    control.add_argument("--output", type=Path, required=True, help="jsonl with prompt, completion")
    control.add_argument("--seed", type=int, default=0, help="of the choice (%(default)s)")
    control.set_defaults(run=run_control)

    report = verbs.add_parser("report", help=run_report.__doc__, description=run_report.__doc__)
    report.add_argument("--samples", type=named_path, nargs="+", required=True, metavar="NAME=FILE",
                        help="completions: start, control, and policies under any other name")  # fmt: skip
    report.add_argument("--metrics", type=named_path, nargs="*", default=[], metavar="STAGE=FILE",
                        help="JSON of what the stages pretrain, finetune and reward measured")  # fmt: skip
    report.add_argument("--judge", type=Path, default=JUDGE, help="what `judge` wrote (%(default)s)")
    report.add_argument("--output", type=Path, default=RUNS / "demo" / "report.json", help="JSON file (%(default)s)")
    report.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    report.set_defaults(run=run_report)

    addition = verbs.add_parser("addition", help=run_addition.__doc__, description=run_addition.__doc__)
    addition.add_argument("--output", type=Path, default=RUNS / "addition" / "data", help="folder (%(default)s)")
    addition.add_argument("--copies", type=int, default=20, help="examples of each of the 100 sums (%(default)s)")
    addition.add_argument("--correct", type=float, default=0.3, help="share of examples that are right (%(default)s)")
    addition.add_argument("--slip", type=float, default=0.4, help="share that is one too many (%(default)s)")
    addition.add_argument("--seed", type=int, default=0, help="of which are right (%(default)s)")
    addition.set_defaults(run=run_addition)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; mistakes of the user and of the machine are one message on stderr and exit code 1."""
    from lit_palm.process import prepare_process

    args = parser().parse_args(argv)
    prepare_process()
    try:
        return args.run(args) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
