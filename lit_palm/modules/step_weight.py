"""What an optimiser step is divided by: the objective's weights, summed over its micro-batches and ranks.

With one weight the gradients are divided after backward, when all micro-batches are known. Loss terms with weights of
their own must be divided before it, by weights that are not all known yet: the dataloader then looks ahead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_palm.types import Experience, Loss

if TYPE_CHECKING:
    from lit_palm.modules.host import LitModule

__all__ = ["StepWeight"]


class StepWeight:
    """The weight of the optimiser step under way.

    Attributes:
        value: the sum so far on this rank; None between steps.
        total: the sum over all ranks, once `factor` has been asked for.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.total = torch.zeros(())
        self._terms: dict[str, Tensor] = {}

    def add(self, module: LitModule, loss: Loss, batch: Experience) -> tuple[Tensor, Tensor]:
        """Take in a micro-batch.

        Returns:
            The scalar to differentiate, and the value to log for it (a mean).
        """
        weight = module.objective.weight(batch)
        if isinstance(loss.total, Tensor):
            assert isinstance(weight, Tensor)
            weight = weight.to(dtype=torch.float32)
            total, shown = loss.total, loss.total.detach() / weight.clamp(min=1e-8)
        else:
            assert isinstance(weight, dict)
            first = self.value is None
            if first:
                self._terms = self._look_ahead(module, weight)
            parts = [term / self._terms[name].clamp(min=1e-8) for name, term in loss.total.items()]
            total = torch.stack(parts).sum()
            # divided already: what is left to divide by is 1, over all micro-batches and ranks; 0 for an empty step
            share = 1 / module.layout.size if first else 0.0
            counts = torch.stack([term > 0 for term in self._terms.values()]).any()
            weight, shown = torch.where(counts, share, 0.0).to(total.device, torch.float32), total.detach()
        self.value = weight if self.value is None else self.value + weight
        return total, shown

    def _look_ahead(self, module: LitModule, weight: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weight of every term over all micro-batches and ranks of the step that begins.

        Raises:
            ValueError: gradients are accumulated over a dataloader that cannot look ahead.
        """
        trainer = module.trainer
        left = trainer.num_training_batches - trainer.fit_loop.epoch_loop.batch_progress.current.ready  # a stream: inf
        rest = int(min(trainer.accumulate_grad_batches - 1, left))
        loader: Any = trainer.train_dataloader
        if rest > 0 and not hasattr(loader, "upcoming"):
            raise ValueError(
                f"{type(module.objective).__name__} has several loss terms with weights of their own; to accumulate "
                "gradients the dataloader must look ahead, as those of lit_palm's data modules do: use one of these, "
                "or trainer.accumulate_grad_batches 1"
            )
        sums = {name: value.float() for name, value in weight.items()}
        for batch in loader.upcoming(rest) if rest > 0 else []:
            others = module.objective.weight(batch)
            assert isinstance(others, dict)
            sums = {name: value + others[name].to(value) for name, value in sums.items()}
        return {name: module.all_sum(value) for name, value in sums.items()}

    def factor(self, module: LitModule) -> Tensor:
        """What gradients are multiplied by once all micro-batches are in, the same on every rank."""
        assert self.value is not None, "an optimiser step without a training_step"
        trainer = module.trainer
        # Lightning divided by the accumulation, and data parallelism averages over ranks: undo both
        self.total = module.all_sum(self.value)
        return trainer.accumulate_grad_batches * module.layout.size / self.total.clamp(min=1e-8)
