"""Speed and memory beside the peers, in one run, as ratios: seconds on one machine say nothing about another.

    make bench                                        # everything, with the peers' environment built first
    make bench QUICK=1                                # smaller sizes and fewer repeats: under 20 minutes on two cores
    python -m tests.benchmarks --list                 # what there is
    python -m tests.benchmarks --only 'generation*'   # some of it
    python -m tests.benchmarks --short                # tiny networks, to see that everything runs

Ours and a peer's side run in processes of their own, each in its environment, with the same threads, sizes and random
inputs. After a warm-up they run in turn, again and again; a figure is the median of the ratios of neighbouring runs,
beside the smallest and the largest of them. A peer that is not installed is left out and named. Nothing fails on a
time: the targets stand beside what was measured.

Writes a table to the terminal, and into `--output`: bench.json (the machine, every run), bench.md, bench.png (curves).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import machine, report
from tests.benchmarks.job import Curve, Job, Side
from tests.benchmarks.jobs import alignment, generation, scaling, training
from tests.benchmarks.jobs.sizes import Mode, pick
from tests.benchmarks.measuring import Crew, Result, measure

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"


def jobs_of(mode: Mode) -> list[Job]:
    """The table, in its order."""
    return [*training.jobs(mode), *generation.jobs(mode), *alignment.jobs(mode)]


def peaks(mode: Mode, crew: Crew) -> Result:
    """The machine's own measurement."""
    options = {"sizes": pick(mode, [1024, 2048], [1024, 2048], [64]), "num_bytes": pick(mode, 2**28, 2**28, 2**16)}
    return measure(Job("machine", "", [Side("ours", "machine:measured", options)], repeats=1), crew)


def peer_versions(python: str) -> dict[str, str]:
    """What is installed beside the peers."""
    program = "import json; from tests.benchmarks.machine import versions; print(json.dumps(versions()))"
    done = subprocess.run([python, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def draw(figures: Path, picture: Path, pythons: list[str]) -> str:
    """Draw the curves with whichever interpreter has matplotlib; what to say about it."""
    for python in pythons:
        command = [python, "-m", "tests.benchmarks.picture", str(figures), str(picture)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return str(picture)
        if "No module named 'matplotlib'" not in done.stderr:
            return f"no picture: {done.stderr.strip().splitlines()[-1]}"
    return "no picture: matplotlib is in neither environment"


class Progress:
    """What runs now, on a terminal's last line."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self.shown:
            print(f"\r\033[K{text[:110]}", end="", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", const="quick", dest="mode", help="under 20 minutes on two cores")
    size.add_argument("--short", action="store_const", const="short", dest="mode", help="tiny networks")
    parser.add_argument("--list", action="store_true", help="name the jobs and curves, measure nothing")
    parser.add_argument("--only", action="append", help="jobs and curves by name or pattern (may be repeated)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default all)")
    parser.add_argument("--repeats", type=int, help="rounds of every job")
    parser.add_argument("--peers", default=str(PEERS), help="the interpreter of the peers' environment; '' for none")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the figures")
    parser.set_defaults(mode="full")
    return parser.parse_args()


def chosen(names: list[str] | None, found: list[Any]) -> list[Any]:
    """Those whose names match."""
    return [one for one in found if not names or any(fnmatch.fnmatch(one.name, name) for name in names)]


def main() -> None:
    """Measure, print the table, write the figures."""
    args, begun = parse(), time.perf_counter()
    jobs: list[Job] = chosen(args.only, jobs_of(args.mode))
    if args.mode == "quick" and not args.only and not args.list and not machine.instructions()["bf16"]:
        # a peer's step in bfloat16 takes minutes here, and what it shows is the peer's lack of kernels
        slow = [job for job in jobs if "bf16" in job.name or "bfloat16" in job.name]
        jobs = [job for job in jobs if job not in slow]
        print(f"left out for want of bfloat16 instructions (--only runs them): {', '.join(job.name for job in slow)}")
    curves: list[Curve] = chosen(args.only, scaling.curves(args.mode))
    if not jobs and not curves:
        sys.exit(f"no job or curve matches {' or '.join(args.only)}: --list names them")
    if args.list:
        print("\n".join([*(f"{job.name:24} {job.title}" for job in jobs), *(f"{c.name:24} curve" for c in curves)]))
        return
    pythons = {"ours": sys.executable}
    if args.peers and Path(args.peers).exists():
        pythons["peers"] = args.peers
    else:
        print("the peers are left out: `make bench` builds their environment, --peers names another", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = machine.facts(args.threads)
    figures: dict[str, Any] = {"mode": args.mode, "machine": about, "jobs": [], "curves": []}
    results: list[Result] = []
    told = Progress()

    def keep() -> None:
        figures["seconds_in_all"] = round(time.perf_counter() - begun, 1)
        (args.output / "bench.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        (args.output / "bench.md").write_text(report.markdown(results, about), encoding="utf-8")

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        crew = Crew(pythons, args.threads, Path(scratch))
        try:
            about["measured"] = peaks(args.mode, crew).facts.get("ours", {})
            if "peers" in pythons:
                about["peer_versions"] = peer_versions(pythons["peers"])
            print(report.table([], about["instructions"]), flush=True)
            for job in jobs:
                job.repeats = args.repeats or job.repeats
                result = measure(job, crew, lambda text, job=job: told(f"{job.name}: {text}"))
                results.append(result)
                figures["jobs"].append(report.job_to_json(result, about["instructions"]))
                told("")
                print(report.table([result], about["instructions"], heading=False), flush=True)
                for name, why in result.failed.items():
                    print(f"  {job.name}, {name} failed: {why}", flush=True)
                keep()
            for curve in curves:
                made = [measure(p.job, crew, lambda text, p=p: told(f"{p.job.name}: {text}")) for p in curve.points]
                figures["curves"].append(report.curve_to_json(curve, made))
                told("")
                print(f"curve {curve.name}: {sum(result.seconds for result in made):.0f} s", flush=True)
                keep()
        finally:
            crew.close()
    if args.mode == "short":
        print("tiny networks: this shows that everything runs, and nothing about speed")
    missing = {f"{name}: {why}" for result in results for name, why in result.left_out.items()}
    if missing:
        print("left out: " + "; ".join(sorted(missing)))
    print(f"{args.output / 'bench.json'}, {args.output / 'bench.md'} in {time.perf_counter() - begun:.0f} s")
    if curves:
        print(draw(args.output / "bench.json", args.output / "bench.png", list(pythons.values())))


if __name__ == "__main__":
    main()
