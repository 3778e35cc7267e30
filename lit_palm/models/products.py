"""Large float32 matrix products, by the library that multiplies them quickest on this processor.

torch gives float32 products on a processor to MKL. Where there is AVX-512, oneDNN, which torch is built with too, takes
half the time on processors that MKL was not made for: measured on two cores of a Zen 5, 300 to 460 GFLOP/s instead of
150 to 210. Sums are float32 either way, in another order.

Which of them is taken depends on the processor and on shapes alone, so that runs repeat.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = [
    "large_linear",
    "multiplies_quickly",
    "pack",
    "packed_product",
    "packs",
    "product",
    "quick",
    "weight_gradient",
]

FEWEST_ROWS = 16
"""Rows from which it was quicker in what was measured, 16 to 2,048."""
PIECE = 512
"""Rows of a weight's gradient that are computed at a time."""


def quick(x: Tensor) -> bool:
    """Whether products of the rows of x [..., I] are to be oneDNN's."""
    return (
        x.dtype is torch.float32
        and (type(x) is Tensor or type(x) is nn.Parameter)  # not of a mesh, nor of a dry run
        and x.is_cpu
        and x.numel() >= FEWEST_ROWS * x.shape[-1] > 0
        and not torch.compiler.is_compiling()  # which knows the products of torch
        and multiplies_quickly()
    )


@cache
def multiplies_quickly() -> bool:
    """Whether oneDNN has AVX-512 to multiply float32 numbers with, in this build of torch."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and packs(torch.float32)


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's product of a type, also of packed weights, and it is right."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:  # numbers so small that no sum of theirs is rounded
        x, weight = (torch.arange(n).remainder(3).to(dtype).view(-1, 8) for n in (16, 32))
        packed = pack(weight)
        with torch.autocast(x.device.type, enabled=False):  # under which torch's would have another type
            expected = x @ weight.t()
        products = _product(x, weight), packed_product(x, packed), packed_product(x, packed, expected) / 2
    except (AttributeError, RuntimeError):
        return False
    return all(torch.equal(result, expected) for result in products)


def pack(weight: Tensor) -> Tensor:
    """A weight [O, I] in oneDNN's own layout."""
    # those for 16 rows and more are the same, and good for fewer
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    return result


def packed_product(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x [N, I] times weight [O, I] transposed, of which the weight may be packed, and a residual [N, O] added to it."""
    # overloads by name: to find one takes as long as a small product
    result: Tensor
    if residual is None:
        result = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    else:
        result = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, None, "add")
    return result


def _product(x: Tensor, weight: Tensor) -> Tensor:
    # of what has gaps oneDNN makes its slowest product
    x, weight = (t if t.is_contiguous() or t.t().is_contiguous() else t.contiguous() for t in (x, weight))
    return packed_product(x, weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, I] times weight [O, I] transposed, [N, O]; for code that has gradients of its own."""
    return _product(x, weight) if quick(x) and weight.dtype is torch.float32 else F.linear(x, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [N, O] transposed times x [N, I], [O, I]."""
    if not (quick(x) and grad.dtype is torch.float32):
        return grad.t() @ x
    if grad.shape[1] <= 2 * PIECE:
        return _product(grad.t(), x.t())
    # many outputs at once take up to twice the time, and all of `grad` is copied meanwhile
    out = x.new_empty(grad.shape[1], x.shape[1])
    for to, piece in zip(out.split(PIECE), grad.split(PIECE, 1), strict=True):
        to.copy_(_product(piece.t(), x.t()))
    return out


def large_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of x [..., I] and weight [O, I], of both of which `quick` is true."""
    result: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight)
    return result.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """x [N, I], weight [O, I] -> [N, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()  # it may be one number for all
        grad_x = _product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        grad_weight = weight_gradient(grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
