"""One checkpoint that is always there and always the newest: what the next stage, or a resumed run, starts from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

__all__ = ["LastCheckpoint"]


class LastCheckpoint(Checkpoint):
    """Keeps `dirpath/last.ckpt`: written every so many optimiser steps and when training ends.

    The file is replaced at once, so a run that is killed while saving leaves the one before. Use Lightning's
    `ModelCheckpoint` beside it to keep several, or the best by a metric.

    Args:
        dirpath: folder, or any fsspec URL.
        every_n_steps: optimiser steps between two savings; None: only when training ends.
    """

    def __init__(self, dirpath: str, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1 or null, got {every_n_steps}")
        self.dirpath, self.every_n_steps = dirpath, every_n_steps
        self._saved = -1
        self._stale = False

    def _save(self, trainer: Trainer) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        self._saved, self._stale = trainer.global_step, False
        path = os.path.join(self.dirpath, "last.ckpt")
        if "://" in path:
            trainer.save_checkpoint(path)
            return
        # beside its place, where renaming is one step: the system's folder for temporary files may be another disk
        new = Path(self.dirpath) / ".last.ckpt.new"
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            _replace(new, Path(path))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved, self._stale = trainer.global_step, False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stale = not trainer.sanity_checking  # it may have calibrated a reward model

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stale = True
        step = trainer.global_step
        if self.every_n_steps and step and step % self.every_n_steps == 0 and step != self._saved:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stale:
            self._save(trainer)


def _replace(new: Path, path: Path) -> None:
    """Put a checkpoint in its place; of a folder of shards the one before is moved aside first."""
    if not new.is_dir() and not path.is_dir():
        os.replace(new, path)
        return
    old = path.with_name(".last.ckpt.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)
