"""The ratio of new to old probability, at the level each paper takes it, and what is made of it.

Pure functions of [B, T] tensors that are zero outside the completions; a level above the token gives [B, 1], which
broadcasts over a completion's tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_palm.objectives.functional import MAX_EXPONENT

__all__ = [
    "Aggregation",
    "ImportanceLevel",
    "Surrogate",
    "aggregate",
    "clip_shares",
    "importance_ratio",
    "surrogate_loss",
]

Aggregation = Literal["row", "token", "constant"]
ImportanceLevel = Literal["token", "sequence", "sequence_token", "trajectory"]
Surrogate = Literal["clip", "cispo", "spo"]


def importance_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor, level: ImportanceLevel) -> Tensor:
    """New over old probability, [B, T], or [B, 1] for the levels `sequence` and `trajectory`.

    Args:
        logps: with gradient, zero outside the mask.
        old_logps: zero outside the mask.
        mask: completion tokens.
        level: of each token; of the sequence, the geometric mean over its tokens; the same value with the gradient of
            each token (Zheng et al. 2025, equations 7 and 14); of the trajectory, the product over its tokens.
    """
    of_tokens = logps - old_logps
    of_row = of_tokens.sum(1, keepdim=True)
    of_sequence = of_row / mask.sum(1, keepdim=True).clamp(min=1)
    log_ratio = {
        "token": of_tokens,
        "sequence": of_sequence,
        "sequence_token": of_sequence.detach() + (of_tokens - of_tokens.detach()),
        "trajectory": of_row,
    }[level]
    return log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


def surrogate_loss(
    ratio: Tensor,
    advantages: Tensor,
    logps: Tensor,
    kind: Surrogate,
    bounds: tuple[float, float],
    dual_clip: float | None = None,
) -> Tensor:
    """What is minimised at each token, [B, T] or [B, 1].

    Args:
        ratio: of `importance_ratio`.
        advantages: [B, T] or [B, 1].
        logps: for `cispo`, which learns from them rather than from the ratio.
        kind: `clip` (Schulman et al. 2017, equation 7), `cispo` (MiniMax 2025, equation 4), or `spo` (Xie et al. 2024,
            algorithm 1), a parabola whose top is at the upper bound, or the lower one where the advantage is negative.
        bounds: what the ratio is clipped to.
        dual_clip: most that the ratio counts where the advantage is negative (Ye et al. 2020, equation 5).
    """
    clipped = ratio.clamp(*bounds)
    if kind == "cispo":
        return -clipped.detach() * advantages * logps
    if kind == "spo":
        gains = (advantages > 0).to(advantages.dtype)
        width = gains * (bounds[1] - 1) + (1 - gains) * (1 - bounds[0])
        return -ratio * advantages + (ratio - 1).square() * advantages.abs() / (2 * width)
    if dual_clip is not None:
        ratio = torch.where(advantages < 0, ratio.clamp(max=dual_clip), ratio)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clip_shares(
    ratio: Tensor, advantages: Tensor, kind: Surrogate, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Where clipping from below, and from above, takes effect: 1 there and 0 elsewhere."""
    too_low, too_high = ratio < bounds[0], ratio > bounds[1]
    if kind == "clip":  # the pessimistic minimum clips only what would be gained
        too_low, too_high = too_low & (advantages < 0), too_high & (advantages > 0)
    return too_low.to(ratio.dtype), too_high.to(ratio.dtype)


def aggregate(per_token: Tensor, mask: Tensor, aggregation: Aggregation, constant: int | None = None) -> Tensor:
    """The sum over completions of each one's mean over tokens (`row`), sum (`token`), or sum / constant."""
    rows = torch.where(mask, per_token, 0).sum(1)
    if aggregation == "row":
        rows = rows / mask.sum(1).clamp(min=1)
    elif aggregation == "constant":
        assert constant is not None
        rows = rows / constant
    return rows.sum()
