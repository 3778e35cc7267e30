"""ILQL's loss one token at a time, in plain Python numbers: from Snell et al. 2022 and trlX's `ILQLConfig.loss`.

Written from the formulas alone. trlX keeps, of a sample with n output tokens, the states in which they were chosen and
one more after the last, `dones` n ones and a zero, and a reward at the last output token.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def softmax_loss(scores: list[float], index: int) -> float:
    """-log softmax(scores)[index]."""
    top = max(scores)
    return top + math.log(sum(math.exp(s - top) for s in scores)) - scores[index]


def slow_ilql(
    logits: Tensor, qs: list[Tensor], target_qs: list[Tensor], v: Tensor, tokens: Tensor, mask: Tensor, reward: Tensor,
    *, tau: float, gamma: float, cql_scale: float, awac_scale: float, beta: float,
) -> dict[str, float]:  # fmt: skip
    """Every term summed over the actions of a batch, and their number.

    Args:
        logits: [B, T, V] of the language model; what stands at t speaks about token t + 1, as in all that follows.
        qs: [B, T, V] of each Q head.
        target_qs: [B, T, V] of each target head.
        v: [B, T].
        tokens: [B, T].
        mask: [B, T] bool, output tokens.
        reward: [B].
        tau, gamma, cql_scale, awac_scale, beta: of the method.
    """
    sums: dict[str, Any] = {"q": 0.0, "v": 0.0, "cql": 0.0, "awac": 0.0, "count": 0}
    for b in range(len(tokens)):
        actions = [t for t in range(tokens.shape[1]) if mask[b, t]]
        states = [t - 1 for t in actions]
        for k, (state, t) in enumerate(zip(states, actions, strict=True)):
            action = int(tokens[b, t])
            done = k == len(actions) - 1
            r = float(reward[b]) if done else 0.0
            v_next = 0.0 if done else float(v[b, states[k + 1]])
            goal = r + gamma * v_next
            now = float(v[b, state])
            worth = min(float(q[b, state, action]) for q in target_qs)
            for q in qs:
                sums["q"] += (float(q[b, state, action]) - goal) ** 2
                sums["cql"] += softmax_loss(q[b, state].tolist(), action)
            sums["v"] += (tau if worth >= now else 1 - tau) * (worth - now) ** 2
            sums["awac"] += math.exp(beta * (worth - now)) * softmax_loss(logits[b, state].tolist(), action)
            sums["count"] += 1
    sums["total"] = sums["q"] + sums["v"] + cql_scale * sums["cql"] + awac_scale * sums["awac"]
    return sums
