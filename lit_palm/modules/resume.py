"""Exact resume under Lightning, and the Trainer flags that lit_palm cannot honour.

Everything that shapes a run is either in Lightning's own checkpoint (weights, optimiser, schedule, loop counters), in
the data module's state (data position, the collection under way) or in the objective's. All other randomness comes
from counters. Left to itself Lightning restores its counters as they stood inside the hook that saved, which loses or
repeats work in several cases; `settle` writes them as they must be to go on.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer

from lit_palm.data.position import position

__all__ = ["align", "check_trainer", "settle"]


def check_trainer(trainer: Trainer, samples: bool) -> None:
    """Refuse flags that would silently change what is trained.

    Args:
        trainer: about to fit.
        samples: the training data are rollouts.

    Raises:
        ValueError: naming the flag and the way out.
    """
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: use at least 1")
    if not samples:
        return
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise ValueError(
            "trainer.overfit_batches repeats batches of a data set, and rollouts are sampled anew each time: leave it "
            "out, and set data.limit to train on few prompts"
        )
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        raise ValueError(
            "trainer.reload_dataloaders_every_n_epochs would begin again with the first collection: leave it out, "
            "every epoch is a new collection anyway"
        )


def settle(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Rewrite the loop counters of a checkpoint about to be saved, so that a run resumed from it goes on exactly.

    Three states remain of Lightning's many: at the start of an epoch; after a batch in the middle of one; and after an
    epoch's last batch, with its end still to come. A validation that is due after the batch is run when resuming,
    unless it was before saving: it calibrates reward models, and callbacks read it.
    """
    where = position(trainer)
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if where is None or not loop:
        return
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    epochs, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    earlier = epochs["total"]["processed"] - epochs["current"]["processed"]
    _set(epochs["current"], where.epoch + where.begun, where.epoch)
    _set(epochs["total"], earlier + where.epoch + where.begun, earlier + where.epoch)
    total = batches["total"]["processed"] - (progress.processed - where.batch if where.begun else 0)
    _set(batches["current"], where.batch, where.batch)
    _set(batches["total"], total, total)
    batches["is_last_batch"] = where.over
    # an evaluation interrupted before its first batch is what Lightning takes up again
    due = int(where.batch > 0 and progress.completed < progress.processed == where.batch)
    for counts in ("total", "current"):
        _set(loop["epoch_loop.val_loop.batch_progress"][counts], due, 0)


def _set(counts: dict[str, int], begun: int, done: int) -> None:
    """Set the four counters of one progress."""
    counts.update(ready=begun, started=begun, processed=done, completed=done)


def align(trainer: Trainer, seed: int, rank: int) -> None:
    """Before a batch: what Lightning would carry from batch to batch becomes a function of the counters.

    The step that loggers see is one off after some restarts. The generator that dropout draws from is not saved, so it
    starts anew from (seed, rank, batch).

    Args:
        trainer: about to train on a batch.
        seed: of the run.
        rank: among the processes that see different rows.
    """
    loop = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped = trainer.global_step
    batch = loop.batch_progress.total.ready
    torch.manual_seed(((seed * 1_000_003 + rank) * 1_000_003 + batch) % 2**63)
