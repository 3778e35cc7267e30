"""`native/products.cpp`: matrix products on a processor with AVX-512, forward and backward.

torch gives float32 products to MKL, which takes up to twice the time on processors that it was not made for, and those
of bfloat16 numbers to oneDNN, which packs the factors again and again. Measured on two cores of a Zen 4 for the layers
of a network of 30M on 7,680 tokens, as shares of the fastest product that there is: bfloat16 .97 forward, .98 for the
input's gradient and .93 for the weight's, torch's own .93, .93 and .80; float32 .98, .98, .92 against .82, .83, .84.

The float32 weights of a bf16-mixed run are rounded while they are packed, and get gradients that are not rounded at
all. Sums are float32. Which products are taken depends on the processor and on shapes alone, and a row's results on
nothing but the row, so that runs repeat.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_palm.native import capabilities, compiled, processor

__all__ = ["Panels", "large_linear", "multiply", "native", "product", "quick", "weight_gradient"]

SOURCE = "products.cpp"
FUNCTIONS = {torch.float32: "product_float32", torch.bfloat16: "product_bfloat16"}
PACKING = {torch.float32: "pack_float32", torch.bfloat16: "pack_bfloat16"}
COLUMNS = 64
"""Of a packed panel."""
FEWEST_ROWS = 8
"""Rows from which it was quicker, forward and backward together, in what was measured, 8 to 7,680."""
MANY_ROWS, CACHED = 256, 2**22
"""Rows from which weights of more numbers than these are multiplied here in bfloat16: up to 128 it was slower."""
NARROWEST = 32
"""Inputs and outputs of a layer, below which a tile of 64 columns is mostly empty."""


class _Product(ctypes.Structure):
    """`Product` of products.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "c", "add")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "a_row", "b_row", "c_row")),
        *((name, ctypes.c_int64) for name in ("a_turned", "b_turned", "b_wide", "c_wide", "b_packed")),
    ]


@cache
def _able(dtype: torch.dtype) -> bool:
    able = {torch.float32: ("AVX512", "AVX512_BF16"), torch.bfloat16: ("AVX512_BF16",)}.get(dtype, ())
    # matrix instructions, which oneDNN uses, are several times as quick again
    tiles = dtype is torch.bfloat16 and capabilities().get("amx_bf16", False)
    return processor() in able and not tiles


