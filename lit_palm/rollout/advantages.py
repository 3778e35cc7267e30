"""Advantages of sampled completions: generalised advantage estimation over ragged rows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["generalized_advantages"]


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).

        delta_t = r_t + gamma * V_{t+1} - V_t,    A_t = delta_t + gamma * lam * A_{t+1},    return_t = A_t + V_t

    The completion of a row is the run of True in its mask; the state after its last token has value 0, since a
    completion always ends the episode.

    Args:
        rewards: [B, T] reward of each token.
        values: [B, T] value of the state in which the token was chosen.
        mask: [B, T] bool, completion tokens.
        gamma: discount.
        lam: 0 trusts the values, 1 the sampled rewards.

    Returns:
        Advantages and returns, [B, T] each, zero outside the mask.
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # outside the mask everything is zero, so `following` starts at zero at a row's last token
        following = torch.where(mask[:, t], delta + gamma * lam * following, 0)
        advantages[:, t] = following
    return advantages, torch.where(mask, advantages + values, 0)
