"""Peak memory of a real `fit` in a process of its own, beside what a plan predicts for it.

    python -m tests.plan.measuring [NAME ...]      # a table of all configurations, or of those named

Memory is the process's resident set at its highest during two optimiser steps, above what it was right before `fit`.
Two settings of glibc make that a matter of what is alive: blocks of 64 kB and more are mapped and unmapped one by one
instead of being kept on a heap that only grows, and there is one such heap.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}

WIDE = "--model.network={class_path: PaLMConfig, init_args: {d_model: %d, num_layers: %d, num_heads: 8, head_dim: 64, vocab_size: %d, max_length: %d, activation_checkpointing: %s}}"  # noqa: E501


SIZES = {"small": (256, 4, 16, 256), "large": (512, 8, 16, 512), "vocab": (256, 4, 8, 256)}


@dataclass(frozen=True)
class Measured:
    """Bytes: predicted and measured peak above the process before fit."""

    name: str
    predicted: float
    measured: float
    by_kind: dict[str, float]

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def network(width: int, layers: int, vocab: int, length: int, recompute: bool) -> str:
    return WIDE % (width, layers, vocab, length, str(recompute).lower())


def arguments(name: str, folder: Path) -> list[str]:
    """The arguments of `lit-palm fit` for a configuration: kind-size[-checkpointed][-bf16]."""
    kind, size, *rest = name.split("-")
    width, layers, rows, length = SIZES[size]
    vocab = 32000 if size == "vocab" else 1000
    net = network(width, layers, vocab, length, "checkpointed" in rest)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    common = [net, "--trainer.accelerator=cpu", "--trainer.devices=1", *(f"--trainer.{name}=false" for name in quiet),
              "--trainer.max_steps=3", "--trainer.limit_val_batches=0", "--trainer.gradient_clip_val=1.0"]  # fmt: skip
    if "bf16" in rest:
        common.append("--trainer.precision=bf16-mixed")
    if "accumulated" in rest:
        common.append("--trainer.accumulate_grad_batches=2")
    return [*common, *KINDS[kind](folder, rows, length)]


def _text(folder: Path, rows: int, length: int) -> list[str]:
    words = [{"text": "abcdefgh " * (length // 9)} for _ in range(8 * rows)]
    return ["--model=LitLanguageModel", "--data=TextData", f"--data.train={write(folder, words)}",
            "--data.tokenizer=bytes", f"--data.sequence_length={length}", f"--data.batch_size={rows}"]  # fmt: skip


def _pairs(folder: Path, rows: int, length: int) -> str:
    def answer(letter: str) -> str:
        return letter * (length - 8)

    # prompts so short that sharing them between the answers does not pay
    answers = {"chosen": answer("a"), "rejected": answer("b")}
    return write(folder, [{"prompt": f"{i % 10}", **answers} for i in range(4 * rows)])


def _preferences(folder: Path, rows: int, length: int) -> list[str]:
    return ["--data=PreferenceData", f"--data.train={_pairs(folder, rows, length)}", "--data.tokenizer=bytes",
            f"--data.batch_size={rows // 2}", f"--data.max_length={length}"]  # fmt: skip


def _reward(folder: Path, rows: int, length: int) -> list[str]:
    return ["--model=LitRewardModel", "--model.calibrate=none", *_preferences(folder, rows, length)]


def _dpo(folder: Path, rows: int, length: int) -> list[str]:
    return ["--model=LitPolicy", "--model.objective=DPO", *_preferences(folder, rows, length)]


def _ppo(folder: Path, rows: int, length: int) -> list[str]:
    prompts = write(folder, [{"prompt": "x" * (length // 2 - 8)} for _ in range(4 * rows)])
    return ["--model=LitPolicy", "--model.rewards+=PythonReward", "--model.rewards.function=tests.plan.measuring.worth",
            f"--model.rollout.num_prompts={rows}", f"--model.rollout.minibatch_size={rows}", "--model.rollout.passes=1",
            f"--model.rollout.batch_size={rows}", f"--model.sampling.max_new_tokens={length // 2}",
            "--data=PromptData", f"--data.train={prompts}", "--data.tokenizer=bytes",
            f"--data.max_prompt_length={length // 2}"]  # fmt: skip


KINDS = {"lm": _text, "reward": _reward, "dpo": _dpo, "ppo": _ppo}


def worth(completions: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(text)) for text in completions]


def write(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def measure(name: str) -> Measured:
    """Run a configuration in a process of its own."""
    env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.plan.measuring", "--here", name]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


# ---------------------------------------------------------------------------------------------- in that process


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_here(name: str) -> Measured:
    import ctypes

    from lit_palm.cli import build_cli, parse_fit
    from lit_palm.plan.planning import passes_of
    from lit_palm.plan.reading import read_job
    from lit_palm.plan.sizes import Wishes
    from lit_palm.process import prepare_process

    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIT_PALM_CACHE"] = folder
        argv = arguments(name, Path(folder))
        config, module = parse_fit(argv)
        job = read_job(module, config, Wishes(kernels="host"))
        passes = passes_of(job)
        worst = max(passes.values(), key=lambda ledger: ledger.peak)
        del module, config
        sys.argv[1:] = ["fit", *argv]
        found: dict[str, int] = {}

        class CLI(build_cli()):  # type: ignore[misc]
            def before_fit(self) -> None:
                warm_up()
                gc.collect()
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                found["before"] = status("VmRSS")
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

            def after_fit(self) -> None:
                found["peak"] = status("VmHWM")

        from lit_palm import plugins

        plugins.load_named(sys.argv[1:])
        CLI()
    return Measured(name, worst.peak, found["peak"] - found["before"], worst.at_peak)


def warm_up() -> None:
    """What the libraries allocate once for their own use, and code that is paged in at its first run."""
    import torch

    from lit_palm.models.logprobs import TokenLogProbs
    from lit_palm.models.palm import PaLMConfig

    net = PaLMConfig(vocab_size=64, d_model=64, num_layers=1, num_heads=2, head_dim=32, max_length=32).build()
    optimizer = torch.optim.AdamW(net.parameters())
    tokens = torch.zeros(2, 16, dtype=torch.long)
    net(tokens, head=TokenLogProbs(tokens))["logps"].sum().backward()
    optimizer.step()


NAMES = [f"{kind}-large{end}" for kind in KINDS for end in ("", "-checkpointed")]


def main(argv: list[str]) -> None:
    if argv[:1] == ["--here"]:
        found = measure_here(argv[1])
        print(json.dumps(vars(found)))
        return
    print(f"{'configuration':28}{'predicted MB':>14}{'measured MB':>14}{'ratio':>8}")
    for name in argv or NAMES:
        m = measure(name)
        kinds = ", ".join(f"{k} {v / 1e6:.0f}" for k, v in m.by_kind.items())
        print(f"{name:28}{m.predicted / 1e6:14.1f}{m.measured / 1e6:14.1f}{m.ratio:8.3f}   {kinds}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
