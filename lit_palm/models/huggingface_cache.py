"""Keys and values of a model of `transformers`, in its own cache class, with which tokens are padding beside them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.models.base import Cache

__all__ = ["HuggingFaceCache"]


class HuggingFaceCache(Cache):
    """A `DynamicCache` over all past tokens; sliding windows are a matter of the model's mask.

    Attributes:
        inner: what the model of `transformers` is given.
        mask: [rows, length] bool, False at left padding; None while no row is padded.
        padding: how many slots may be padding in a row: the length may exceed what the model takes by so many.
    """

    def __init__(self) -> None:
        from transformers import DynamicCache

        self.inner: Any = DynamicCache()
        self.length = 0
        self.mask: Tensor | None = None
        self.padding = 0

    def extend(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """Note the tokens [rows, T] that come next; which of all [rows, length + T] are real, None for all of them."""
        if mask is None and self.mask is None:
            return None
        real = tokens.new_ones(tokens.shape, dtype=torch.bool)
        before = real.new_ones(len(tokens), self.length) if self.mask is None else self.mask
        self.mask = torch.cat([before, real if mask is None else mask], 1)
        if mask is not None:  # what is real adds no padding, and counting would wait for the device in every step
            self._count()
        return self.mask

    def select(self, rows: Tensor) -> None:
        """Keep the given rows; see `Cache.select`."""
        self.inner.batch_select_indices(rows)
        self.mask = None if self.mask is None else self.mask[rows]
        self._count()

    def join(self, other: Cache) -> None:
        """Append the rows of another cache; see `Cache.join`."""
        assert isinstance(other, HuggingFaceCache)
        length = max(self.length, other.length)
        masks = []
        for cache in (self, other):
            lacks = length - cache.length
            if cache.mask is None:
                cache.mask = torch.ones(cache.num_rows, cache.length, dtype=torch.bool, device=cache.device)
            masks.append(F.pad(cache.mask, (lacks, 0)))
        for own, new in zip(self.inner.layers, other.inner.layers, strict=True):
            for name in ("keys", "values"):
                parts = getattr(own, name), getattr(new, name)
                setattr(own, name, torch.cat([F.pad(p, (0, 0, length - p.shape[2], 0)) for p in parts]))
        self.length, self.mask = length, torch.cat(masks)
        self._count()

    def trim(self, count: int) -> None:
        """Drop the first `count` slots, padding in every row; see `Cache.trim`."""
        if count == 0:
            return
        assert self.mask is not None and not bool(self.mask[:, :count].any())
        for layer in self.inner.layers:
            layer.keys, layer.values = layer.keys[:, :, count:].clone(), layer.values[:, :, count:].clone()
        self.length -= count
        self.mask = self.mask[:, count:]
        self._count()

    @property
    def num_rows(self) -> int:
        """How many rows it holds."""
        return int(self.inner.layers[0].keys.shape[0])

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        device: torch.device = self.inner.layers[0].keys.device
        return device

    def _count(self) -> None:
        if self.mask is not None:
            self.padding = int((~self.mask).sum(1).max())
