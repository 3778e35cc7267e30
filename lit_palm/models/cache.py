"""Keys and values of past tokens, for incremental decoding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_palm.models.base import Cache

__all__ = ["PaLMCache"]

SLACK = 32
"""Fewest slots that are kept free on either side of a cache which rows join and leave."""


class PaLMCache(Cache):
    """Keys and values in memory allocated once, or again when rows join; slots not in use hold garbage, never read.

    The slots in use are `start` to `start + length` of the first `num_rows` rows. So dropping padding on the left and
    padding rows further to the left cost nothing, and rows leave and join in place.

    Attributes:
        layers: keys and values of each block, both [rows, K, slots, Dh]; made when the first tokens arrive, in their
            dtype, which autocast and sharding may have changed.
        bias: [rows, slots] added to attention scores, -inf at left padding; None while no row is padded.
        next_position: [num_rows] position of the next token; None while it is `length` for every row.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.num_rows = self.start = self.length = 0
        self.bias: Tensor | None = None
        self.next_position: Tensor | None = None

    def append(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block's new keys and values, both [rows, K, T, Dh]; all of them so far, [rows, K, length + T, Dh]."""
        rows, heads, width, head_dim = k.shape
        start, end = self.start + self.length, self.start + self.length + width
        assert end <= self.num_slots, "the cache is full: call reserve first"
        if index == len(self.layers):
            shape = (rows, heads, self.num_slots, head_dim)
            self.layers.append((k.new_empty(shape), k.new_empty(shape)))
            self.num_rows = rows
        keys, values = (t[:rows] for t in self.layers[index])
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        return keys[:, :, self.start : end], values[:, :, self.start : end]

    def bias_of(self, width: int) -> Tensor | None:
        """What is added to the scores of the first `width` slots in use, [num_rows, width]; None: nothing."""
        if self.bias is None:
            return None
        return self.bias[: self.num_rows or None, self.start : self.start + width]

    def pad(self, mask: Tensor, dtype: torch.dtype) -> None:
        """Record which of the tokens that come next are padding (mask [rows, T], False there)."""
        rows, width = mask.shape
        if self.bias is None or self.next_position is None:
            capacity = self.layers[0][0].shape[0] if self.layers else rows
            self.bias = torch.zeros(capacity, self.num_slots, dtype=dtype, device=mask.device)
            self.next_position = torch.full((rows,), self.length, device=mask.device)
        start = self.start + self.length
        self.bias[:rows, start : start + width].masked_fill_(~mask, -math.inf)

    def reserve(self, width: int) -> None:
        """Make room for `width` more tokens in every row."""
        need = self.length + width
        if self.start + need <= self.num_slots:
            return
        if not self.layers:
            self.num_slots = self.start + need
        else:
            self._move(len(self.layers[0][0]), 0, need + max(SLACK, need // 2))

    def cast(self, dtype: torch.dtype) -> None:
        """Keep keys, values and bias in another type from now on."""
        if self.layers[0][0].dtype == dtype:
            return
        self.layers = [(k.to(dtype), v.to(dtype)) for k, v in self.layers]
        if self.bias is not None:
            self.bias = self.bias.to(dtype)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows; see `Cache.select`. Only slots in use are copied, and only of rows that change place
        where the others can stay."""
        picked = rows.tolist()
        moved = [(to, source) for to, source in enumerate(picked) if to != source]
        capacity = len(self.layers[0][0]) if self.layers else 0
        # what is overwritten must not be needed afterwards; much memory must not be kept for few rows
        if all(source >= len(picked) for _, source in moved) and len(picked) * 4 >= capacity:
            if moved:
                to, source = rows.new_tensor([m[0] for m in moved]), rows.new_tensor([m[1] for m in moved])
                used = slice(self.start, self.start + self.length)
                for tensor in (t for layer in self.layers for t in layer):
                    tensor[to, :, used] = tensor[source, :, used]
                if self.bias is not None:
                    self.bias[to] = self.bias[source]
        else:
            self.layers = [(self._pick(k, rows), self._pick(v, rows)) for k, v in self.layers]
            if self.bias is not None:
                self.bias = self.bias[rows]
        if self.next_position is not None:
            self.next_position = self.next_position[rows]
        self.num_rows = len(picked)

    def _pick(self, old: Tensor, rows: Tensor) -> Tensor:
        new, used = old.new_empty(len(rows), *old.shape[1:]), slice(self.start, self.start + self.length)
        new[:, :, used] = old[:, :, used].index_select(0, rows)
        return new

    def join(self, other: Cache) -> None:
        """Append the rows of another cache; see `Cache.join`."""
        assert isinstance(other, PaLMCache) and self.layers and other.layers
        before, total = self.num_rows, self.num_rows + other.num_rows
        length = max(self.length, other.length)
        ahead, behind = length - self.length, length - other.length
        capacity = len(self.layers[0][0])
        if total > capacity or ahead > self.start:
            slack = max(SLACK, length // 4)
            capacity = max(total, capacity * 3 // 2) if total > capacity else capacity
            self._move(capacity, ahead + slack, ahead + self.length + 3 * slack)
        positions = [self._positions(), other._positions()]
        if ahead or behind or self.bias is not None or other.bias is not None:
            if self.bias is None:
                keys = self.layers[0][0]
                dtype = keys.dtype if other.bias is None else other.bias.dtype
                self.bias = torch.zeros(capacity, self.num_slots, dtype=dtype, device=keys.device)
            self.bias[before:total] = 0
            self.bias[:before, self.start - ahead : self.start] = -math.inf
        self.start -= ahead
        first, end = self.start + behind, self.start + length
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for new, old in zip(mine, theirs, strict=True):
                # masked, but a weight of 0 times garbage that is not a number is none either
                new[:before, :, self.start : self.start + ahead] = 0
                new[before:total, :, self.start : first] = 0
                new[before:total, :, first:end] = old[: other.num_rows, :, other.start : other.start + other.length]
        if self.bias is not None:
            self.bias[before:total, self.start : first] = -math.inf
            bias = other.bias_of(other.length)
            if bias is not None:
                self.bias[before:total, first:end] = bias
            self.next_position = torch.cat(positions)
        self.length, self.num_rows = length, total

    def trim(self, count: int) -> None:
        """Drop the first slots; see `Cache.trim`."""
        assert 0 <= count <= self.length
        if count and self.next_position is None:
            self.next_position = self._positions()
        self.start += count
        self.length -= count

    def _positions(self) -> Tensor:
        if self.next_position is not None:
            return self.next_position
        return torch.full((self.num_rows,), self.length, device=self.layers[0][0].device)

    def _move(self, capacity: int, start: int, num_slots: int) -> None:
        """Copy what is in use into memory of `capacity` rows and `num_slots` slots, from slot `start` on."""
        rows, old, new = self.num_rows, slice(self.start, self.start + self.length), slice(start, start + self.length)

        def moved(tensor: Tensor) -> Tensor:
            bigger = tensor.new_empty(capacity, tensor.shape[1], num_slots, tensor.shape[3])
            bigger[:rows, :, new] = tensor[:rows, :, old]
            return bigger

        self.layers = [(moved(k), moved(v)) for k, v in self.layers]
        if self.bias is not None:
            bias = self.bias.new_zeros(capacity, num_slots)
            bias[:rows, new] = self.bias[:rows, old]
            self.bias = bias
        self.start, self.num_slots = start, num_slots
