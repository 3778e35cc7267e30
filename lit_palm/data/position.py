"""Where a run stands in its training data, read from Lightning's loop: what a checkpoint must say to go on exactly.

Lightning counts an epoch as processed whenever its loop is left: at the epoch's end, and also in its middle when
`max_steps` is reached or training is told to stop. Only the first is an end of the data. Batches whose gradients wait
for the rest of an accumulation window are not in the weights yet, so a run that goes on must read them again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch import Trainer

__all__ = ["Position", "position"]


class Position(NamedTuple):
    """Where to go on."""

    epoch: int
    """Epochs that are over."""
    batch: int
    """Batches of the epoch under way that are in the weights."""
    begun: bool
    """The epoch under way has begun: the hooks of its start have run."""
    over: bool
    """Its data is used up, but it is not counted yet: validation and the hooks of its end are still to come."""


def position(trainer: Trainer) -> Position | None:
    """Where a run stands; None before its first epoch."""
    loop: Any = trainer.fit_loop  # its counters are typed as their common base class
    epoch, progress = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    if not epoch.ready:
        return None
    if epoch.started < epoch.ready:  # the batches are still those of the epoch before
        return Position(epoch.processed, 0, False, False)
    current = progress.current
    over = current.ready == current.processed > 0 and (
        progress.is_last_batch or current.ready == trainer.num_training_batches
    )
    counted = epoch.processed == epoch.ready
    if over and counted:
        return Position(epoch.processed, 0, False, False)
    waiting = 0 if over else current.processed % trainer.accumulate_grad_batches
    return Position(epoch.processed - counted, current.processed - waiting, True, over)
