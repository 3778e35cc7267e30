"""`native/draw.cpp`: tokens drawn from logits on a processor, with their log-probabilities, in one pass.

It draws what `sampling.sample` draws from the same uniform numbers, save where one of them lies within rounding of the
border between two tokens.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lit_palm.native import compiled

__all__ = ["draw"]

SOURCE = "draw.cpp"


class _Draw(ctypes.Structure):
    """`Draw` of draw.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "uniforms", "tokens", "logps", "norms")),
        *((name, ctypes.c_int64) for name in ("rows", "size", "uniform_stride")),
    ]


def draw(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Draw one token a row from softmax(logits).

    Args:
        logits: [B, V].
        uniforms: [B] float64 in [0, 1).

    Returns:
        Tokens [B] long, their log-probabilities [B] float32 in nats, and [B, 1] float32 what is subtracted from logits
        to make log-probabilities of them; numbers that are not finite make a log-probability that is none. None where
        torch has to do it.
    """
    if not (logits.is_cpu and logits.dtype is torch.float32 and logits.numel() and logits.is_contiguous()):
        return None
    library = compiled(SOURCE)
    if library is None:
        return None
    rows, size = logits.shape
    tokens = torch.empty(rows, dtype=torch.long)
    logps, norms = torch.empty(rows, dtype=torch.float32), torch.empty(rows, 1, dtype=torch.float32)
    given = _Draw(
        logits=logits.data_ptr(), uniforms=uniforms.data_ptr(), tokens=tokens.data_ptr(), logps=logps.data_ptr(),
        norms=norms.data_ptr(), rows=rows, size=size, uniform_stride=uniforms.stride(0),
    )  # fmt: skip
    library.draw_float32(ctypes.byref(given))
    return tokens, logps, norms
