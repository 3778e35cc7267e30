"""Log the learning rate as `lr`.

Lightning's own monitor names it after the optimiser's class and parameter group; here the first group is `lr` in every
run, and a group with a "name" of its own is `lr/NAME` when its learning rate differs.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["LearningRate"]


class LearningRate(Callback):
    """Log the learning rate that the coming optimiser step uses, every `log_every_n_steps`."""

    @staticmethod
    def replaces() -> type[Callback]:
        """A callback of this type in the configuration takes the place of the default one."""
        return LearningRate

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not trainer.optimizers or not is_log_step(trainer, trainer.global_step + 1):
            return
        groups = trainer.optimizers[0].param_groups
        first = float(groups[0]["lr"])
        pl_module.log("lr", first, batch_size=1)
        for group in groups[1:]:
            if "name" in group and float(group["lr"]) != first:
                pl_module.log(f"lr/{group['name']}", float(group["lr"]), batch_size=1)


def is_log_step(trainer: Trainer, step: int) -> bool:
    """Whether Lightning writes the metrics of this optimiser step, counted from 1."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0
