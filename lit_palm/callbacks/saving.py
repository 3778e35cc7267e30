"""Saving now, through whatever callback of the run keeps checkpoints."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

__all__ = ["can_save", "save_now"]


def _savers(trainer: Trainer) -> list[Any]:
    """Callbacks that save when they are told to: by `save(trainer)`, or `_save(trainer)`."""
    found = [c for c in trainer.callbacks if isinstance(c, Checkpoint)]  # type: ignore[attr-defined]
    return [c for c in found if callable(getattr(c, "save", None)) or callable(getattr(c, "_save", None))]


def can_save(trainer: Trainer) -> bool:
    """Whether `save_now` would leave a checkpoint."""
    return bool(_savers(trainer) or trainer.checkpoint_callbacks)


def save_now(trainer: Trainer) -> str:
    """Save the run as it stands, on every rank; a hook in which all of them are.

    Returns:
        Where to.
    """
    savers = _savers(trainer)
    for saver in savers:
        (getattr(saver, "save", None) or saver._save)(trainer)
    if savers:
        path = getattr(savers[0], "path", None) or os.path.join(str(getattr(savers[0], "dirpath", "")), "last.ckpt")
        return str(path)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            path = os.path.join(callback.dirpath, "last.ckpt")
            trainer.save_checkpoint(path)
            return path
    return ""
