"""Prompts read with the matrices that decoding has packed: what the network gives, for their last tokens alone.

Packing matrices anew, as a network in training does, takes as long as multiplying some 64 tokens with them. Padding is
left out where nothing came before: tokens are rows of one matrix [N, D], and attention is that of documents.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.models.attention import Documents, attend_within
from lit_palm.models.cache import PaLMCache
from lit_palm.models.decoding_step import Layer, Shape, add_halves, leave, split
from lit_palm.models.kernels import split_swiglu
from lit_palm.models.layers import rotate
from lit_palm.models.matrices import PanelMatrix
from lit_palm.models.palm import Block, PaLM

__all__ = ["read_prompts"]


class _Padded(NamedTuple):
    """Where the tokens of left-padded rows lie."""

    rows: int
    width: int
    places: Tensor
    """[N] of the tokens among all places of the rows, one row after the other."""
    lengths: tuple[int, ...]

    @staticmethod
    def of(mask: Tensor) -> _Padded:
        """Of rows [B, T] that are False at padding."""
        return _Padded(mask.shape[0], mask.shape[1], mask.flatten().nonzero().squeeze(1), tuple(mask.sum(1).tolist()))

    def spread(self, x: Tensor) -> Tensor:
        """[1, N, K, Dh] -> [B, T, K, Dh], 0 at padding."""
        rows = x.new_zeros(self.rows * self.width, *x.shape[2:])
        rows[self.places] = x[0]
        return rows.view(self.rows, self.width, *x.shape[2:])


def read_prompts(
    trunk: PaLM,
    shape: Shape,
    layers: list[Layer],
    tokens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    cache: PaLMCache,
    dtype: torch.dtype,
) -> Tensor:
    """What the last block gives for the last token of every row, [B, D]; the cache takes the keys and values of all.

    Args:
        trunk: the network.
        shape: sizes of its blocks.
        layers: their weights, in packed matrices.
        tokens: [B, T].
        mask: [B, T] bool, False at left padding; None: there is none.
        positions: [B, T]; None: counted.
        cache: of the network.
        dtype: of hidden states.
    """
    rows, width = tokens.shape
    if cache.length:
        cache.cast(dtype)
    cache.reserve(width)
    if mask is not None:
        cache.pad(mask, dtype)
    rope = trunk.rope(tokens, mask, positions, cache)
    padded, bias, outer = None, None, (rows, width)
    if mask is not None and not cache.length:
        padded = _Padded.of(mask)
        tokens, outer = tokens.flatten()[padded.places], (1, len(padded.places))
        rope = tuple(table.flatten(0, 1)[padded.places] for table in rope)
    x = F.embedding(tokens, trunk.embedding.weight).to(dtype)
    if padded is None:
        bias = trunk.attention_bias(x, mask, None, cache)
    x = x.view(-1, x.shape[-1])
    for block, layer in zip(cast(list[Block], list(trunk.layers)[:-1]), layers, strict=False):
        qk, v, hidden = split_swiglu(layer.entry(_normed(x, layer)), block.sizes)
        q, k = block.queries_and_keys(qk.view(*outer, -1, shape.head_dim), rope)
        v = v.view(*outer, -1, shape.head_dim)
        if padded is None:
            attended = block.attend(q, k, v, bias, cache)
        else:
            cache.append(block.index, padded.spread(k).transpose(1, 2), padded.spread(v).transpose(1, 2))
            attended = attend_within(q, k, v, Documents(padded.lengths)).flatten(2)
        x = add_halves(layer, torch.cat((attended.flatten(0, 1), hidden), 1), x)
    x = _read_last(cast(Block, trunk.layers[-1]), shape, layers[-1], x.view(*outer, -1), rope, padded, cache)
    cache.length += width
    return x


def _normed(x: Tensor, layer: Layer) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.norm, None, layer.eps)


def _read_last(
    block: Block,
    shape: Shape,
    layer: Layer,
    x: Tensor,
    rope: tuple[Tensor, ...],
    padded: _Padded | None,
    cache: PaLMCache,
) -> Tensor:
    """The last block: of the tokens of x [B, T, D] that are not a row's last nothing but keys and values is needed."""
    normed = _normed(x, layer)
    first, size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    kv = cast(PanelMatrix, layer.entry).part(normed.flatten(0, 1), first, first + 2 * size)
    k, v = kv.view(*x.shape[:2], 2, shape.num_kv_heads, shape.head_dim).unbind(2)
    (k,) = rotate(k if block.k_norm is None else block.k_norm(k), rope[-2:])
    if padded is None:
        rope_last = [table[..., -1:, :, :].view(-1, 1, shape.head_dim) for table in rope]
        x, normed = x[:, -1], normed[:, -1]
    else:
        ends = torch.tensor(padded.lengths).cumsum(0) - 1
        k, v = padded.spread(k), padded.spread(v)
        rope_last, x, normed = [table[ends] for table in rope], x[0, ends], normed[0, ends]
    q, _, _, gate, up = split(shape, layer, layer.entry(normed), rope_last)
    seen = cache.bias_of(cache.length + k.shape[1])
    attended = block.attend(q[:, None], k, v, None if seen is None else seen[:, None, None], cache)
    return leave(layer, attended.squeeze(1), gate, up, x)
