"""Causal attention on a processor, compiled: `native/causal.cpp`.

torch's own kernel for processors takes one head and 32 to 512 tokens at a time, converts what is 16 bits wide again and
again and, in float32, multiplies as slowly as MKL does on some processors (see `products`). Here query heads that share
a key/value head are the rows of one matrix, all sequences are worked on at once, whatever their lengths, and nothing of
the size of the scores is kept. Sums, scores and weights are float32 whatever the type of q, k and v.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_palm.native import compiled

__all__ = ["causal_attention", "pays"]

SOURCE = "causal.cpp"
FUNCTIONS = {torch.float32: "attend_float32", torch.bfloat16: "attend_bfloat16"}
WIDTHS = (32, 64, 128, 256)
"""Of heads that it is written for."""


class _Attention(ctypes.Structure):
    """`Attention` of causal.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_void_p) for name in ("out", "log_sums", "grad", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("starts", "lengths")),
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "kv_heads", "threads")),
    ]


def pays(q: Tensor, k: Tensor, dtype: torch.dtype, dropout: float) -> bool:
    """Whether `causal_attention` of q [..., Dh] and k [..., Dh], as a type, can be had, and is quicker than torch's."""
    return (
        q.is_cpu
        and type(q) is Tensor is type(k)  # not of a dry run
        and dtype in FUNCTIONS
        and q.shape[-1] in WIDTHS
        and q.numel() > 0
        and not dropout
        and not torch.compiler.is_compiling()
        and compiled(SOURCE) is not None
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v over the tokens of a sequence up to each query's own.

    Args:
        q: [N, H, Dh], all sequences one after the other.
        k: [N, K, Dh], K a divisor of H.
        v: [N, K, Dh].
        lengths: of the sequences; N in all.

    Returns:
        [N, H, Dh].
    """
    result: Tensor = _Causal.apply(q, k, v, torch.tensor(lengths, dtype=torch.long))
    return result


def _laid_out(x: Tensor) -> Tensor:
    """With heads side by side; there may be gaps between tokens."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _call(q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, lengths: Tensor, *grads: Tensor) -> None:
    starts = lengths.cumsum(0) - lengths
    addresses = dict(zip(("grad", "grad_q", "grad_k", "grad_v"), (t.data_ptr() for t in grads), strict=False))
    given = _Attention(
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(), q_stride=q.stride(0), k_stride=k.stride(0),
        v_stride=v.stride(0), out=out.data_ptr(), log_sums=sums.data_ptr(), starts=starts.data_ptr(),
        lengths=lengths.data_ptr(), sequences=len(lengths), heads=q.shape[1], kv_heads=k.shape[1],
        threads=torch.get_num_threads(), **addresses,
    )  # fmt: skip
    if getattr(compiled(SOURCE), FUNCTIONS[q.dtype])(ctypes.byref(given), ctypes.c_int64(q.shape[2])):
        raise MemoryError(f"there is no memory for the attention of {len(q)} tokens")


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = (_laid_out(t) for t in (q, k, v))
        # types by name: `bf16-true` makes bfloat16 the default
        out, sums = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2], dtype=torch.float32)
        _call(q, k, v, out, sums, lengths)
        ctx.save_for_backward(q, k, v, out, sums, lengths)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums, lengths = ctx.saved_tensors
        grads = [torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v)]
        grad = grad.contiguous()
        _call(q, k, v, out, sums, lengths, grad, *grads)
        return *grads, None
