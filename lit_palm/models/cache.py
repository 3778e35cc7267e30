"""Keys and values of past tokens, for incremental decoding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_palm.models.base import Cache

__all__ = ["PaLMCache"]


class PaLMCache(Cache):
    """Keys and values in memory allocated once; slots beyond `length` hold garbage that nothing reads.

    Attributes:
        layers: keys and values of each block, both [rows, K, slots, Dh]; made when the first tokens arrive, in their
            dtype, which autocast and sharding may have changed.
        bias: [rows, slots] added to attention scores, -inf at left padding; None while no row is padded.
        next_position: [rows] position of the next token; None while it is `length` for every row.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.length = 0
        self.bias: Tensor | None = None
        self.next_position: Tensor | None = None

    def append(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block's new keys and values, both [rows, K, T, Dh]; all of them so far, [rows, K, length + T, Dh]."""
        rows, heads, width, head_dim = k.shape
        end = self.length + width
        assert end <= self.num_slots, "the cache is full: make it longer"
        if index == len(self.layers):
            shape = (rows, heads, self.num_slots, head_dim)
            self.layers.append((k.new_empty(shape), k.new_empty(shape)))
        keys, values = self.layers[index]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def pad(self, mask: Tensor, dtype: torch.dtype) -> None:
        """Record which of the tokens that come next are padding (mask [rows, T], False there)."""
        rows, width = mask.shape
        if self.bias is None or self.next_position is None:
            self.bias = torch.zeros(rows, self.num_slots, dtype=dtype, device=mask.device)
            self.next_position = torch.full((rows,), self.length, device=mask.device)
        self.bias[:, self.length : self.length + width].masked_fill_(~mask, -math.inf)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows; see `Cache.select`. Only slots in use are copied."""

        def pick(old: Tensor) -> Tensor:
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self.length] = old[:, :, : self.length].index_select(0, rows)
            return new

        self.layers = [(pick(k), pick(v)) for k, v in self.layers]
        if self.bias is not None and self.next_position is not None:
            self.bias, self.next_position = self.bias[rows], self.next_position[rows]
