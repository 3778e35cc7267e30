"""GRPO and its relatives as their papers state them: loops over prompts, completions and tokens, nothing vectorised.

Nothing here is imported from lit_palm_grpo. A completion is a `Row`: its own tokens' log-probabilities as scalars (new
ones record gradients), its reward and its prompt. Each function gives the loss that is minimised, already averaged.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Row", "cispo", "dapo", "dr_grpo", "grpo", "gspo", "overlong", "reinforce_plus_plus", "rloo"]

EPS = 1e-4
"""What TRL adds to a standard deviation; the papers divide by the deviation itself."""


@dataclass
class Row:
    """One completion: lists with one float64 scalar a token, its reward, and the number of its prompt."""

    new: list[Tensor]
    old: list[Tensor]
    ref: list[Tensor]
    reward: float
    prompt: int

    @property
    def length(self) -> int:
        return len(self.new)


def rewards_of_prompt(rows: Sequence[Row], row: Row) -> list[float]:
    return [other.reward for other in rows if other.prompt == row.prompt]


def group_relative(rows: Sequence[Row]) -> list[float]:
    """Shao et al. 2024, section 4.1.2: (r - mean) / std within a prompt; the deviation is the unbiased one."""
    found = []
    for row in rows:
        rewards = rewards_of_prompt(rows, row)
        found.append((row.reward - statistics.mean(rewards)) / (statistics.stdev(rewards) + EPS))
    return found


def clipped(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    """min(ratio A, clip(ratio, 1 - low, 1 + high) A)."""
    plain = ratio * advantage
    if advantage > 0 and ratio.item() > 1 + high:
        return torch.tensor((1 + high) * advantage, dtype=torch.float64)
    if advantage < 0 and ratio.item() < 1 - low:
        return torch.tensor((1 - low) * advantage, dtype=torch.float64)
    return plain


def kl3(new: Tensor, ref: Tensor) -> Tensor:
    """Shao et al. 2024, equation 4: pi_ref / pi - log(pi_ref / pi) - 1."""
    return torch.exp(ref - new) - (ref - new) - 1


def grpo(rows: Sequence[Row], epsilon: float = 0.2, beta: float = 0.04) -> Tensor:
    """Shao et al. 2024, equation 3, the mean over completions of the mean over each one's tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for row, advantage in zip(rows, group_relative(rows), strict=True):
        for new, old, ref in zip(row.new, row.old, row.ref, strict=True):
            gain = clipped(torch.exp(new - old), advantage, epsilon, epsilon) - beta * kl3(new, ref)
            total = total - gain / row.length
    return total / len(rows)


def dr_grpo(rows: Sequence[Row], longest: int, epsilon: float = 0.2) -> Tensor:
    """Liu et al. 2025: r - mean, and the sum over tokens divided by a constant."""
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        advantage = row.reward - statistics.mean(rewards_of_prompt(rows, row))
        for new, old in zip(row.new, row.old, strict=True):
            total = total - clipped(torch.exp(new - old), advantage, epsilon, epsilon) / longest
    return total / len(rows)


def leave_one_out(rows: Sequence[Row], beta: float) -> list[float]:
    """Ahmadian et al. 2024: R(y) = r - beta log(pi / pi_ref), less the mean R of the other completions."""
    returns = [row.reward - beta * sum((o - r).item() for o, r in zip(row.old, row.ref, strict=True)) for row in rows]
    found = []
    for i, row in enumerate(rows):
        others = [returns[j] for j, other in enumerate(rows) if other.prompt == row.prompt and j != i]
        found.append(returns[i] - statistics.mean(others))
    return found


def rloo(rows: Sequence[Row], beta: float = 0.05, epsilon: float = 0.2) -> Tensor:
    """RLOO with the whole completion as one action, its probability the product over tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for row, advantage in zip(rows, leave_one_out(rows, beta), strict=True):
        log_ratio = torch.zeros((), dtype=torch.float64)
        for new, old in zip(row.new, row.old, strict=True):
            log_ratio = log_ratio + new - old
        total = total - clipped(torch.exp(log_ratio), advantage, epsilon, epsilon)
    return total / len(rows)


def reinforce_plus_plus(rows: Sequence[Row], beta: float = 0.01, epsilon: float = 0.2) -> Tensor:
    """Hu et al. 2025: A_t = r - beta sum_{i >= t} KL(i), normalised over all tokens, in PPO's clipped surrogate."""
    advantages = []
    for row in rows:
        kl = [(old - ref).item() for old, ref in zip(row.old, row.ref, strict=True)]
        advantages.append([row.reward - beta * sum(kl[t:]) for t in range(row.length)])
    everything = [a for of_row in advantages for a in of_row]
    mean, deviation = statistics.mean(everything), (statistics.variance(everything) + 1e-8) ** 0.5
    total = torch.zeros((), dtype=torch.float64)
    for row, of_row in zip(rows, advantages, strict=True):
        for new, old, advantage in zip(row.new, row.old, of_row, strict=True):
            total = total - clipped(torch.exp(new - old), (advantage - mean) / deviation, epsilon, epsilon)
    return total / len(everything)


def overlong(length: int, longest: int, cache: int) -> float:
    """Yu et al. 2025, equation 13."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


def dapo(rows: Sequence[Row], low: float = 0.2, high: float = 0.28) -> Tensor:
    """Yu et al. 2025, equation 8, over all tokens; prompts whose rewards are all equal are to be left out before."""
    total = torch.zeros((), dtype=torch.float64)
    for row, advantage in zip(rows, group_relative(rows), strict=True):
        for new, old in zip(row.new, row.old, strict=True):
            total = total - clipped(torch.exp(new - old), advantage, low, high)
    return total / sum(row.length for row in rows)


def gspo(rows: Sequence[Row], low: float = 3e-4, high: float = 4e-4, of_tokens: bool = False) -> Tensor:
    """Zheng et al. 2025, equation 5; with `of_tokens` GSPO-token, equations 13 and 14."""
    total = torch.zeros((), dtype=torch.float64)
    for row, advantage in zip(rows, group_relative(rows), strict=True):
        log_ratio = sum((n - o for n, o in zip(row.new, row.old, strict=True)), torch.zeros((), dtype=torch.float64))
        ratio = torch.exp(log_ratio / row.length)
        if not of_tokens:
            total = total - clipped(ratio, advantage, low, high)
            continue
        for new in row.new:
            of_token = ratio.detach() * torch.exp(new) / torch.exp(new).detach()
            total = total - clipped(of_token, advantage, low, high) / row.length
    return total / len(rows)


def cispo(rows: Sequence[Row], high: float = 4.0) -> Tensor:
    """MiniMax 2025, equations 4 and 5: sg(min(ratio, 1 + high)) A log pi, over all tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for row, advantage in zip(rows, group_relative(rows), strict=True):
        for new, old in zip(row.new, row.old, strict=True):
            weight = min(torch.exp(new - old).item(), 1 + high)
            total = total - weight * advantage * new
    return total / sum(row.length for row in rows)
