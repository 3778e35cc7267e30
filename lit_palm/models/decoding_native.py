"""`native/decoding.cpp` for a block's step: all that lies between its two matrix products, in one pass.

    step = NativeStep.of(dtype, heads, kv_heads, head_dim, inner)    # None where it cannot be had
    between = step.begin(x_BD, rope, bias_BS, start, place)
    out_BI = between(fused_BO, keys, values)                         # attended heads and SwiGLU, side by side

and, where matrices are packed as `products.Panels`, for all blocks in one call:

    whole = WholeStep(step, blocks, norm_D, eps)
    hidden_BD = whole(x_BD, rope, bias_BS, slots, start, place)

What a step passes on are addresses: tensors stay where they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_palm.models.products import Panels
from lit_palm.native import compiled

__all__ = ["NativeStep", "WholeStep"]

SOURCE = "decoding.cpp"
WIDTHS = (32, 64, 128, 256)
"""Of heads that it is written for."""


class _Step(ctypes.Structure):
    """`Step` of decoding.cpp."""

    _fields_ = [
        ("fused", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("rope_stride", ctypes.c_int64),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("bias_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("place", ctypes.c_int64),
    ]


class _Block(ctypes.Structure):
    """`Block` of decoding.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("norm", "entry", "leave", "keys", "values")]


class _Whole(ctypes.Structure):
    """`Whole` of decoding.cpp."""

    _fields_ = [
        ("step", _Step),
        *((name, ctypes.c_void_p) for name in ("x", "hidden", "normed", "fused", "blocks")),
        *((name, ctypes.c_int64) for name in ("num_blocks", "width")),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
    ]


class NativeStep:
    """The step of blocks of one shape.

    Args:
        function: of decoding.cpp.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: width of a head.
        inner: width of the feed-forward.
    """

    def __init__(self, function: Any, heads: int, kv_heads: int, head_dim: int, inner: int) -> None:
        self.function, self.head_dim, self.width = function, head_dim, heads * head_dim + inner
        self.step = {"heads": heads, "kv_heads": kv_heads, "inner": inner}

    @staticmethod
    def of(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, inner: int) -> NativeStep | None:
        """The step for activations of a type on the host; None where it is not written for it or does not compile."""
        names = {torch.float32: "step_float32", torch.bfloat16: "step_bfloat16"}
        if dtype not in names or head_dim not in WIDTHS or inner % 32:
            return None
        library = compiled(SOURCE)
        if library is None:
            return None
        return NativeStep(getattr(library, names[dtype]), heads, kv_heads, head_dim, inner)

    def begin(self, x: Tensor, rope: list[Tensor], bias: Tensor | None, start: int, place: int) -> Any:
        """A function of all blocks of one step, from fused [B, O], keys and values to [B, H * Dh + F].

        Keys and values, both [B or more, K, slots, Dh], take those of this token. What is given back is written anew
        by the next call.

        Args:
            x: [B, D], for type and rows.
            rope: cosines and signed sines, float32 [B or 1, 1, Dh].
            bias: [B, S] added to the scores of the slots from `start` on.
            start: the first slot in use.
            place: the slot of this token, the last one in use.
        """
        out = x.new_empty(len(x), self.width)
        step, kept = self.given(x, rope, bias, start, place, out)
        function, given, head_dim = self.function, ctypes.byref(step), ctypes.c_int64(self.head_dim)

        def run(fused: Tensor, keys: Tensor, values: Tensor, kept: Any = kept) -> Tensor:
            fused = fused.contiguous()
            step.fused, step.keys, step.values = fused.data_ptr(), keys.data_ptr(), values.data_ptr()
            step.row_stride, step.head_stride, _, _ = keys.stride()
            function(given, head_dim)
            return out

        return run

    def given(
        self, x: Tensor, rope: list[Tensor], bias: Tensor | None, start: int, place: int, out: Tensor
    ) -> tuple[_Step, list[Tensor | None]]:
        """The arguments of a step, save what each block has of its own, and the tensors that they are addresses of."""
        cos, sin = (table.float().contiguous() for table in rope)
        bias = None if bias is None else bias.to(x.dtype)
        step = _Step(
            cos=cos.data_ptr(), sin=sin.data_ptr(), rope_stride=self.head_dim if len(cos) > 1 else 0,
            bias=None if bias is None else bias.data_ptr(), bias_stride=0 if bias is None else bias.stride(0),
            out=out.data_ptr(), rows=len(x), start=start, place=place, **self.step,
        )  # fmt: skip
        return step, [cos, sin, bias, out]


class WholeStep:
    """The step of all blocks and of the norm after them.

    Args:
        step: of one block.
        blocks: of each the weight of its norm [D], and its packed matrices [O, D] and [D, H * Dh + F].
        norm: [D], of the norm after them.
        eps: of all norms.
    """

    def __init__(
        self, step: NativeStep, blocks: Sequence[tuple[Tensor, Panels, Panels]], norm: Tensor, eps: float
    ) -> None:
        self.step, self.eps, self.panels = step, eps, [(entry, leave) for _, entry, leave in blocks]
        self.norms = [weight.float().contiguous() for weight in (*(weight for weight, _, _ in blocks), norm)]
        self.product, self.blocks = blocks[0][1].dtype, (_Block * len(blocks))()
        for block, weight, (entry, leave) in zip(self.blocks, self.norms[:-1], self.panels, strict=True):
            block.norm, block.entry, block.leave = weight.data_ptr(), entry.memory.data_ptr(), leave.memory.data_ptr()

    @staticmethod
    def can(width: int, dtype: torch.dtype, panels: Sequence[Panels]) -> bool:
        """Whether it is written for hidden states [B, width] of a type, and matrices that are packed so."""
        types = {panel.dtype for panel in panels}
        return width % 32 == 0 and types in ({dtype}, {torch.bfloat16}) and compiled(SOURCE) is not None

    def __call__(
        self,
        x: Tensor,
        rope: list[Tensor],
        bias: Tensor | None,
        slots: Sequence[tuple[Tensor, Tensor]],
        start: int,
        place: int,
    ) -> Tensor:
        """Hidden states [B, D] of x [B, D], which is written to; `slots` are all blocks' keys and values.

        See `NativeStep.begin`.
        """
        rows, product = len(x), self.product
        out, normed = (x.new_empty(rows, width, dtype=product) for width in (self.step.width, x.shape[1]))
        fused, hidden = x.new_empty(rows, self.panels[0][0].outputs), torch.empty_like(x)
        step, kept = self.step.given(x, rope, bias, start, place, out)
        step.row_stride, step.head_stride, _, _ = slots[0][0].stride()
        blocks = type(self.blocks).from_buffer_copy(self.blocks)  # several threads may decode
        for block, (keys, values) in zip(blocks, slots, strict=True):
            block.keys, block.values = keys.data_ptr(), values.data_ptr()
        whole = _Whole(
            step=step, x=x.data_ptr(), hidden=hidden.data_ptr(), normed=normed.data_ptr(), fused=fused.data_ptr(),
            blocks=ctypes.addressof(blocks), num_blocks=len(blocks), width=x.shape[1],
            norm=self.norms[-1].data_ptr(), eps=self.eps,
        )  # fmt: skip
        names = {torch.float32: "whole_float32", torch.bfloat16: "whole_bfloat16"}
        name = names[product] if product is x.dtype else "whole_mixed"
        getattr(compiled(SOURCE), name)(ctypes.byref(whole), ctypes.c_int64(self.step.head_dim))
        del kept
        return hidden
