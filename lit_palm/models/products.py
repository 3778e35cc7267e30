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

__all__ = ["large_linear", "packed_product", "product", "quick", "weight_gradient"]

FEWEST_ROWS = 16
"""Rows from which a product makes up for bringing the weight into oneDNN's layout."""
LARGEST = 2**23
"""Numbers of a table of tokens up to which a copy in that layout may be made of it."""
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
    """Whether oneDNN has AVX-512 to multiply with, in this build of torch, and multiplies as it should."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        x, weight = torch.arange(16.0).view(2, 8), torch.arange(32.0).view(4, 8)
        with torch.autocast(x.device.type, enabled=False):
            return torch.equal(_product(x, weight), x @ weight.t())
    except (AttributeError, RuntimeError):
        return False


def _product(x: Tensor, weight: Tensor) -> Tensor:
    # of what has gaps oneDNN makes its slowest product
    x, weight = (t if t.is_contiguous() or t.t().is_contiguous() else t.contiguous() for t in (x, weight))
    return packed_product(x, weight)


def packed_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, I] times weight [O, I] transposed, of which the weight may be in a layout of oneDNN's own."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    return result


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, I] times weight [O, I] transposed, [N, O]; for code that has gradients of its own."""
    fits = weight.dtype is torch.float32 and weight.numel() <= LARGEST
    return _product(x, weight) if fits and quick(x) else F.linear(x, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [N, O] transposed times x [N, I], [O, I]."""
    if not (quick(x) and grad.dtype is torch.float32):
        return grad.t() @ x
    if grad.shape[1] <= 2 * PIECE:
        return _product(grad.t(), x.t())
    # many outputs at once take twice the time, and of each factor there is a copy meanwhile
    out = x.new_empty(grad.shape[1], x.shape[1])
    for to, piece in zip(out.split(PIECE), grad.split(PIECE, 1), strict=True):
        to.copy_(_product(piece.t(), x.t()))
    return out


def large_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of x [..., I] and weight [O, I], both of which `quick` and float32 fit."""
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
