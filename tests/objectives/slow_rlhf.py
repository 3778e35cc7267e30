"""The equations of PPO and reward learning, token by token in Python floats: what the objectives are compared with.

Nothing here is vectorised, masked or in place, and nothing is imported from lit_palm: a completion is a list of its own
tokens. The sources are the papers named at each function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, equation 16: A_t = sum_l (gamma lam)^l delta_{t+l}, with V = 0 after the last token."""
    following = [*values[1:], 0.0]
    delta = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


KL: dict[str, Callable[[float], float]] = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
}
"""Schulman 2020, of d = log pi - log pi_ref."""


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def unbiased_variance(values: Sequence[float]) -> float:
    center = mean(values)
    return math.fsum((v - center) ** 2 for v in values) / (len(values) - 1)


def shaped_scores(
    scores: Sequence[float],
    ended: Sequence[bool],
    *,
    all_scores: Sequence[float] = (),
    center: bool = False,
    clip: float | None = None,
    missing_eos_penalty: float = 0.0,
) -> list[float]:
    """Divided by the deviation of `all_scores` when there are any, centred, clipped, then charged for a missing EOS."""
    shift = mean(all_scores) if center else 0.0
    scale = math.sqrt(unbiased_variance(all_scores)) if all_scores else 1.0
    shaped = [(s - shift) / scale for s in scores]
    if clip is not None:
        shaped = [min(max(s, -clip), clip) for s in shaped]
    return [s - (0.0 if e else missing_eos_penalty) for s, e in zip(shaped, ended, strict=True)]


def prepare(
    rows: Sequence[dict[str, list[float]]],
    scores: Sequence[float],
    *,
    beta: float,
    estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns of each row's tokens: r_t = -beta KL_t + [t = last] score, returns = A + V, A whitened.

    Args:
        rows: lists `old`, `ref` and `values` of one completion's tokens.
        scores: shaped, one a row.
        beta: price of a nat in the reward; 0 when the divergence is in the loss.
    """
    advantages, returns = [], []
    for row, score in zip(rows, scores, strict=True):
        rewards = [-beta * KL[estimator](old - ref) for old, ref in zip(row["old"], row["ref"], strict=True)]
        rewards[-1] += score
        raw = gae(rewards, row["values"], gamma, lam)
        advantages.append(raw)
        returns.append([a + v for a, v in zip(raw, row["values"], strict=True)])
    if whiten:
        every = [a for row in advantages for a in row]
        center, scale = mean(every), math.sqrt(unbiased_variance(every) + 1e-8)
        advantages = [[(a - center) / scale for a in row] for row in advantages]
    return advantages, returns


def token_loss(
    *,
    new: float,
    old: float,
    advantage: float,
    value: float,
    old_value: float,
    target: float,
    clip: float = 0.2,
    dual_clip: float | None = None,
    value_clip: float | None = 0.2,
) -> dict[str, float]:
    """One token. Schulman et al. 2017, equation 7; Ye et al. 2020, equation 5; value clipping as in OpenAI's code."""
    ratio = math.exp(new - old)
    objective = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
    was_clipped = objective < ratio * advantage
    if dual_clip is not None and advantage < 0:
        objective = max(objective, dual_clip * advantage)
    error = (value - target) ** 2
    near = value
    if value_clip is not None:
        near = min(max(value, old_value - value_clip), old_value + value_clip)
    return {
        "policy": -objective,
        "clipped": float(was_clipped),
        "value": max(error, (near - target) ** 2) / 2,
        "value_clipped": float((near - target) ** 2 > error),
        "ratio": ratio,
        "approxkl": (new - old) ** 2 / 2,
    }


def ranking_loss(
    scores: Sequence[float],
    ranks: Sequence[int],
    margins: Sequence[float] | None = None,
    centering: float = 0.0,
) -> float | None:
    """Ouyang et al. 2022, equation 1, of one prompt: the mean over its pairs; None when all answers are tied."""
    losses = []
    for i, j in combinations(range(len(scores)), 2):
        if ranks[i] == ranks[j]:
            continue
        better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
        gap = scores[better] - scores[worse] - (margins[better] if margins else 0.0)
        losses.append(math.log1p(math.exp(-gap)) + centering * (scores[better] + scores[worse]) ** 2)
    return mean(losses) if losses else None


def as_rows(experience: dict[str, Any], **names: str) -> list[dict[str, list[float]]]:
    """The completion tokens of each row as lists: as_rows(e, old="old_logps") -> [{"old": [...]}, ...]."""
    rows = []
    found = {short: experience[name].detach() for short, name in names.items()}
    for b, mask in enumerate(experience["loss_mask"].tolist()):
        picked = [t for t, counts in enumerate(mask) if counts]
        rows.append({short: [values[b, t].item() for t in picked] for short, values in found.items()})
    return rows
