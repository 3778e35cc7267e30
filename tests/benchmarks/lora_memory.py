"""Peak memory of PPO with LoRA on one trunk against PPO on whole networks, each in a process of its own.

    python -m tests.benchmarks.lora_memory FOLDER [checkpointing]

30M parameters, minibatches of 1,024 tokens, a learned reward model: four networks of which two are trained, or one with
three adapters. Prints, for each, the bytes that the process takes at most in a collection and an update, over what it
took before the networks were built.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lit_palm.callbacks import LastCheckpoint
from lit_palm.models.lora import LoRA
from lit_palm.models.palm import PaLMConfig
from lit_palm.modules import LitLanguageModel, LitPolicy, LitRewardModel
from lit_palm.objectives import PPO
from lit_palm.rollout.collector import RolloutConfig
from lit_palm.rollout.rewards import RewardModel
from lit_palm.rollout.sampling import Sampling
from tests.modules.strategies import forget_peak, resident
from tests.support import demonstration_data, ranking_data, trainer, write_jsonl

ROOT = Path(__file__).parents[2]
ROWS, PROMPT, COMPLETION = 8, 64, 64  # 1,024 tokens a minibatch
VOCABULARY = 4096
KINDS = ("full", "lora")


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3)


def prepare(folder: Path) -> None:
    """A language model, and two reward models on it: whole, and an adapter."""
    torch.manual_seed(0)
    one: dict[str, Any] = {"max_steps": 1, "limit_val_batches": 0}

    def fit(name: str, module: Any, data: Any) -> str:
        trainer(folder, callbacks=[LastCheckpoint(str(folder / name))], **one).fit(module, datamodule=data)
        return str(folder / name / "last.ckpt")

    config = PaLMConfig.preset("30m", vocab_size=VOCABULARY, max_length=256)
    start = fit("start", LitLanguageModel(config, optimizer=sgd), demonstration_data(folder, batch_size=1))
    for kind, lora in (("full", None), ("lora", LoRA())):
        module = LitRewardModel(start, optimizer=sgd, lora=lora)
        fit(f"reward-{kind}", module, ranking_data(folder, tokenizer=None, batch_size=1))


def measure(folder: Path, kind: str, checkpointing: bool) -> dict[str, float]:
    """Two minibatches of one collection; bytes by name."""
    from lit_palm.data import PromptData

    torch.manual_seed(0)
    torch.set_num_threads(1)
    prompts = write_jsonl(folder / f"prompts-{kind}.jsonl", [{"prompt": chr(97 + i) * PROMPT} for i in range(2 * ROWS)])
    module = LitPolicy(
        str(folder / "start" / "last.ckpt"),
        PPO(),
        rewards=[RewardModel(str(folder / f"reward-{kind}" / "last.ckpt"), batch_size=ROWS)],
        rollout=RolloutConfig(num_prompts=2 * ROWS, passes=1, minibatch_size=ROWS, batch_size=ROWS),
        sampling=Sampling(max_new_tokens=COMPLETION),
        overrides={"activation_checkpointing": checkpointing},
        lora=LoRA() if kind == "lora" else None,
    )
    data = PromptData(train=prompts, tokenizer=None, batch_size=ROWS)
    run = trainer(folder, max_epochs=1, limit_val_batches=0, gradient_clip_val=1.0)
    if kind == "lora":
        import peft  # noqa: F401  # its own imports are no memory of the run
    forget_peak()
    before = resident()
    run.fit(module, datamodule=data)
    assert run.global_step == 2
    return {"peak": float(resident("VmHWM") - before), "process": float(resident("VmHWM")), "before": float(before)}


def compare(folder: Path, checkpointing: bool = False) -> dict[str, dict[str, float]]:
    """Both kinds, each in a process of its own."""
    environment = {**os.environ, "LIT_PALM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    # memory that is freed is given back at once, so that what a process takes is what it holds
    environment |= {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
    found = {}
    for kind in ("prepare", *KINDS):
        command = [sys.executable, "-m", "tests.benchmarks.lora_memory", str(folder), kind, str(int(checkpointing))]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        if kind in KINDS:
            found[kind] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="lightning")
    place, kind, *rest = Path(sys.argv[1]), *sys.argv[2:], ""
    if kind == "prepare":
        prepare(place)
    elif kind in KINDS:
        print(json.dumps(measure(place, kind, rest[0] == "1")))
    else:
        place.mkdir(parents=True, exist_ok=True)
        found = compare(place, kind == "checkpointing")
        for name, values in found.items():
            print(name, {k: f"{v / 2**20:.0f} MiB" for k, v in values.items()})
        for key in ("peak", "process"):
            print(f"{key}: {found['lora'][key] / found['full'][key]:.3f} of full PPO's")
