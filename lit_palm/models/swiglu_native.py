"""`native/swiglu.cpp`: SwiGLU on a processor in one pass over memory, where torch takes two, and five backward."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lit_palm.native import compiled

__all__ = ["swiglu", "swiglu_backward"]

SOURCE = "swiglu.cpp"
FUNCTIONS = {torch.float32: "swiglu_float32", torch.bfloat16: "swiglu_bfloat16"}


class _Swiglu(ctypes.Structure):
    """`Swiglu` of swiglu.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("fused", "hidden", "grad", "grad_fused")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "inner")),
    ]


def _can(fused: Tensor, inner: int) -> bool:
    return (
        fused.is_cpu
        and type(fused) is Tensor
        and fused.dtype in FUNCTIONS
        and fused.is_contiguous()
        and inner % 32 == 0
        and fused.numel() > 0
        and compiled(SOURCE) is not None
    )


def _call(fused: Tensor, inner: int, **tensors: Tensor) -> None:
    width = fused.shape[-1]
    addresses: dict[str, Any] = {name: t.data_ptr() for name, t in tensors.items()}
    given = _Swiglu(fused=fused.data_ptr(), rows=fused.numel() // width, width=width, inner=inner, **addresses)
    getattr(compiled(SOURCE), FUNCTIONS[fused.dtype])(ctypes.byref(given))


def swiglu(fused: Tensor, inner: int) -> Tensor | None:
    """silu(gate) * up of the last 2 * inner of fused [..., D], [..., inner]; None where torch has to do it."""
    if not _can(fused, inner):
        return None
    hidden = fused.new_empty(*fused.shape[:-1], inner)
    _call(fused, inner, hidden=hidden)
    return hidden


def swiglu_backward(fused: Tensor, grad: Tensor, to: Tensor) -> bool:
    """Write the gradient of the last 2 * inner of fused [..., D] into those of `to`; False where torch has to do it.

    Args:
        fused: [..., D].
        grad: [..., inner], of what `swiglu` gives.
        to: like fused.
    """
    inner = grad.shape[-1]
    if not (_can(fused, inner) and to.is_contiguous() and grad.dtype is fused.dtype):
        return False
    _call(fused, inner, grad=grad.contiguous(), grad_fused=to)
    return True
