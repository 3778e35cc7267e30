"""Means over a validation or test set, over all batches and ranks, whatever their sizes.

Sums and counts are added up in float64, where the device has it and else on the host, and reduced once. (Lightning's
own `sync_dist` averages the counts of ranks as whole numbers, so that with 10 rows here and 11 there a mean is divided
by 10 instead of 10.5.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_palm.types import has_float64

__all__ = ["Means"]


class Means:
    """Sums and counts by name."""

    def __init__(self) -> None:
        self._pairs: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, count: Tensor) -> None:
        """Add the sum and the count of a batch; every rank must add the same names in the same order."""
        pair = torch.stack([value.detach().float(), count.detach().float()])
        pair = pair.double() if has_float64(pair.device) else pair.cpu().double()
        self._pairs[name] = self._pairs.get(name, 0) + pair

    def pop(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means of everything added since the last call.

        Args:
            reduce: sums a tensor over all ranks.
        """
        pairs, self._pairs = self._pairs, {}
        if not pairs:
            return {}
        sums, counts = reduce(torch.stack(list(pairs.values()))).cpu().unbind(1)
        # of what nothing was counted there is no mean, and nothing is reported
        return {name: (s / n).item() for name, s, n in zip(pairs, sums, counts, strict=True) if n > 0}
