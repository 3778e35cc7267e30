"""Whole PPO iterations: a collection and its passes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_palm import PPO, LitPolicy, LitRewardModel, PreferenceData, PromptData, RewardModel, RolloutConfig, Sampling
from lit_palm.models.lora import LoRA
from tests.benchmarks.inputs import Size, text
from tests.benchmarks.ours.alignment import adamw
from tests.benchmarks.ours.running import config, trainer, written
from tests.benchmarks.stepping import Steps
from tests.benchmarks.worker import Work


class PauseCollections(Callback):
    """Waits after each collection has been learned from; one is an epoch."""

    def __init__(self, pause: Callable[[], None]) -> None:
        self.pause = pause
        self.phases: dict[str, float] = {}
        self.step = self.steps = 0
        """Optimiser steps so far, and those of the last collection."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = trainer.callback_metrics
        self.phases = {name: float(value) for name, value in metrics.items() if name.startswith("time/")}
        self.step, self.steps = trainer.global_step, trainer.global_step - self.step
        self.pause()


def reward_model(size: Size) -> str:
    """The checkpoint of a reward model, after one step."""
    rows = [{"prompt": text(i, 4), "chosen": text(i + 1, 4), "rejected": text(i + 2, 4)} for i in range(2)]
    module = LitRewardModel(config(size), optimizer=adamw, calibrate="none")
    fit = trainer(max_steps=1)
    fit.fit(module, datamodule=PreferenceData(train=written(rows), batch_size=2, tokenizer="bytes"))
    path = f"{tempfile.mkdtemp()}/reward.ckpt"
    fit.save_checkpoint(path)
    return path


def ppo(
    size: dict[str, int],
    prompts: int,
    prompt: int,
    new: int,
    passes: int,
    minibatch: int,
    rank: int = 0,
    precision: str = "32-true",
) -> Work:
    """An iteration with a learned reward of the policy's size, a reference, and a value network.

    Args:
        size: of all four networks.
        prompts: of a collection.
        prompt: ids of each, a BOS among them.
        new: ids of a completion.
        passes: over the collection.
        minibatch: rows of an optimiser step.
        rank: of LoRA on the layers that hold attention's projections; 0: all weights are trained.
        precision: of the Trainer.
    """
    lora = LoRA(rank=rank, alpha=rank, targets=["attn_ffn_in", "attn_out"]) if rank else None
    hooks: list[PauseCollections] = []

    def loop(pause: Callable[[], None]) -> None:
        torch.manual_seed(0)
        shape = Size(**size)
        hooks.append(PauseCollections(pause))
        module = LitPolicy(
            config(shape),
            objective=PPO(),
            rewards=[RewardModel(reward_model(shape))],
            rollout=RolloutConfig(prompts, passes=passes, minibatch_size=minibatch),
            sampling=Sampling(max_new_tokens=new, min_new_tokens=new),
            optimizer=adamw,
            lora=lora,
        )
        source = written([{"prompt": text(i, prompt - 1)} for i in range(4 * prompts)])
        fit = trainer(precision, hooks, gradient_clip_val=1.0)
        fit.fit(module, datamodule=PromptData(train=source, tokenizer="bytes"))

    steps = Steps(loop)
    steps()  # the first sets up, and is the warm-up

    def run() -> dict[str, Any]:
        steps()
        return {"completions": prompts, "steps": hooks[0].steps, **hooks[0].phases}

    run.close = steps.close  # type: ignore[attr-defined]
    return run
