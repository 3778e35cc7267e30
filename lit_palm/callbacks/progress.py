"""A progress bar that says what is being done: the stage's name, readable phases, and no version number."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.callbacks import TQDMProgressBar

__all__ = ["ProgressBar"]


EVERY = 0.5
"""Seconds between two looks at the metrics: to read them means to wait for the device."""


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the stage in front: "pre-training 1/3", "pre-training: validation".

    Args:
        stage: what this run is called; None takes `pl_module.stage_name`, and "training" where there is none.
        refresh_rate: batches between two updates; 0 turns the bar off.
        leave: keep the bar of every epoch.
    """

    def __init__(self, stage: str | None = None, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self.stage = stage
        self._shown: dict[str, int | str | float | dict[str, float]] = {}
        self._shown_at, self._may_lag = 0.0, False

    @staticmethod
    def replaces() -> type[Callback]:
        """A callback of this type in the configuration takes the place of the default one."""
        return AnyProgressBar

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.stage is None:
            self.stage = getattr(pl_module, "stage_name", None) or "training"

    @property
    def sanity_check_description(self) -> str:
        return f"{self.stage}: trying out validation"

    @property
    def train_description(self) -> str:
        return str(self.stage)

    @property
    def validation_description(self) -> str:
        return f"{self.stage}: validation"

    @property
    def test_description(self) -> str:
        return f"{self.stage}: test"

    @property
    def predict_description(self) -> str:
        return f"{self.stage}: prediction"

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._leave:
            self.train_progress_bar = self.init_train_tqdm()
        last = trainer.max_epochs
        of = f"/{last}" if last is not None and last > 0 else ""
        _restart(self.train_progress_bar, f"{self.stage} {trainer.current_epoch + 1}{of}", self.total_train_batches)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.has_dataloader_changed(dataloader_idx):
            words = self.sanity_check_description if trainer.sanity_checking else self.validation_description
            _restart(self.val_progress_bar, words, self.total_val_batches_current_dataloader)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._may_lag = True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._may_lag = False

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        if self._may_lag and time.monotonic() - self._shown_at < EVERY:
            return self._shown
        self._shown = super().get_metrics(trainer, pl_module)
        self._shown.pop("v_num", None)
        self._shown_at = time.monotonic()
        return self._shown


def _restart(bar: Any, description: str, total: int | float | None) -> None:
    """Start a tqdm bar again, with a new name and a number of batches that may be unknown."""
    bar.reset()
    bar.total = int(total) if total is not None and math.isfinite(total) else None
    bar.initial = 0
    bar.set_description(description)