def native(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies numbers of a type so, and there is a compiler."""
    return _able(dtype) and compiled(SOURCE) is not None


def _large(dtype: torch.dtype, rows: int, x: Tensor, other: Tensor) -> bool:
    """Whether two factors, of some rows or of some columns each, are multiplied here."""
    return (
        dtype in FUNCTIONS
        and all(type(t) is Tensor or type(t) is nn.Parameter for t in (x, other))  # not of a mesh, nor of a dry run
        and x.is_cpu
        and rows >= FEWEST_ROWS
        and min(x.shape[-1], *other.shape) >= NARROWEST
        and not torch.compiler.is_compiling()  # which knows the products of torch
        and native(dtype)
    )


def quick(x: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the product in `dtype` of x [..., I] and weight [O, I] transposed, and its gradients, are made here."""
    rows = x.shape[:-1].numel()
    if dtype is not torch.float32:  # two of 16 bits are one unit; of a weight beyond the cache packing is all the work
        pairs = all(width % 2 == 0 for width in weight.shape)
        if not (pairs and (rows >= MANY_ROWS or weight.numel() <= CACHED)):
            return False
    return weight.dtype in (dtype, torch.float32) and _large(dtype, rows, x, weight)


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a [M, K] @ b [K, N] in `dtype`."""
    a_turned, b_turned = (t.stride(1) != 1 and t.stride(0) == 1 for t in (a, b))
    a_turned &= dtype is torch.float32  # parts of its sum are added up where they are to go
    assert a.dtype is b.dtype or not a_turned, "what is summed over rows of memory is of one type"
    # units are read from rows without gaps, and begin with every second number
    pairs = a.dtype is torch.float32 or (a.stride(0) % 2 == 0 and a.data_ptr() % 4 == 0)
    if not a_turned and not (a.stride(1) == 1 and pairs):
        a = a.clone(memory_format=torch.contiguous_format)
    if not b_turned and b.stride(1) != 1:
        b = b.contiguous()
    c = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    given = _Product(
        a=a.data_ptr(), b=b.data_ptr(), c=c.data_ptr(), m=a.shape[0], n=b.shape[1], k=a.shape[1],
        a_row=a.stride(int(a_turned)), b_row=b.stride(int(b_turned)), c_row=c.shape[1],
        a_turned=a_turned, b_turned=b_turned, b_wide=b.dtype is not a.dtype, c_wide=dtype is torch.float32,
    )  # fmt: skip
    if getattr(compiled(SOURCE), FUNCTIONS[a.dtype])(ctypes.byref(given)):
        raise MemoryError(f"there is no memory to multiply {list(a.shape)} numbers with {list(b.shape)}")
    return c


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, I] times weight [O, I] transposed, [N, O]; for code that has gradients of its own."""
    if weight.dtype is x.dtype and quick(x, weight, x.dtype):
        return multiply(x, weight.t(), x.dtype)
    return F.linear(x, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [N, O] transposed times x [N, I]: [O, I], of their type or in float32."""
    if grad.dtype is x.dtype and _large(x.dtype, len(x), x, grad):
        return multiply(grad.contiguous().t(), x, torch.float32)
    return grad.t() @ x


class Panels:
    """A weight that is packed once for many products, of as few rows as one.

    Args:
        weight: [O, I] of `dtype`, or in float32; copied.
        dtype: of the products, of which `native` is true; of bfloat16 I is even.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        (outputs, inputs), per = weight.shape, 4 // dtype.itemsize
        size = -(-outputs // COLUMNS), inputs // per, COLUMNS
        self.outputs, self.dtype = outputs, dtype
        self.memory = torch.empty(size, dtype=torch.float32)
        weight = weight.contiguous()
        packing = _Product(
            b=weight.data_ptr(), c=self.memory.data_ptr(), n=outputs, k=inputs, b_row=inputs, b_turned=True,
            b_wide=weight.dtype is not dtype,
        )  # fmt: skip
        getattr(compiled(SOURCE), PACKING[dtype])(ctypes.byref(packing))
        self.function = getattr(compiled(SOURCE), FUNCTIONS[dtype])
        self.given = _Product(
            b=self.memory.data_ptr(), n=outputs, k=inputs, a_row=inputs, c_row=outputs, b_packed=True
        )  # fmt: skip

    def product(self, x: Tensor, residual: Tensor | None = None, columns: tuple[int, int] | None = None) -> Tensor:
        """x [N, I], of the weight's type or in float32, times the weight transposed, and a residual [N, O] added to it.

        Args:
            x: rows.
            residual: of x's type.
            columns: the first of O and the one after the last that are wanted; None: all.

        Returns:
            [N, O] of x's type.
        """
        first, last = columns or (0, self.outputs)
        start = first // COLUMNS  # in panels
        result = x.new_empty(len(x), last - start * COLUMNS)
        given = _Product.from_buffer_copy(self.given)  # several threads may decode
        given.c_wide = x.dtype is torch.float32
        x = x.to(self.dtype).contiguous()
        residual = None if residual is None else residual.contiguous()
        given.a, given.m, given.c = x.data_ptr(), len(x), result.data_ptr()
        given.b, given.n, given.c_row = self.memory[start].data_ptr(), result.shape[1], result.shape[1]
        given.add = None if residual is None else residual.data_ptr()
        self.function(ctypes.byref(given))
        return result[:, first - start * COLUMNS :]


def large_linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`F.linear` of x [..., I] and weight [O, I] in a type, of all of which `quick` is true."""
    # cast out here, where autograd casts back
    result: Tensor = _Linear.apply(x.to(dtype).reshape(-1, x.shape[-1]), weight)
    return result.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    """x [N, I], weight [O, I] of its type or in float32 -> [N, O]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return multiply(x, weight.t(), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()  # it may be one number for all
        grad_x = multiply(grad, weight, x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        return grad_x, multiply(grad.t(), x, torch.float32).to(weight.dtype)
