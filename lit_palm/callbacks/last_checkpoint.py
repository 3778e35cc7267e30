"""One checkpoint that is always there and always the newest: what the next stage, or a resumed run, starts from."""

from __future__ import annotations

import os
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

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step != self._saved and not getattr(trainer, "fast_dev_run", False):
            self._saved = trainer.global_step
            trainer.save_checkpoint(os.path.join(self.dirpath, "last.ckpt"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every_n_steps and trainer.global_step and trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
