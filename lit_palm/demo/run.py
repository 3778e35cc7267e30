"""Run a recipe from beginning to end: the same commands the README shows one by one, in one process.

    python -m lit_palm.demo run                        # real human ratings, under ten minutes on two cores
    python -m lit_palm.demo run --core                 # without the objectives of plugins
    python -m lit_palm.demo run --recipe addition      # a verifiable reward, no download
    python -m lit_palm.demo run --seed 2 --folder runs/demo-2 --fast

Each command is printed before it runs, so that any of them can be repeated by hand.

A file `plugins/*/configs/demo/NAME.yaml` adds the row NAME to the table: an objective of a package, from the same start
and measured in the same way, when its package is installed.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lit_palm.demo.files import write_json
from lit_palm.plugins import discover

__all__ = ["Recipe", "addition_recipe", "plugin_rows", "ratings_recipe", "run"]

CONFIGS = Path("configs/demo")
FOLDERS = {"ratings": "runs/demo", "addition": "runs/addition"}
"""Where each recipe writes unless told otherwise."""
PLUGIN_CONFIGS = "plugins/*/configs/demo/*.yaml"

Command = list[str]
Recipe = list[tuple[str, Command]]


def _lit(*arguments: str) -> Command:
    return ["lit-palm", *arguments]


def _demo(*arguments: str) -> Command:
    return ["python", "-m", "lit_palm.demo", *arguments]


def _sample(network: str, output: str, *more: str) -> Command:
    return _lit(
        "predict", "--config", f"{CONFIGS}/sample.yaml", f"--model.network={network}", *more,
        "--trainer.callbacks+=lit_palm.callbacks.PredictionWriter", f"--trainer.callbacks.path={output}",
    )  # fmt: skip


def plugin_rows(installed: bool = True) -> list[Path]:
    """Configurations of the demo that plugins bring, those whose objective is installed (or is not)."""
    names = {plugin.name for plugin in discover()}
    return [path for path in sorted(Path().glob(PLUGIN_CONFIGS)) if (_objective(path) in names) == installed]


def _objective(config: Path) -> str:
    """Name of the objective class in a configuration."""
    tree: Any = yaml.safe_load(config.read_text(encoding="utf-8"))
    path: str = tree["model"]["init_args"]["objective"]["class_path"]
    return path.rpartition(".")[2]


def ratings_recipe(plugins: Sequence[Path] = ()) -> Recipe:
    """The recipe on real human ratings: (stage, command) in order.

    Args:
        plugins: configurations of further policies, each named as its row in the table.
    """
    policies = ["ppo", *(path.stem for path in plugins)]

    def fit_and_test(stage: str) -> Recipe:
        config = f"{CONFIGS}/{stage}.yaml"
        return [
            (stage, _lit("fit", "--config", config)),
            (stage, _lit("test", "--config", config, f"--ckpt_path=runs/demo/{stage}/last.ckpt")),
        ]

    start, pool = "runs/demo/finetune/last.ckpt", "runs/demo/control/pool.jsonl"
    return [
        ("data", _demo("data")),
        ("data", _demo("judge")),
        *fit_and_test("pretrain"),
        *fit_and_test("finetune"),
        *fit_and_test("reward"),
        ("ppo", _lit("fit", "--config", f"{CONFIGS}/ppo.yaml")),
        *((path.stem, _lit("fit", "--config", str(path))) for path in plugins),
        ("control", _sample(start, pool, "--data.predict=runs/demo/data/prompts/train.jsonl")),
        ("control", _demo("control", "--samples", pool, "--output", "runs/demo/control/kept.jsonl")),
        ("control", _lit("fit", "--config", f"{CONFIGS}/control.yaml")),
        *(
            ("measure", _sample(f"runs/demo/{stage}/last.ckpt", f"runs/demo/samples/{name}.jsonl"))
            for name, stage in (("start", "finetune"), *zip(policies, policies, strict=True), ("control", "control"))
        ),
        (
            "measure",
            _demo(
                "report",
                "--samples", *(f"{n}=runs/demo/samples/{n}.jsonl" for n in ("start", *policies, "control")),
                "--metrics", *(f"{n}=runs/demo/{n}/metrics.json" for n in ("pretrain", "finetune", "reward")),
            ),
        ),
    ]  # fmt: skip


def addition_recipe() -> Recipe:
    """The recipe on one-digit addition: (stage, command) in order."""
    config = f"{CONFIGS}/addition-ppo.yaml"
    return [
        ("data", _demo("addition")),
        ("finetune", _lit("fit", "--config", f"{CONFIGS}/addition-finetune.yaml")),
        ("start", _lit("validate", "--config", config)),
        ("ppo", _lit("fit", "--config", config)),
        ("measure", _lit("validate", "--config", config, "--ckpt_path=runs/addition/ppo/last.ckpt")),
    ]


def run(recipe: str, seed: int = 0, folder: str | None = None, fast: bool = False, core: bool = False) -> int:
    """Run the commands of a recipe; returns the exit status of the first that fails, else 0.

    Args:
        recipe: "ratings" or "addition".
        seed: seed of every stage.
        folder: where everything is written, instead of runs/demo or runs/addition.
        fast: a few steps of everything: shows that it runs, not that it works.
        core: leave out what plugins bring.
    """
    from lit_palm import cli
    from lit_palm.demo import __main__ as demo

    default = FOLDERS[recipe]
    target = folder or default
    seconds: dict[str, float] = {}
    rows = [] if core or recipe != "ratings" else plugin_rows()
    for path in [] if core or recipe != "ratings" else plugin_rows(installed=False):
        print(f"without the row {path.stem}: its objective {_objective(path)} is not installed (make install-plugins)")
    commands = ratings_recipe(rows) if recipe == "ratings" else addition_recipe()
    for stage, command in commands:
        command = relocate(command, default, target)
        command += overrides(command, seed, fast)
        print(f"\n$ {shlex.join(command)}", flush=True)
        start = time.perf_counter()
        status = cli.main(command[1:]) if command[0] == "lit-palm" else demo.main(command[3:])
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start
        if status:
            print(f"\nstopped: the command above failed with status {status}", file=sys.stderr)
            return status
    total = sum(seconds.values())
    parts = ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items())
    print(f"\n{total:.0f} seconds in all: {parts}")
    added = sum(seconds.get(path.stem, 0.0) for path in rows)
    if rows:
        print(f"{total - added:.0f} of them without {', '.join(path.stem for path in rows)}")
    write_json(Path(target) / "seconds.json", {"total": total, "core": total - added, **seconds})
    print(f"Curves and samples: tensorboard --logdir {target}")
    return 0


def relocate(command: Command, default: str, target: str) -> Command:
    """The command with every path below `default`, its own and its YAML's, moved below `target`."""
    if default == target:
        return command
    moved = [argument.replace(default, target) for argument in command]
    for i, argument in enumerate(moved):
        if argument.endswith(".yaml"):
            source = Path(argument)
            copy = Path(target) / "configs" / source.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(source.read_text().replace(default, target).replace(f"name: {Path(default).name}", ""))
            moved[i] = str(copy)
    if command[:3] == ["python", "-m", "lit_palm.demo"]:
        moved += {
            "data": ["--output", f"{target}/data"],
            "judge": ["--data", f"{target}/data", "--output", f"{target}/judge.safetensors"],
            "report": ["--judge", f"{target}/judge.safetensors", "--output", f"{target}/report.json"],
            "addition": ["--output", f"{target}/data"],
        }.get(command[3], [])
    return moved


def overrides(command: Command, seed: int, fast: bool) -> Command:
    """Flags that set the seed, and that make a run a short one."""
    if command[0] != "lit-palm":
        return ["--seed", str(seed)] if seed and command[3] in ("control", "addition") else []
    extra: Command = []
    config: dict[str, Any] = {}
    for argument in command:
        if argument.endswith(".yaml"):
            config = yaml.safe_load(Path(argument).read_text(encoding="utf-8"))
    model = config["model"]
    if seed:
        extra += [f"--seed_everything={seed}", f"--data.seed={seed}"]
        if model["class_path"] == "LitPolicy":
            extra.append(f"--model.rollout.seed={seed}")
    if fast:
        samples = "rollout" in model["init_args"]
        if command[1] == "fit":
            extra += [f"--trainer.max_epochs={2 if samples else 1}", "--trainer.limit_train_batches=8"]
            extra += [
                "--trainer.max_steps=-1",
                "--trainer.check_val_every_n_epoch=1",
                "--trainer.val_check_interval=1.0",
            ]
            if samples and model["init_args"]["rollout"]["num_prompts"] > 128:
                extra.append("--model.rollout.num_prompts=64")
        extra += [f"--trainer.limit_{s}_batches=2" for s in ("val", "test")]
    return extra
