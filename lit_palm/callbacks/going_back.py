"""What a rank needs to go back: its own part of weights, optimiser, schedules and objective, in a file of its own.

Each rank keeps what it holds itself, whole or a shard, so writing and reading is local and needs no collective. Where a
run stands in its data is not in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_palm.models.weights import local

__all__ = ["load", "restore", "save", "take"]


def _kept(value: Any) -> Any:
    return local(value.detach()).cpu().clone() if isinstance(value, Tensor) else value


def _tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def take(trainer: Trainer) -> dict[str, Any]:
    """Copy, to the CPU, what a rank has to go back to."""
    module: Any = trainer.lightning_module
    return {
        "step": trainer.global_step,
        "tensors": {name: _kept(tensor) for name, tensor in _tensors(module)},
        "optimizers": [
            {
                "groups": [{k: _kept(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
                "state": [
                    {k: _kept(v) for k, v in optimizer.state.get(p, {}).items()}
                    for g in optimizer.param_groups
                    for p in g["params"]
                ],
            }
            for optimizer in trainer.optimizers
        ],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "objective": module.objective.state_dict(),
        "precision": trainer.precision_plugin.state_dict(),
        "followed": module.followed,
    }


@torch.no_grad()
def restore(trainer: Trainer, snapshot: dict[str, Any]) -> None:
    """Put everything back as it was; Lightning's count of steps too, so that schedules and `max_steps` agree."""
    module: Any = trainer.lightning_module
    for name, tensor in _tensors(module):
        local(tensor).copy_(snapshot["tensors"][name])
    for optimizer, kept in zip(trainer.optimizers, snapshot["optimizers"], strict=True):
        for group, values in zip(optimizer.param_groups, kept["groups"], strict=True):
            group.update({k: v.to(group[k].device) if isinstance(v, Tensor) else v for k, v in values.items()})
        weights = [p for g in optimizer.param_groups for p in g["params"]]
        for weight, values in zip(weights, kept["state"], strict=True):
            if not values:  # not stepped yet
                optimizer.state.pop(weight, None)
            for name, value in values.items():
                state = optimizer.state[weight]
                if isinstance(value, Tensor):
                    local(state[name]).copy_(value)
                else:
                    state[name] = value
    for config, state in zip(trainer.lr_scheduler_configs, snapshot["schedulers"], strict=True):
        config.scheduler.load_state_dict(state)
    module.objective.load_state_dict(snapshot["objective"])
    if snapshot["precision"]:
        trainer.precision_plugin.load_state_dict(snapshot["precision"])
    module.followed = snapshot["followed"]
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    steps.total.ready = steps.total.completed = snapshot["step"]


def save(snapshot: dict[str, Any], path: Path) -> None:
    """Write a snapshot; the file appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    torch.save(snapshot, temporary)
    os.replace(temporary, path)


def load(path: Path) -> dict[str, Any]:
    """Read a snapshot."""
    return torch.load(path, map_location="cpu", weights_only=True)
