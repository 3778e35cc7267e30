"""DPO's implied reward against a reward model: both learn the same preferences, made from a reward that is known.

The reward of a text is a number for each of its letters and for each pair of neighbours. Which of two random texts is
preferred is drawn with the Bradley-Terry probability of their rewards, so that even the true reward ranks about one
pair in seven the other way round. Reward model and policy start from one fine-tuned network, see the same pairs in the
same order as often, and rank the same held-out pairs: the reward model by its score, the policy by
beta (log pi - log pi_ref), which is what `rewards/accuracies` counts.
"""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lit_palm_dpo import DPO

from lit_palm import (
    DemonstrationData,
    LitLanguageModel,
    LitPolicy,
    LitRewardModel,
    PaLMConfig,
    PreferenceData,
    RewardRanking,
)

LETTERS = "abcdefgh"
NUM_TRAIN, NUM_HELD_OUT = 400, 1000  # a standard error of 1.3 points each, less for the difference on the same pairs


class World:
    """A reward, and texts with preferences that follow it."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.letter = {a: self.random.gauss(0, 0.5) for a in LETTERS}
        self.neighbours = {a + b: self.random.gauss(0, 0.25) for a in LETTERS for b in LETTERS}

    def reward(self, text: str) -> float:
        return sum(self.letter[a] for a in text) + sum(self.neighbours[a + b] for a, b in pairwise(text))

    def text(self) -> str:
        return "".join(self.random.choice(LETTERS) for _ in range(self.random.randint(4, 8)))

    def prompt(self) -> str:
        return self.text()[:3] + ":"

    def pair(self) -> dict[str, str]:
        chosen, rejected = self.text(), self.text()
        if self.random.random() > 1 / (1 + math.exp(2 * (self.reward(rejected) - self.reward(chosen)))):
            chosen, rejected = rejected, chosen
        return {"prompt": self.prompt(), "chosen": chosen, "rejected": rejected}

    def write(self, folder: Path) -> float:
        """Write demonstrations, training pairs and held-out pairs; how often the true reward agrees with the latter."""
        demonstrations = [{"prompt": self.prompt(), "completion": self.text()} for _ in range(400)]
        train, held = [self.pair() for _ in range(NUM_TRAIN)], [self.pair() for _ in range(NUM_HELD_OUT)]
        for name, rows in (("demonstrations", demonstrations), ("train", train), ("held_out", held)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return sum(self.reward(p["chosen"]) > self.reward(p["rejected"]) for p in held) / len(held)


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)


def trainer(epochs: int) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, check_val_every_n_epoch=epochs, gradient_clip_val=1.0,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        num_sanity_val_steps=0,
    )  # fmt: skip


def accuracy(module: Any, folder: Path, name: str) -> float:
    """Share of held-out pairs that a module ranks as people did, after four passes over the training pairs."""
    data = PreferenceData(
        train=str(folder / "train.jsonl"),
        validation=str(folder / "held_out.jsonl"),
        batch_size=16,
        eval_batch_size=250,
    )
    run = trainer(4)
    run.fit(module, datamodule=data)
    return run.callback_metrics[name].item()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_implied_reward_ranks_held_out_pairs_as_well_as_a_reward_model(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    truth = World(seed).write(tmp_path)
    torch.manual_seed(seed)
    network = PaLMConfig(d_model=32, num_layers=2, num_heads=2, head_dim=16, max_length=32)
    run = trainer(2)
    demonstrations = DemonstrationData(train=str(tmp_path / "demonstrations.jsonl"), tokenizer="bytes", batch_size=16)
    run.fit(LitLanguageModel(network, optimizer=adamw), datamodule=demonstrations)
    start = str(tmp_path / "start.ckpt")
    run.save_checkpoint(start)

    torch.manual_seed(seed)
    scored = accuracy(LitRewardModel(start, RewardRanking(), optimizer=adamw), tmp_path, "val/accuracy")
    implied = accuracy(LitPolicy(start, DPO(beta=0.5), optimizer=adamw), tmp_path, "val/rewards/accuracies")
    assert scored > 0.7, "the reward model is no straw man"
    # two standard errors of the difference: both are judged on the same 1,000 pairs, on a fifth of which they disagree
    assert implied >= scored - 0.03
    assert implied < truth + 0.02, "better than the truth would be a leak"
