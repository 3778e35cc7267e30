"""Exact resume under Lightning: which Trainer flags make it impossible, and one correction of its loop state.

Everything that shapes a run is either in Lightning's own checkpoint (weights, optimiser, schedule, loop counters), in
the data module's state (data position, the collection under way) or in the objective's. All other randomness comes
from counters.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["check_trainer", "repair_epoch_end"]


def check_trainer(trainer: Trainer) -> None:
    """Refuse flags that would silently change what is trained.

    Raises:
        ValueError: naming the flag and the way out.
    """
    if len(trainer.optimizers) > 1:
        raise ValueError("lit_palm modules use one optimiser with parameter groups")


def repair_epoch_end(checkpoint: dict[str, Any]) -> None:
    """Let a checkpoint that was saved at the end of an epoch resume at the start of the next one.

    Such a checkpoint is written after the epoch's last batch was processed but before the epoch was counted. Resumed
    with `max_steps`, Lightning would run a further epoch of one batch, so that a collection straddles two epochs.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if not loop:
        return
    current, total = loop["epoch_progress"]["current"], loop["epoch_progress"]["total"]
    if not current["processed"] == current["ready"] == current["completed"] + 1:
        return
    current["completed"] += 1
    total["completed"] += 1
    for key in ("epoch_loop.batch_progress", "epoch_loop.scheduler_progress"):
        progress = loop[key]["current"]
        for field in progress:
            progress[field] = 0
    loop["epoch_loop.batch_progress"]["is_last_batch"] = False
