"""The reference of a policy: what it may not stray from, frozen, known in advance, or following the policy.

Three ways to hold one, all the same to an objective, which gets `ref_logps`:

- a frozen network beside the policy (default);
- `precompute_reference`: one pass over the given data before training, then the network is let go. Only for data that
  does not change, so not for completions that the policy samples;
- `reference_update`: every so many steps the reference takes a part of the policy's weights (Gorbatovski et al. 2024,
  "Learn Your Reference Model"); with `every: 1` and a small `mix` it is an exponential moving average of the policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_palm.models.weights import local
from lit_palm.types import Experience, sent

if TYPE_CHECKING:
    from lit_palm.modules.policy import LitPolicy

__all__ = ["PrecomputedReference", "ReferenceUpdate"]


@dataclass
class ReferenceUpdate:
    """Every `every` optimiser steps, reference <- mix * policy + (1 - mix) * reference.

    Raises:
        ValueError: a field is out of its range.
    """

    mix: float = 0.6
    """The policy's part, above 0; 1 copies the policy."""
    every: int = 512
    """Optimiser steps from one update to the next."""

    def __post_init__(self) -> None:
        if not 0 < self.mix <= 1:
            raise ValueError(
                f"reference_update.mix must lie in (0, 1], got {self.mix}; 0.6 is usual, 0.01 with every 1"
            )
        if self.every < 1:
            raise ValueError(f"reference_update.every must be at least 1, got {self.every}")

    def due(self, before: int, now: int) -> bool:
        """Whether an update falls on the steps after `before`, up to and with `now`."""
        return now // self.every > before // self.every

    @torch.no_grad()
    def apply(self, reference: nn.Module, policy: nn.Module) -> None:
        """Move the reference, which is spread as the policy is: each process moves what it holds."""
        for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
            local(old).lerp_(local(new), self.mix)


class PrecomputedReference:
    """Reference log-probabilities of a data set, found by the number of the row."""

    def __init__(self) -> None:
        self._stages: dict[str, tuple[Tensor, Tensor]] = {}
        self._data: Any = None

    def fill(self, module: LitPolicy, stage: str) -> bool:
        """Run the reference over all rows of a stage ("train", "validation" or "test"); each rank takes its share.

        Returns:
            Whether all that will be asked for is known; not of prompts, which are completed anew each time.

        Raises:
            ValueError: the data module cannot be gone through twice, or its rows have no numbers.
        """
        data: Any = getattr(module.trainer, "datamodule", None)
        if data is not self._data:  # rows of other data have the same numbers
            self._data, self._stages = data, {}
        if stage in self._stages:
            return True
        if data is None or not hasattr(data, "loader"):
            raise ValueError(
                "model.precompute_reference goes through the data before training and needs a data module of lit_palm, "
                "such as PreferenceData"
            )
        found: dict[int, Tensor] = {}
        for batch in data.loader(stage, data.eval_batch_size):
            if not isinstance(batch, Experience):
                return False
            if "row" not in batch or bool((batch["row"] < 0)[batch["loss_mask"].any(1)].any()):
                raise ValueError(
                    f"model.precompute_reference: {type(data).__name__} makes rows without a number of their own (such "
                    "as mismatched ones), whose log-probabilities cannot be looked up: leave it out"
                )
            moved = batch.to(module.device)
            with torch.no_grad(), module.numerics():
                logps = module.reference_logps(moved, temperature=1.0).float().cpu()
            for row, number in enumerate(batch["row"].tolist()):
                if number >= 0:  # not one that fills a batch up
                    found[number] = logps[row][batch["loss_mask"][row]]
        found = {number: values for part in module.layout.gather(found) for number, values in part.items()}
        lengths = torch.zeros(max(found) + 2, dtype=torch.long)
        for number, values in found.items():
            lengths[number + 1] = len(values)
        self._stages[stage] = torch.cat([found[number] for number in sorted(found)]), lengths.cumsum(0)
        return True

    def logps(self, stage: str, batch: Experience) -> Tensor:
        """[B, T] for the rows of a batch, on its device, zero outside `loss_mask`."""
        flat, offsets = self._stages[stage]
        mask, numbers = batch.host["loss_mask"].cpu(), batch.host["row"].cpu()
        count, first = mask.sum(1), offsets[numbers]
        known = offsets[numbers + 1] - first  # of a row that fills a batch up: of no meaning, nothing is asked of it
        assert bool(((known == count) | (count == 0)).all()), "rows changed after their reference was computed"
        place = (first[:, None] + mask.cumsum(1) - 1).clamp_(0, len(flat) - 1)
        return sent(torch.where(mask, flat[place], 0), batch["tokens"].device)
