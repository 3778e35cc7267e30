"""Run by test_lora_sharded.py as a program: PPO with LoRA on two processes, at once and in two sittings.

    python -m tests.lora.two_ranks FOLDER STRATEGY BASE REWARD

The strategy is one of `tests.modules.strategies`. Leaves FOLDER/whole and FOLDER/resumed with checkpoints, and what
`Trajectory` saw in FOLDER/losses.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lit_palm.callbacks import LastCheckpoint
from lit_palm.models.lora import LoRA
from lit_palm.modules.sharding import Sharding
from lit_palm.rollout.rewards import PythonReward, RewardModel
from tests.modules.strategies import PROCESSES, ROW_GROUPS, Trajectory, strategy
from tests.support import lower_case, policy, prompt_data, trainer

STEPS, MIDDLE = 7, 3  # a collection is four steps


def train(folder: Path, name: str, base: str, reward: str, place: str, path: Path | None, gather: Any) -> Trajectory:
    module = policy(
        network=base,
        lora=LoRA(rank=4, alpha=8.0, dora=True),
        rewards=[RewardModel(reward), PythonReward(lower_case)],
        sharding=Sharding(gather=gather),
    )
    seen = Trajectory()
    run = trainer(
        folder,
        callbacks=[seen, LastCheckpoint(str(folder / place), every_n_steps=1, keep_last=100)],
        max_epochs=-1,
        max_steps=STEPS,
        strategy=strategy(name),
        devices=PROCESSES[name],
        gradient_clip_val=0.3,
    )
    data = prompt_data(folder, tokenizer=None, batch_size=4 // ROW_GROUPS[name])
    run.fit(module, datamodule=data, ckpt_path=None if path is None else str(path))
    return seen


def main(folder: Path, name: str, base: str, reward: str) -> None:
    seen = train(folder, name, base, reward, "whole", None, "auto")
    if not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
        (folder / "losses.json").write_text(json.dumps([seen.losses, seen.norms]))
    middle = folder / "whole" / f"step-{MIDDLE:08d}.ckpt"
    train(folder, name, base, reward, "resumed", middle, "layers" if name == "sharded" else "auto")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
