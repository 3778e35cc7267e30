"""One token a row from logits, with its log-probability: `native/draw.cpp` in one pass, or torch's operations.

Both draw the same from the same uniform numbers, save where one of these lies within rounding of the border between two
tokens. What a row gets depends on nothing but the row.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from lit_palm.native import compiled
from lit_palm.rollout.sampling import sample

__all__ = ["draw"]

SOURCE = "draw.cpp"


class _Draw(ctypes.Structure):
    """`Draw` of draw.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "allowed", "uniforms", "tokens", "logps", "norms")),
        *((name, ctypes.c_int64) for name in ("rows", "size", "uniform_stride")),
    ]


def draw(
    logits: Tensor, uniforms: Tensor | None, allowed: Tensor | None = None, chosen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row.

    Args:
        logits: [B, V], of whose softmax log-probabilities are told.
        uniforms: [B] float64 in [0, 1); None: all tokens are chosen.
        allowed: [B, V], from whose softmax tokens are drawn; None: from that of `logits`.
        chosen: [B] long, tokens that are taken instead, negative where one is to be drawn.

    Returns:
        Tokens [B] long, their log-probabilities [B] float32 in nats, and [B, 1] what is subtracted from logits to make
        log-probabilities of them. A row with NaN or +inf has a log-probability that is not finite.
    """
    allowed = logits if allowed is None else allowed
    library = None
    if logits.is_cpu and logits.dtype is torch.float32 and logits.numel():
        library = compiled(SOURCE)
    if library is None:
        return _by_torch(logits, uniforms, allowed, chosen)
    same = allowed is logits
    logits = logits.contiguous()
    allowed = logits if same else allowed.contiguous()
    rows, size = logits.shape
    tokens = torch.full((rows,), -1) if chosen is None else chosen.clone()
    logps, norms = torch.empty(rows, dtype=torch.float32), torch.empty(rows, 1, dtype=torch.float32)
    given = _Draw(
        logits=logits.data_ptr(), allowed=allowed.data_ptr(), tokens=tokens.data_ptr(), logps=logps.data_ptr(),
        norms=norms.data_ptr(), rows=rows, size=size,
    )  # fmt: skip
    if uniforms is not None:
        given.uniforms, given.uniform_stride = uniforms.data_ptr(), uniforms.stride(0)
    library.draw_float32(ctypes.byref(given))
    return tokens, logps, norms


def _by_torch(
    logits: Tensor, uniforms: Tensor | None, allowed: Tensor, chosen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    peak = logits.amax(1, keepdim=True)
    weights = (logits - peak).exp_()
    norm = weights.sum(1, keepdim=True).log()
    if uniforms is None:
        assert chosen is not None
        tokens = chosen
    else:
        tokens = sample(weights if allowed is logits else (allowed - allowed.amax(1, keepdim=True)).exp_(), uniforms)
        if chosen is not None:
            tokens = torch.where(chosen < 0, tokens, chosen)
    logps = ((logits.gather(1, tokens[:, None]) - peak) - norm).squeeze(1)
    return tokens, logps.float(), peak + norm
