"""Learning a reward from people: pairs, whole rankings, and ratings."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.objectives.base import Kind, Objective
from lit_palm.objectives.functional import logistic_loss, pairs_of_rankings, rows_that_count
from lit_palm.types import Experience, Loss, Output, sent


def score_metrics(scores: Tensor, counted: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """`{min,mean,max}_reward` of the scores [B] where `counted` [B] is True."""
    scores, count = scores.detach(), counted.sum()
    one = count.clamp(max=1)  # 0 when there is nothing to speak of
    low = torch.where(counted, scores, torch.inf).amin().where(one > 0, 0)
    high = torch.where(counted, scores, -torch.inf).amax().where(one > 0, 0)
    total = torch.where(counted, scores, 0).sum()
    return {"min_reward": (low, one), "mean_reward": (total, count), "max_reward": (high, one)}


class RewardRanking(Objective):
    """Bradley-Terry on pairs and rankings: -log sigmoid(r_better - r_worse).

    A ranking of K answers to one prompt is one element: the mean over its K-choose-2 pairs, all answers in one
    micro-batch, so that no answer is passed through the network K - 1 times (Ouyang et al. 2022, equation 1).
    Ties form no pair.

    Args:
        margin: subtract the row's `margin` (by how much people preferred the better answer) inside the sigmoid
            (Touvron et al. 2023, section 3.2.2).
        centering: coefficient of (r_better + r_worse)^2, which keeps scores around zero (Eisenstein et al. 2023).
    """

    kind: ClassVar[Kind] = "reward"
    grouped: ClassVar[bool] = True

    def __init__(self, margin: bool = False, centering: float = 0.0) -> None:
        if centering < 0:
            raise ValueError(f"centering must not be negative, got {centering}")
        self.margin = margin
        self.centering = centering

    def weight(self, experience: Experience) -> Tensor:
        """The number of rankings with at least one pair."""
        _, _, group = pairs_of_rankings(experience.host)
        return torch.full((), len(group.unique()), device=experience["group"].device)

    def loss(self, output: Output, experience: Experience) -> Loss:
        """Summed over rankings; metrics `accuracy`, `margin` (per pair) and `{min,mean,max}_reward`."""
        scores = output.scores
        assert scores is not None
        better, worse, group = pairs_of_rankings(experience.host)
        _, inverse, size = group.unique(return_inverse=True, return_counts=True)
        better, worse, share = (sent(found, scores.device) for found in (better, worse, size[inverse]))
        difference = scores[better] - scores[worse]
        target = difference
        if self.margin:
            if "margin" not in experience:
                raise ValueError("objective RewardRanking(margin=True) needs a `margin` column in the preference data")
            target = difference - experience["margin"][better]
        per_pair = logistic_loss(target)
        if self.centering:
            per_pair = per_pair + self.centering * (scores[better] + scores[worse]).square()
        total = (per_pair / share).sum()  # over no pair at all it is 0, and still has a graph
        pairs = torch.full((), len(better), device=scores.device)
        metrics = {
            "accuracy": ((difference.detach() > 0).float().sum(), pairs),
            "margin": (difference.detach().sum(), pairs),
        }
        return Loss(total, metrics | score_metrics(scores, rows_that_count(experience)))


class RewardRegression(Objective):
    """Squared error of the score against a human rating.

    Args:
        huber: above this absolute error the loss grows linearly, which tames raters who disagree; None: never.
    """

    kind: ClassVar[Kind] = "reward"

    def __init__(self, huber: float | None = None) -> None:
        if huber is not None and huber <= 0:
            raise ValueError(f"huber must be positive or null, got {huber}")
        self.huber = huber

    def weight(self, experience: Experience) -> Tensor:
        """The number of rated rows."""
        return rows_that_count(experience).sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        """Summed over rows; metrics `mae` and `{min,mean,max}_reward`."""
        scores, rating = output.scores, experience["rating"]
        assert scores is not None
        counted = rows_that_count(experience)
        if self.huber is None:
            per_row = F.mse_loss(scores, rating, reduction="none")
        else:
            per_row = F.huber_loss(scores, rating, reduction="none", delta=self.huber)
        error = torch.where(counted, scores.detach() - rating, 0).abs().sum()
        total = torch.where(counted, per_row, 0).sum()
        return Loss(total, {"mae": (error, counted.sum()), **score_metrics(scores, counted)})
