"""Implicit language Q-learning (Snell et al. 2022, "Offline RL for Natural Language Generation with Implicit Language
Q Learning"), with trlX's choices: one reward a completion, at its last token, and one network for everything.

lit-palm fit --config plugins/lit-palm-ilql/configs/ilql.yaml --model.objective.tau=0.8
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lit_palm import Experience, Loss, Objective, Output
from lit_palm.objectives.base import Kind
from lit_palm.objectives.functional import MAX_EXPONENT, rows_that_count

__all__ = ["ILQL"]


class ILQL(Objective):
    """Learn from given completions what each token is worth, without sampling any; needs an `ILQLConfig` as network.

    With a_t the token at t and h_t the state it was chosen in, summed over the tokens of completions:

        Q   sum_i (Q_i(h_t, a_t) - r_t - gamma V(h_t+1))^2                  V of the state after the last token is 0
        V   |tau - 1(min_i Q'_i(h_t, a_t) < V(h_t))| (min_i Q'_i - V)^2     an expectile: near 1 it is the maximum
        CQL -sum_i log softmax(Q_i)(a_t)                                    what was never seen is worth less
        AWAC -exp(beta A) log pi(a_t), A = min_i Q'_i - V                   the language model; beta 0 imitates

    The reward of a completion is its `rating`; of data with `label`, 1 or -1; of pairs and rankings, from 1 for the
    best to -1 for the worst. It is given with the last token.

    Args:
        tau: of the expectile.
        gamma: discount of what comes later.
        cql_scale: weight of the CQL term.
        awac_scale: weight of the language model's term.
        beta: how much more tokens of higher advantage are imitated.
        two_qs: the network has two Q heads.
        reward_mean: subtracted from every rating; the mean of the data is usual.
        reward_std: ratings are divided by it, after that; the standard deviation of the data is usual.

    Raises:
        ValueError: an argument is out of its range.
    """

    API_VERSION: ClassVar[int] = 1
    kind: ClassVar[Kind] = "policy"
    grouped: ClassVar[bool] = True
    """A rank counts within its ranking."""

    def __init__(
        self,
        tau: float = 0.7,
        gamma: float = 0.99,
        cql_scale: float = 0.1,
        awac_scale: float = 1.0,
        beta: float = 0.0,
        two_qs: bool = True,
        reward_mean: float = 0.0,
        reward_std: float = 1.0,
    ) -> None:
        if not 0 < tau < 1:
            raise ValueError(f"tau must lie between 0 and 1, got {tau}; 0.7 is usual")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], got {gamma}; 0.99 is usual")
        for name, value in (("cql_scale", cql_scale), ("awac_scale", awac_scale), ("beta", beta)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if not math.isfinite(reward_mean):
            raise ValueError(f"reward_mean must be a finite number, got {reward_mean}")
        if not 0 < reward_std < math.inf:
            raise ValueError(f"reward_std must be finite and positive, got {reward_std}")
        self.tau, self.gamma, self.beta, self.two_qs = tau, gamma, beta, two_qs
        self.cql_scale, self.awac_scale = cql_scale, awac_scale
        self.reward_mean, self.reward_std = reward_mean, reward_std

    @property
    def numbers(self) -> range:
        """Of the Q heads."""
        return range(1, 3 if self.two_qs else 2)

    @property
    def extras(self) -> frozenset[str]:
        """What an `ILQLConfig` with as many Q heads gives."""
        kinds = ("q", "target_q", "q_log_z")
        return frozenset({"v", *(f"{kind}_{i}" for i in self.numbers for kind in kinds)})

    def rewards(self, experience: Experience) -> Tensor:
        """What each completion is worth: [B].

        Raises:
            ValueError: the data says nothing about it.
        """
        if "rating" in experience:
            ratings: Tensor = experience["rating"]
            return (ratings - self.reward_mean) / self.reward_std
        if "label" in experience:
            labels: Tensor = experience["label"]
            return 2.0 * labels - 1
        if "rank" not in experience:
            raise ValueError(
                "ILQL learns from completions with a rating, a label or a rank, and this data has none: use "
                "PreferenceData, for example with rows of prompt, completion and rating"
            )
        rank, group = experience["rank"], experience["group"]
        _, which = group.unique(return_inverse=True)
        worst = torch.zeros_like(rank).scatter_reduce(0, which, rank, "amax")[which]  # ranks count from 0
        return torch.where(worst > 0, 1 - 2.0 * rank / worst.clamp(min=1), 0.0)

    def weight(self, experience: Experience) -> Tensor:
        """The number of completion tokens."""
        mask: Tensor = experience["loss_mask"]
        return mask.sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        """The four terms, summed; metrics `losses/*`, `values/*` and `awac_weight` a token, `reward` a completion."""
        assert output.logps is not None and output.extra is not None
        mask, extra = experience["loss_mask"], output.extra
        count = mask.sum()
        v = torch.where(mask, extra["v"], 0)
        q = [torch.where(mask, extra[f"q_{i}"], 0) for i in self.numbers]
        target_q = torch.stack([torch.where(mask, extra[f"target_q_{i}"].detach(), 0) for i in self.numbers]).amin(0)
        rewards = self.rewards(experience).to(v.dtype)

        # the state after a token is the one in which the next one of a completion is chosen, be it turns later
        last, following = _successors(mask)
        v_next = torch.where(mask & ~last, v.detach().gather(1, following), 0)
        goal = torch.where(last, rewards[:, None], 0) + self.gamma * v_next
        q_loss = torch.stack([torch.where(mask, q_i - goal, 0).square().sum() for q_i in q]).sum()

        advantage = target_q - v
        side = (self.tau - (advantage < 0).to(advantage.dtype)).abs()
        v_loss = (side * advantage.square()).sum()

        cql = torch.stack(
            [torch.where(mask, extra[f"q_log_z_{i}"] - q_i, 0).sum() for i, q_i in zip(self.numbers, q, strict=True)]
        ).sum()
        factor = (self.beta * advantage.detach()).clamp(max=MAX_EXPONENT).exp()
        awac = -torch.where(mask, output.logps * factor, 0).sum()

        total = q_loss + v_loss + self.cql_scale * cql + self.awac_scale * awac
        with torch.no_grad():
            counts = rows_that_count(experience)
            metrics = {
                "losses/q": (q_loss, count),
                "losses/v": (v_loss, count),
                "losses/cql": (cql, count),
                "losses/awac": (awac, count),
                "nll": (-torch.where(mask, output.logps, 0).sum(), count),
                "values/v": (v.sum(), count),
                "values/q": (torch.stack(q).amin(0).sum(), count),
                "values/target_q": (target_q.sum(), count),
                "values/advantage": (advantage.sum(), count),
                "awac_weight": (torch.where(mask, factor, 0).sum(), count),
                "reward": (torch.where(counts, rewards, 0).sum(), counts.sum()),
            }
        return Loss(total, {name: (value.detach(), n) for name, (value, n) in metrics.items()})


def _successors(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which token is a row's last that counts [B, T] bool, and where after each the next one stands [B, T] long."""
    width = mask.shape[1]
    place = torch.arange(width, device=mask.device).expand_as(mask)
    here = torch.where(mask, place, width)
    # the first place from each one on, then that of the one after
    onwards = here.flip(1).cummin(1).values.flip(1)
    following = torch.cat([onwards[:, 1:], torch.full_like(onwards[:, :1], width)], 1)
    return mask & (following == width), following.clamp(max=width - 1)
