"""What a completion is worth beside others: group moments, baselines, soft overlong punishment.

Pure functions of rows in any order, in groups of any size; everything in float64, so that rewards that are equal have a
deviation of exactly 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "EPS",
    "NO_SPREAD",
    "Baseline",
    "Scale",
    "group_moments",
    "overlong_punishment",
    "relative_rewards",
    "reward_metrics",
]

Baseline = Literal["group", "leave_one_out", "batch", "none"]
Scale = Literal["group", "batch", "none"]

EPS = 1e-4
"""Added to a standard deviation before dividing by it, as TRL does."""

NO_SPREAD = 1e-8
"""A group whose rewards deviate by no more than this teaches nothing (TRL's tolerance)."""


def group_moments(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased standard deviation (0 for a single row) and size of each row's group; [N] each.

    Args:
        values: [N], one number a row.
        group: [N] long; the rows of a group may stand anywhere, and groups may differ in size.
    """
    _, index, count = group.unique(return_inverse=True, return_counts=True)

    def total(rows: Tensor) -> Tensor:
        return torch.zeros(len(count), dtype=rows.dtype, device=rows.device).index_add_(0, index, rows)[index]

    size = count[index].to(values.dtype)
    mean = total(values) / size
    variance = total((values - mean).square()) / (size - 1).clamp(min=1)
    return mean, variance.sqrt(), size


def relative_rewards(rewards: Tensor, group: Tensor, baseline: Baseline, scale: Scale) -> Tensor:
    """Rewards [N] less their baseline, over their scale plus EPS.

    Args:
        rewards: [N].
        group: [N] long; with a `group` or `leave_one_out` baseline, or `group` scale, two rows or more each.
        baseline: mean of the group, of the others in it, of all rows, or none.
        scale: standard deviation of the group, of all rows, or none.
    """
    mean, deviation, size = group_moments(rewards, group)
    all_mean, all_deviation, _ = group_moments(rewards, torch.zeros_like(group))
    if baseline == "group":
        rewards = rewards - mean
    elif baseline == "leave_one_out":
        rewards = (rewards - mean) * size / (size - 1)  # which is r - (sum - r) / (size - 1)
    elif baseline == "batch":
        rewards = rewards - all_mean
    if scale == "none":
        return rewards
    return rewards / ((deviation if scale == "group" else all_deviation) + EPS)


def overlong_punishment(length: Tensor, max_length: int, cache: int) -> Tensor:
    """0 up to max_length - cache tokens, then falling by 1 / cache a token, to -1 (Yu et al. 2025, equation 13).

    Args:
        length: [N] tokens of each completion.
        max_length: L_max, the longest completion possible.
        cache: L_cache, over how many last tokens it falls.
    """
    return -((length - (max_length - cache)).double() / cache).clamp(0, 1)


def reward_metrics(scores: Tensor, group: Tensor, optimized: Tensor) -> dict[str, float]:
    """What TensorBoard shows of a collection's rewards; the first three as in TRL.

    Args:
        scores: [N] weighted sums of the rewards.
        group: [N] long.
        optimized: [N] the same less penalties and less the KL that is in the reward.

    Returns:
        `reward`, `reward_std`, `frac_reward_zero_std` (the share of completions whose prompt teaches nothing; not where
        a prompt has only one) and `objective/rlhf_reward`. Nothing of no completions.
    """
    if not len(scores):
        return {}
    _, deviation, size = group_moments(scores, group)
    metrics = {
        "reward": scores.mean().item(),
        "reward_std": scores.std().item() if len(scores) > 1 else 0.0,
        "objective/rlhf_reward": optimized.mean().item(),
    }
    if bool((size > 1).all()):
        metrics["frac_reward_zero_std"] = (deviation <= NO_SPREAD).double().mean().item()
    return metrics
