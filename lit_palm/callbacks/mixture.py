"""What a stream reads: `data/epoch/NAME` and `data/share/NAME` of each source, every `log_every_n_steps`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_palm.callbacks.learning_rate import is_log_step

__all__ = ["MixtureShares"]


class MixtureShares(Callback):
    """Log how often each source of a stream was read to its end, and its share of the tokens that were read.

    Both are those of the first rank's streams, as of the newest block of each. Data that is no stream logs nothing.
    """

    def __init__(self) -> None:
        self._logged_step = 0

    @staticmethod
    def replaces() -> type[Callback]:
        """A callback of this type in the configuration takes the place of the default one."""
        return MixtureShares

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, data = trainer.global_step, getattr(trainer, "datamodule", None)  # type: int, Any
        if step == self._logged_step or not is_log_step(trainer, step) or not hasattr(data, "shares"):
            return
        self._logged_step = step
        for name, (epoch, share) in data.shares().items():
            pl_module.log_dict({f"data/epoch/{name}": float(epoch), f"data/share/{name}": share}, batch_size=1)
