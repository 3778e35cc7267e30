"""Peak memory of PPO with LoRA on one trunk against PPO on whole networks.

Minibatches of 1,024 tokens, a learned reward model: four networks of which two are trained, or one with three adapters.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lit_palm.callbacks import LastCheckpoint
from lit_palm.data import DemonstrationData, PreferenceData, PromptData
from lit_palm.models.lora import LoRA
from lit_palm.models.palm import PaLMConfig
from lit_palm.modules import LitLanguageModel, LitPolicy, LitRewardModel
from lit_palm.objectives import PPO
from lit_palm.rollout.collector import RolloutConfig
from lit_palm.rollout.rewards import RewardModel
from lit_palm.rollout.sampling import Sampling
from tests.benchmarks.memory import Peak
from tests.benchmarks.ours.running import trainer, written
from tests.benchmarks.worker import Work

ROOT = Path(__file__).parents[3]
ROWS, PROMPT, COMPLETION = 8, 64, 64  # 1,024 tokens a minibatch
VOCABULARY = 4096


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3)


def prepare(folder: str, kind: str, preset: str) -> None:
    """A language model, and a reward model on it: whole (`full`), or an adapter (`lora`)."""
    torch.manual_seed(0)

    def fit(name: str, module: Any, data: Any) -> str:
        keep = LastCheckpoint(f"{folder}/{name}")
        trainer(callbacks=[keep], max_steps=1, enable_checkpointing=True).fit(module, datamodule=data)
        return f"{folder}/{name}/last.ckpt"

    rows = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "a bird", "completion": " flew"}]
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " slept"} for row in rows]
    config = PaLMConfig.preset(preset, vocab_size=VOCABULARY, max_length=256)
    demonstrations = DemonstrationData(train=written(rows), tokenizer="bytes", batch_size=1)
    start = fit("start", LitLanguageModel(config, optimizer=sgd), demonstrations)
    module = LitRewardModel(start, optimizer=sgd, lora=LoRA() if kind == "lora" else None)
    fit("reward", module, PreferenceData(train=written(pairs), tokenizer=None, batch_size=1))


def policy_memory(kind: str, checkpointing: bool = False, preset: str = "30m") -> Work:
    """Peak bytes of a collection and its two minibatches, above what the process took before networks were built.

    Args:
        kind: `full`, or `lora`.
        checkpointing: blocks are computed again in the backward pass.
        preset: the network's.
    """
    folder = tempfile.mkdtemp()
    # what training the checkpoints leaves in memory is none of the run's
    program = f"from {__name__} import prepare; prepare({folder!r}, {kind!r}, {preset!r})"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    def run() -> dict[str, Any]:
        torch.manual_seed(0)
        module = LitPolicy(
            f"{folder}/start/last.ckpt",
            PPO(),
            rewards=[RewardModel(f"{folder}/reward/last.ckpt", batch_size=ROWS)],
            rollout=RolloutConfig(num_prompts=2 * ROWS, passes=1, minibatch_size=ROWS, batch_size=ROWS),
            sampling=Sampling(max_new_tokens=COMPLETION),
            overrides={"activation_checkpointing": checkpointing},
            lora=LoRA() if kind == "lora" else None,
        )
        prompts = written([{"prompt": chr(97 + i) * PROMPT} for i in range(2 * ROWS)])
        fit = trainer(max_epochs=1, gradient_clip_val=1.0)
        if kind == "lora":
            import peft  # noqa: F401  # its own imports are no memory of the run
        peak = Peak()
        fit.fit(module, datamodule=PromptData(train=prompts, tokenizer=None, batch_size=ROWS))
        assert fit.global_step == 2
        return {"cost": peak.bytes()}

    return run
