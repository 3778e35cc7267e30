"""16-bit networks on processors that do not multiply 16-bit numbers.

Without instructions for them a matrix product of bfloat16 numbers takes several times as long as one of float32
numbers, since every number is converted again and again inside the product. Here the factors are converted once, the
product is computed in float32 and the result rounded: at about the speed of float32, no less exact than a native one,
whose sums are float32 too. Between products, and for the backward pass, tensors stay 16 bits wide.

Whether that is done depends on the processor, the type and the shape alone (`lit_palm.models.hardware.multiplies`), so
that runs repeat. Elsewhere `linear` and `attention` are torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_palm.models.causal import causal_attention, pays
from lit_palm.models.hardware import multiplies
from lit_palm.models.kernels import thin_linear
from lit_palm.models.products import large_linear, quick

__all__ = ["attention", "linear", "product_type", "widened", "widens"]

ROWS = 256
"""Rows of a result that are computed at a time, so that their float32 form stays in the processor's cache."""

FEWEST = 8
"""Rows below which a native product is quicker: converting the weight costs as much as several of them."""


def widens(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of a type are to be computed in float32 where a tensor is."""
    plain = (
        type(x) is Tensor or type(x) is nn.Parameter
    )  # other kinds, of a mesh or a dry run, have products of their own
    return plain and not multiplies(x, dtype)


def widened(weight: Tensor) -> Tensor:
    """A weight in the type that products with it are best computed in; itself where that is its own."""
    return weight.float() if widens(weight, weight.dtype) else weight


def product_type(x: Tensor) -> torch.dtype:
    """What torch would multiply in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] times weight [O, I] transposed, as `F.linear` under the same autocast would have it."""
    kind, dtype = x.device.type, product_type(x)
    fits = torch.is_autocast_enabled(kind) or dtype == weight.dtype  # else torch says what is wrong
    if not (fits and widens(x, dtype) and widens(weight, dtype)) or x.numel() < FEWEST * x.shape[-1]:
        if fits and quick(x, weight, dtype):
            return large_linear(x, weight, dtype)
        return thin_linear(x, weight)
    # cast out here, where autograd casts back
    rows = x.to(dtype).reshape(-1, x.shape[-1])
    with torch.autocast(kind, enabled=False):
        if torch.compiler.is_compiling():  # which keeps and cuts as it sees fit
            return F.linear(x.to(dtype).float(), weight.to(dtype).float()).to(dtype)
        result: Tensor = _WideLinear.apply(rows, weight)
    return result.view(*x.shape[:-1], -1)


class _WideLinear(torch.autograd.Function):
    """x [N, I] of 16 bits, weight [O, I] of any type -> [N, O] of 16 bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _matmul(x, weight.to(x.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        wide = weight.to(x.dtype).float() if need_x else None
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for start in range(0, len(x), ROWS):
            part = slice(start, start + ROWS)
            piece = grad[part].float()
            if grad_x is not None and wide is not None:
                grad_x[part] = piece @ wide
            if grad_weight is not None:
                grad_weight.addmm_(piece.t(), x[part].float())
        return grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [N, I] @ b [I, O], both of 16 bits, with the product in float32 and the result rounded to their type."""
    wide = b.float()
    if len(a) <= ROWS:
        return (a.float() @ wide).to(a.dtype)
    out = a.new_empty(len(a), b.shape[1])
    for to, rows in zip(out.split(ROWS), a.split(ROWS), strict=True):
        to.copy_(rows.float() @ wide)
    return out


def attend_at_once(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], dropout: float = 0.0) -> Tensor | None:
    """Causal attention within sequences that lie one after the other in rows, whatever the rows.

    Args:
        q: [B, T, H, Dh].
        k: [B, T, K, Dh], K a divisor of H.
        v: [B, T, K, Dh].
        lengths: of the sequences, B * T in all.
        dropout: dropped share of the attention weights.

    Returns:
        [B, T, H, Dh]; None where it is not quicker than torch's own.
    """
    dtype = product_type(q)
    if not pays(q, k, dtype, dropout):
        return None
    flat = [t.to(dtype).flatten(0, 1) for t in (q, k, v)]
    return causal_attention(flat[0], flat[1], flat[2], lengths).view(q.shape)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """`F.scaled_dot_product_attention`, compiled or in float32 where that is quicker; options are its own.

    In float32 its backward pass keeps queries, keys, values and the result in float32 too.
    """
    dtype = product_type(q)
    wide = widens(q, dtype)
    # what is compiled by torch is so for any number of rows, and asks for none here
    plain = bias is None and bool(options.get("is_causal")) and not torch.compiler.is_compiling()
    if plain and q.shape[2] == k.shape[2]:
        rows, dropout = [t.transpose(1, 2) for t in (q, k, v)], options.get("dropout_p", 0.0)
        attended = attend_at_once(rows[0], rows[1], rows[2], [q.shape[2]] * len(q), dropout)
        if attended is not None:
            return attended.transpose(1, 2)
    if not wide:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)
    q, k, v = (t.to(dtype).float() for t in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        bias = bias.float() if bias is not None and bias.is_floating_point() else bias
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options).to(dtype)
