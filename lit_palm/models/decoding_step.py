"""A block's decoding step in torch's own operations, one token a row, with weights as `matrices` has them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.models.compiled import check_compiler
from lit_palm.models.layers import QKNorm, rotate
from lit_palm.models.matrices import Matrix, Weights

__all__ = ["Layer", "Shape", "add_halves", "base_of", "base_weight", "compiled_run", "leave", "run", "split"]


def base_of(layer: Any) -> Any:
    """A linear layer without the adapters around it."""
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def base_weight(layer: Any) -> Tensor:
    """The weight of a linear layer, without the adapters around it."""
    weight: Tensor = base_of(layer).weight
    return weight


class Shape(NamedTuple):
    """Sizes of all blocks."""

    sizes: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    xpos: bool


class Layer:
    """One block's weights; activations are of type `dtype`.

    Args:
        block: of the network.
        weights: type to convert to; None: their own.
        pack: see `Matrix.of`.
        dtype: of activations.
        whole: what gives the weight of a linear layer; if it is not the layer's own, copies are made of it at once.
    """

    def __init__(
        self,
        block: Any,
        weights: Weights | None,
        pack: bool,
        dtype: torch.dtype,
        whole: Callable[[Any], Tensor] = base_weight,
    ) -> None:
        self.norm, self.eps = block.norm.weight.to(dtype), block.norm.eps
        entry = [whole(block.attn_ffn_in)]
        (self.entry,) = Matrix.of(entry, weights, pack)
        leave = [whole(block.attn_out), whole(block.ffn_out)]
        self.exit = Matrix.of(leave, weights, pack)
        if whole is not base_weight:
            for matrix in (self.entry, *self.exit):
                matrix.release()
        self.q_norm: QKNorm | None = block.q_norm
        self.k_norm: QKNorm | None = block.k_norm


def run(
    shape: Shape,
    layers: list[Layer],
    x: Tensor,
    rope: list[Tensor],
    bias: Tensor | None,
    slots: list[tuple[Tensor, Tensor]],
    start: int,
    place: int,
) -> Tensor:
    """All blocks for one token a row.

    Args:
        shape: sizes of the blocks.
        layers: their weights.
        x: [B, D].
        rope: rows of the rotary tables, [B or 1, 1, Dh].
        bias: [B, 1, 1, S] added to the scores.
        slots: each block's keys and values, [B or more, K, S or more, Dh]; whole, since `torch.compile` is not to be
            given two views of memory of which it writes one.
        start: the first slot in use.
        place: the slot of this token, the last one in use.
    """
    for layer, (keys, values) in zip(layers, slots, strict=True):
        fused = layer.entry(F.layer_norm(x, x.shape[1:], layer.norm, None, layer.eps))
        q, k, v, gate, up = split(shape, layer, fused, rope)
        keys, values = keys[: len(x)], values[: len(x)]
        # a slot as a slice: `torch.compile` would compile every single one anew
        keys[:, :, place : place + 1], values[:, :, place : place + 1] = k[:, :, None], v[:, :, None]
        # one query a row sees every slot: queries that share a key/value head become the rows of one product
        q = q.reshape(len(q), keys.shape[1], -1, shape.head_dim)
        seen = keys[:, :, start : place + 1], values[:, :, start : place + 1]
        attended = F.scaled_dot_product_attention(q, *seen, attn_mask=bias).reshape(len(x), -1)
        x = leave(layer, attended, gate, up, x)
    return x


@functools.cache
def compiled_run() -> Callable[..., Tensor]:
    """`run` through `torch.compile`: once for a process, since weights are arguments; sizes are symbols.

    Raises:
        ValueError: there is no compiler.
    """
    check_compiler("engine.compile")
    return torch.compile(run, dynamic=True)


def split(shape: Shape, layer: Layer, fused: Tensor, rope: list[Tensor]) -> tuple[Tensor, ...]:
    """q [B, H, Dh], k and v [B, K, Dh], normalised and rotated; the feed-forward's gate and up [B, F]."""
    qk, v, gate, up = fused.split_with_sizes(shape.sizes, 1)
    if qk.stride(1) != 1:  # thin_linear's layout, which suits the feed-forward but not attention
        qk, v = qk.contiguous(), v.contiguous()
    qk, v = qk.view(len(qk), -1, shape.head_dim), v.view(len(v), -1, shape.head_dim)
    heads = shape.num_heads, shape.num_kv_heads
    if layer.q_norm is None and layer.k_norm is None and not shape.xpos:
        q, k = rotate(qk, rope, heads)
    else:
        q, k = qk.split_with_sizes(heads, 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        (q,), (k,) = rotate(q, rope[:2]), rotate(k, rope[-2:])
    return q, k, v, gate, up


def leave(layer: Layer, attended: Tensor, gate: Tensor, up: Tensor, x: Tensor) -> Tensor:
    """x + both halves of a block, [B, D]."""
    if len(layer.exit) == 2:
        return layer.exit[1].add(F.silu(gate).mul_(up), layer.exit[0].add(attended, x))
    return layer.exit[0].add(torch.cat((attended, F.silu(gate).mul_(up)), 1), x)


def add_halves(layer: Layer, inner: Tensor, x: Tensor) -> Tensor:
    """The same of both halves side by side."""
    if len(layer.exit) == 2:
        attended, hidden = inner.split([matrix.weight.shape[1] for matrix in layer.exit], 1)
        return layer.exit[1].add(hidden, layer.exit[0].add(attended, x))
    return layer.exit[0].add(inner, x)
