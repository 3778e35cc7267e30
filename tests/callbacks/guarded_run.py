"""Run by the tests of the guards as a program: one training on some processes, with guards, that something happens to.

    python -m tests.callbacks.guarded_run FOLDER '{"job": "policy", "devices": 2, "guards": {"Watchdog": {...}}}'

Each rank writes FOLDER/rank{N}.pid when training starts and appends a line to FOLDER/rank{N}.log at every hook named in
`mark`; a file FOLDER/hold makes a rank wait there, so that a test can act at a known place.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor

from lit_palm import callbacks
from lit_palm.types import Loss
from tests.support import (
    everything,
    language_model,
    policy,
    prompt_data,
    ranking_data,
    reward_model,
    text_data,
    trainer,
)


class Marks(Callback):
    """Says where each rank is."""

    def __init__(self, folder: Path, slow: float) -> None:
        self.folder, self.slow = folder, slow

    def _mark(self, rank: int, text: str) -> None:
        with open(self.folder / f"rank{rank}.log", "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        rank = trainer.global_rank
        (self.folder / f"rank{rank}.pid").write_text(str(os.getpid()))
        rollouts = getattr(pl_module, "rollouts", None)
        if rollouts is None:
            return
        original = rollouts.loader.collect

        def collect(number: int) -> Any:
            self._mark(rank, f"collection {number}")
            time.sleep(self.slow)
            return original(number)

        rollouts.loader.collect = collect

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._mark(trainer.global_rank, f"step {trainer.global_step}")
        time.sleep(self.slow)


class Sleeps(Callback):
    """Hangs on one rank, with all its threads alive."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            time.sleep(600)


class Shock(Callback):
    """Spoils the weights at given batches, as a bad update would: the loss rises and does not come back."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches

    @torch.no_grad()
    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready in self.batches:
            for weight in pl_module.networks.parameters():
                weight.mul_(4)


class Breaks(Callback):
    """Raises on one rank."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            raise ValueError("a row of the data is broken")


def spoil(module: Any, rank: int, numbers: list[int]) -> None:
    """A loss that is no number, on one rank."""
    original, count = module.objective.loss, iter(range(10**6))

    def loss(output: Any, batch: Any) -> Loss:
        found = original(output, batch)
        bad = module.trainer.training and next(count) in numbers and module.global_rank == rank
        return Loss(found.total * float("nan"), found.metrics) if bad else found

    module.objective.loss = loss


def whole(value: Any) -> Any:
    """With every DTensor gathered."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    return [whole(v) for v in value] if isinstance(value, list) else value


def main(folder: Path, settings: dict[str, Any]) -> int:
    job = settings.get("job", "language_model")
    rows = {"batch_size": 2, **settings.get("data", {})}
    modules: dict[str, Any] = {
        "language_model": lambda: (language_model(), text_data(folder, **rows)),
        "reward_model": lambda: (reward_model(calibrate="whiten"), ranking_data(folder, batch_size=2)),
        "policy": lambda: (policy(), prompt_data(folder)),
    }
    module, data = modules[job]()
    chosen: list[Any] = [getattr(callbacks, name)(**args) for name, args in settings.get("guards", {}).items()]
    if "shocks" in settings:
        chosen.append(Shock(*settings["shocks"]))
    if "sleeps" in settings:
        chosen.append(Sleeps(**settings["sleeps"]))
    if "spoils" in settings:  # [rank, numbers of micro-batches]
        spoil(module, *settings["spoils"])
    if "breaks" in settings:
        chosen.append(Breaks(**settings["breaks"]))
    chosen.append(Marks(folder, settings.get("slow", 0.0)))
    strategy: Any = settings.get("strategy", "ddp" if settings.get("devices", 1) > 1 else "auto")
    if strategy == "sharded":
        from lightning.pytorch.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    run = trainer(
        folder, callbacks=chosen, strategy=strategy, devices=settings.get("devices", 1), **settings.get("flags", {})
    )
    run.fit(module, datamodule=data, ckpt_path=settings.get("resume"))
    state = whole(everything(run))
    state["finite"] = module.finite.state_dict()
    if run.is_global_zero and "result" in settings:
        torch.save(state, folder / settings["result"])
    return int(getattr(run, "exit_status", 0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
