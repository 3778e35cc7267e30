"""How a run deals with steps whose loss or gradient is not finite; the modules skip them without being told."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_palm.modules.finite import FiniteSteps

__all__ = ["NonFiniteGuard"]


class NonFiniteGuard(Callback):
    """Change what happens at a step whose loss or gradient holds a NaN or an infinity, on any rank.

    Such a step is skipped on all ranks alike in every run (see `lit_palm.modules.finite`) and counted in
    `guard/skipped_steps`; ten in a row end the run with the reason.

    Args:
        max_in_a_row: so many skipped steps in a row end the run; None: never.
        skip: False looks at nothing, and takes every step as it comes.
    """

    def __init__(self, max_in_a_row: int | None = 10, skip: bool = True) -> None:
        if max_in_a_row is not None and max_in_a_row < 1:
            raise ValueError(f"NonFiniteGuard: max_in_a_row is {max_in_a_row}; use at least 1, or null for never")
        self.max_in_a_row, self.skip = max_in_a_row, skip

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        steps: Any = getattr(pl_module, "finite", None)
        if not isinstance(steps, FiniteSteps):
            raise ValueError(f"NonFiniteGuard sets what lit_palm's modules do, and {type(pl_module).__name__} is none")
        steps.max_in_a_row, steps.enabled = self.max_in_a_row, self.skip
