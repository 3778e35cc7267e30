"""Two objectives that match a distribution over a prompt's completions instead of following a policy gradient.

`TPO` says what the policy should give to each of the sampled completions and learns that by cross-entropy. `FlowRL`
makes the policy proportional to exp(reward) times the reference, with the prompt's normaliser learned beside it.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lit_palm import Experience, Loss, Objective, Output
from lit_palm.objectives.base import Kind, Need
from lit_palm.objectives.functional import MAX_EXPONENT, rows_that_count
from lit_palm_grpo.advantages import NO_SPREAD, group_moments, reward_metrics

__all__ = ["TPO", "FlowRL"]


class _Matching(Objective):
    """What both need: several completions a prompt, and their rewards as standard scores within the prompt."""

    kind: ClassVar[Kind] = "policy"
    grouped: ClassVar[bool] = True
    missing_eos_penalty: float

    def num_kept(self, num_prompts: int, completions: int) -> int:
        """All rows.

        Raises:
            ValueError: there is only one completion a prompt.
        """
        if completions < 2:
            raise ValueError(
                f"{type(self).__name__} compares the completions of a prompt, and here a prompt has only one: set "
                "rollout.completions_per_prompt to 2 or more (8 is usual)"
            )
        return num_prompts * completions

    def standard_scores(self, experience: Experience) -> tuple[Tensor, dict[str, float]]:
        """[B] in float64, with mean 0 and deviation 1 within each prompt, 0 where all earn the same; and metrics."""
        counted, group = rows_that_count(experience), experience["group"]
        if bool(counted.any()):
            sizes = group[counted].unique(return_counts=True)[1]
            self.num_kept(len(sizes), int(sizes.min()))
        rewards = experience["scores"].double() - self.missing_eos_penalty * (~experience["ended"]).double()
        mean, deviation, _ = group_moments(rewards[counted], group[counted])
        found = torch.zeros_like(rewards)
        spread = deviation > NO_SPREAD
        found[counted] = torch.where(spread, (rewards[counted] - mean) / deviation.clamp(min=NO_SPREAD), 0)
        metrics = reward_metrics(experience["scores"][counted].double(), group[counted], rewards[counted])
        if "ref_logps" in experience:
            apart = experience["old_logps"] - experience["ref_logps"]
            kl = torch.where(experience["loss_mask"], apart, 0).sum(1)
            metrics["objective/kl"] = kl.sum().item() / max(int(counted.sum()), 1)
        return found, metrics


class TPO(_Matching):
    """Cross-entropy to a target over a prompt's completions: old probability times exp(standard score / eta).

    As palm-rlhf-pytorch's `tpo.py` (arXiv 2604.06159). With s_i the log-probability of completion i of a prompt:

        q = softmax(log softmax(s_old) + z / eta),     loss = -sum_i q_i log softmax(s)_i,   a mean over prompts

    Args:
        eta: temperature of the target; the smaller, the more the best completion gets.
        entropy_coef: reward for the entropy of the policy: the mean over a completion's tokens, then over a prompt's
            completions.
        missing_eos_penalty: subtracted from the reward of a completion that did not end by itself.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(self, eta: float = 1.0, entropy_coef: float = 0.0, missing_eos_penalty: float = 0.0) -> None:
        if not 0 < eta < math.inf:
            raise ValueError(f"eta must be finite and positive, got {eta}; 1.0 is usual")
        for name, value in (("entropy_coef", entropy_coef), ("missing_eos_penalty", missing_eos_penalty)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        self.eta, self.entropy_coef, self.missing_eos_penalty = eta, entropy_coef, missing_eos_penalty

    @property
    def needs(self) -> frozenset[Need]:
        """Samples, what sampled them, and scores."""
        needs: set[Need] = {"rollouts", "old_logps", "reward"}
        return frozenset(needs | {"entropy"} if self.entropy_coef else needs)

    def prepare(self, experience: Experience) -> Experience:
        """Add `targets` [B]: what each completion should have of its prompt's probability; they add up to 1."""
        scores, metrics = self.standard_scores(experience)
        old = torch.where(experience["loss_mask"], experience["old_logps"], 0).sum(1).double()
        counted, group = rows_that_count(experience), experience["group"]
        targets = torch.zeros_like(old)
        aimed = _log_softmax(old[counted], group[counted]) + scores[counted] / self.eta
        targets[counted] = _log_softmax(aimed, group[counted]).exp()
        experience["targets"] = targets.to(experience["scores"].dtype)
        experience["metrics"] = metrics
        return experience

    def weight(self, experience: Experience) -> Tensor:
        """The number of prompts."""
        counted = rows_that_count(experience)
        number = len(experience["group"][counted].unique())
        return torch.tensor(number, device=experience["tokens"].device)

    def loss(self, output: Output, experience: Experience) -> Loss:
        """Summed cross-entropy; metrics `val/ratio` a token, `matching/kl` a prompt."""
        assert output.logps is not None
        mask, group, targets = experience["loss_mask"], experience["group"], experience["targets"]
        logps = torch.where(mask, output.logps, 0)
        counted = rows_that_count(experience)
        now = _log_softmax(logps.sum(1)[counted], group[counted])
        aimed = targets[counted].to(now.dtype)
        total = -(aimed * now).sum()
        if self.entropy_coef:
            assert output.entropy is not None
            _, which, sizes = group[counted].unique(return_inverse=True, return_counts=True)
            of_row = torch.where(mask, output.entropy, 0).sum(1) / mask.sum(1).clamp(min=1)
            total = total - self.entropy_coef * (of_row[counted] / sizes[which]).sum()
        with torch.no_grad():
            old = torch.where(mask, experience["old_logps"], 0)
            ratio = (logps - old).clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
            prompts = self.weight(experience)
            apart = torch.where(aimed > 0, aimed * (aimed.clamp(min=1e-30).log() - now), 0)
            metrics = {
                "val/ratio": (torch.where(mask, ratio, 0).sum(), mask.sum()),
                "matching/kl": (apart.sum(), prompts),
            }
        return Loss(total, metrics)


class FlowRL(_Matching):
    """Match the whole distribution of rewards: the policy becomes the reference times exp(beta * reward), normalised.

    Zhu et al. 2025, "FlowRL: Matching Reward Distributions for LLM Reasoning", equation 6, a squared trajectory balance
    of each completion y of a prompt x:

        w (log Z(x) + (log pi(y|x) - log pi_ref(y|x)) / |y| - beta z)^2,   w = clip(pi / pi_old, 1 - clip, 1 + clip)

    with z the standard score of its reward within the prompt, and w without gradient. log Z is what the value network
    says of the prompt; give it a learning rate of its own with `model.value_lr`.

    Args:
        beta: how much a standard deviation of reward counts, in nats a token.
        clip: bounds of the completion's importance weight.
        missing_eos_penalty: subtracted from the reward of a completion that did not end by itself.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(self, beta: float = 15.0, clip: float = 0.2, missing_eos_penalty: float = 0.0) -> None:
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be finite and positive, got {beta}; 15 is the paper's")
        if not 0 < clip < 1:
            raise ValueError(f"clip must lie between 0 and 1, got {clip}; 0.2 is usual")
        if not 0 <= missing_eos_penalty < math.inf:
            raise ValueError(f"missing_eos_penalty must be finite and not negative, got {missing_eos_penalty}")
        self.beta, self.clip, self.missing_eos_penalty = beta, clip, missing_eos_penalty

    @property
    def needs(self) -> frozenset[Need]:
        """Samples, what sampled them, scores, the reference, and a value network for log Z."""
        return frozenset({"rollouts", "old_logps", "reward", "reference", "value"})

    def prepare(self, experience: Experience) -> Experience:
        """Add `standard_scores` [B]."""
        scores, metrics = self.standard_scores(experience)
        experience["standard_scores"] = scores.to(experience["scores"].dtype)
        experience["metrics"] = metrics
        return experience

    def weight(self, experience: Experience) -> Tensor:
        """The number of completions."""
        return rows_that_count(experience).sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        """Summed squared balance; metrics `matching/*` a completion, `val/ratio` a token."""
        assert output.logps is not None and output.values is not None
        mask, counted = experience["loss_mask"], rows_that_count(experience)
        length = mask.sum(1).clamp(min=1)
        logps = torch.where(mask, output.logps, 0)
        apart = (logps - torch.where(mask, experience["ref_logps"], 0)).sum(1) / length
        first = mask.int().argmax(1)  # the state in which a completion's first token is chosen is its prompt
        values = torch.where(mask, output.values, 0)
        log_z = values.gather(1, first[:, None]).squeeze(1)
        with torch.no_grad():
            by_token = logps - torch.where(mask, experience["old_logps"], 0)
            by_row = by_token.sum(1).clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
            weight = by_row.clamp(1 - self.clip, 1 + self.clip)
        balance = log_z + apart - self.beta * experience["standard_scores"]
        total = torch.where(counted, weight * balance.square(), 0).sum()
        with torch.no_grad():
            ratio = by_token.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
            rows = counted.sum()
            metrics = {"val/ratio": (torch.where(mask, ratio, 0).sum(), mask.sum())}
            found = {"balance": balance.abs(), "log_z": log_z, "weight": weight, "log_ratio": apart}
            for name, of_row in found.items():
                metrics[f"matching/{name}"] = (torch.where(counted, of_row, 0).sum(), rows)
        return Loss(total, metrics)


def _log_softmax(values: Tensor, group: Tensor) -> Tensor:
    """Log softmax of values [N] within each group."""
    _, which, sizes = group.unique(return_inverse=True, return_counts=True)
    top = values.new_full((len(sizes),), -math.inf).scatter_reduce(0, which, values.detach(), "amax")
    total = values.new_zeros(len(sizes)).index_add(0, which, (values - top[which]).exp())
    return values - top[which] - total.log()[which]
