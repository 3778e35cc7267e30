"""`native/rope.cpp`: rotary positions on a processor in one pass over memory, where torch takes four."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_palm.native import compiled

__all__ = ["rotates", "rotate_parts"]

SOURCE = "rope.cpp"
FUNCTIONS = {torch.float32: "rope_float32", torch.bfloat16: "rope_bfloat16"}


class _Rope(ctypes.Structure):
    """`Rope` of rope.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("from_", "to", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("from_row", "to_row", "rows", "heads", "head_dim", "tables", "back")),
    ]


def rotates(x: Tensor, cos: Tensor) -> bool:
    """Whether heads x, if [B, T, H, Dh], are to be rotated here, by tables [(B,) T, 1, Dh]."""
    return (
        x.is_cpu
        and x.dim() == 4
        and type(x) is Tensor  # not of a dry run
        and x.dtype in FUNCTIONS
        and cos.dtype is torch.float32
        and x.numel() > 0
        and cos.numel() // x.shape[3] in (x.shape[1], x.shape[0] * x.shape[1])
        and not torch.compiler.is_compiling()
        and compiled(SOURCE) is not None
    )


def rotate_parts(x: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Apply RoPE to heads that `rotates` is true of, and split them.

    Args:
        x: [B, T, H, Dh].
        cos: [(B,) T, 1, Dh], of each dimension.
        sin: the same, with the minus sign of the first half.
        sizes: how many heads there are to be in each part; H in all.

    Returns:
        Parts [B, T, heads, Dh], each in memory of its own.
    """
    return _Rotate.apply(x, cos.contiguous(), sin.contiguous(), sizes)  # type: ignore[no-any-return]


def _rows(x: Tensor) -> Tensor:
    """x [B, T, H, Dh] as [B * T, H, Dh] with heads side by side."""
    flat = x.flatten(0, 1)
    return flat if flat.stride(2) == 1 and flat.stride(1) == flat.shape[2] else flat.contiguous()


def _call(x: Tensor, to: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    given = _Rope(
        from_=x.data_ptr(), to=to.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), from_row=x.stride(0),
        to_row=to.stride(0), rows=x.shape[0], heads=x.shape[1], head_dim=x.shape[2],
        tables=cos.numel() // x.shape[2], back=back,
    )  # fmt: skip
    getattr(compiled(SOURCE), FUNCTIONS[x.dtype])(ctypes.byref(given))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.sizes = x.shape, sizes
        results = [x.new_empty(*x.shape[:2], size, x.shape[3]) for size in sizes]
        for part, to in zip(_rows(x).split(sizes, 1), results, strict=True):
            _call(part, to.flatten(0, 1), cos, sin, back=False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        result = grads[0].new_empty(ctx.shape)
        for grad, to in zip(grads, result.flatten(0, 1).split(ctx.sizes, 1), strict=True):
            _call(_rows(grad), to, cos, sin, back=True)
        return result, None, None, None
