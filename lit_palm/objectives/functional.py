"""Small pure functions of tensors that objectives share: masked moments, KL estimators, running moments."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.types import Experience, sent

__all__ = [
    "MAX_EXPONENT",
    "IMPORTANCE_CAP",
    "KLEstimator",
    "RunningMoments",
    "importance_metrics",
    "importance_weights",
    "kl_estimate",
    "logistic_loss",
    "masked_mean",
    "masked_whiten",
    "pairs_of_rankings",
    "rows_that_count",
]

KLEstimator = Literal["k1", "k2", "k3"]

MAX_EXPONENT = 20.0
"""Where exponents are clamped: exp of more is of no use to an optimiser, and overflows float16 sums."""


IMPORTANCE_CAP = 2.0
"""What `importance_cap: auto` is where completions come from elsewhere."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is True (any equal shapes); 0 when nothing is."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the True entries of `mask`; zero elsewhere.

    The variance is the unbiased one, as in Huang et al. 2024.
    """
    count = mask.sum()
    mean = masked_mean(values, mask)
    variance = torch.where(mask, (values - mean) ** 2, 0).sum() / (count - 1).clamp(min=1)
    return torch.where(mask, (values - mean) * torch.rsqrt(variance + eps), 0)


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference), in nats, from a token that the policy sampled.

    With d = logps - ref_logps: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman 2020, "Approximating KL
    Divergence"). The exponent is clamped at 20 nats.
    """
    d = logps - ref_logps
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.exp((-d).clamp(max=MAX_EXPONENT)) - 1 + d
    raise ValueError(f"unknown KL estimator {estimator!r}: choose k1, k2 or k3")


def importance_weights(old_logps: Tensor, rollout_logps: Tensor, mask: Tensor, cap: float) -> Tensor:
    """min(p_old / p_rollout, cap) of each token, 1 outside the mask, without gradient.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"): what corrects a policy gradient for completions that came from another distribution than training
    computes, because an engine's kernels differ, or its weights are older.

    Args:
        old_logps: [B, T] of the policy before the update, as training computes them.
        rollout_logps: [B, T] of what sampled, as it reported them.
        mask: [B, T] completion tokens.
        cap: bounds the weight of a single token, and with it the variance.
    """
    log_weight = torch.where(mask, old_logps - rollout_logps, 0).detach()
    return log_weight.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp().clamp(max=cap)


def importance_metrics(old_logps: Tensor, rollout_logps: Tensor, mask: Tensor, cap: float | None) -> dict[str, float]:
    """How far what sampled is from what is trained: `rollout/importance_ratio_{mean,max}` of p_old / p_rollout,
    `rollout/importance_ratio_clipped`, the share of tokens beyond `cap`, and `rollout/logp_gap`, the mean distance in
    nats a token."""
    count = mask.sum().clamp(min=1)
    apart = torch.where(mask, old_logps - rollout_logps, 0)
    ratio = torch.where(mask, apart.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp(), 0)
    found = {
        "rollout/importance_ratio_mean": ratio.sum() / count,
        "rollout/importance_ratio_max": ratio.max(),
        "rollout/logp_gap": apart.abs().sum() / count,
    }
    if cap is not None:
        found["rollout/importance_ratio_clipped"] = (ratio > cap).sum() / count
    return {name: value.item() for name, value in found.items()}


def pairs_of_rankings(experience: Experience) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs (better, worse) within each ranking.

    Args:
        experience: with `group` and `rank` [B]; rows of equal rank in a group form no pair.

    Returns:
        Indices of the better rows [P], of the worse rows [P], and the group of each pair [P].
    """
    group, rank = experience.host["group"], experience.host["rank"]
    better = (group[:, None] == group[None, :]) & (rank[:, None] < rank[None, :])
    i, j = better.nonzero(as_tuple=True)
    i, j, group = (sent(found, experience["group"].device) for found in (i, j, group[i]))
    return i, j, group


def rows_that_count(experience: Experience) -> Tensor:
    """[B] bool: False for a row that only fills a batch up so that all processes have as many (no `loss_mask`)."""
    if "loss_mask" not in experience:
        return torch.ones(experience.num_rows, dtype=torch.bool, device=experience["tokens"].device)
    rows: Tensor = experience["loss_mask"].any(1)
    return rows


def logistic_loss(difference: Tensor) -> Tensor:
    """-log sigmoid(difference), stable for large arguments."""
    return -F.logsigmoid(difference)


class RunningMoments:
    """Count, mean and standard deviation of everything seen so far, in float64 (Chan et al. 1979, parallel update)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.sum_sq = 0.0

    def update(self, values: Tensor) -> None:
        """Add a batch of values (any shape)."""
        values = values.detach().double().flatten()
        n = values.numel()
        if n == 0:
            return
        mean = values.mean().item()
        delta = mean - self.mean
        total = self.count + n
        self.sum_sq += (values - mean).square().sum().item() + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1 when there is nothing to measure it by."""
        if self.count < 2 or self.sum_sq <= 0:
            return 1.0
        return (self.sum_sq / (self.count - 1)) ** 0.5

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"count": self.count, "mean": self.mean, "sum_sq": self.sum_sq}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.count, self.mean, self.sum_sq = int(state["count"]), float(state["mean"]), float(state["sum_sq"])
