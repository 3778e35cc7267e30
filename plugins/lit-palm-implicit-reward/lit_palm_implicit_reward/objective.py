"""An implicit process reward model from outcomes (Yuan et al. 2024, "Free Process Rewards without Process Labels").

With r(y) = beta * sum_t log pi(y_t | y_<t) / pi_ref(y_t | y_<t), trained so that r tells right completions from wrong
ones, the part of the sum up to a token is the expected outcome from there on, on a logarithmic scale; so what a token
adds is its process reward (their proposition 3.1).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm import Experience, Loss, Objective, Output
from lit_palm.objectives.base import Kind, Need
from lit_palm.objectives.functional import logistic_loss, pairs_of_rankings, rows_that_count
from lit_palm.types import sent

__all__ = ["ImplicitPRM"]

LossName = Literal["ce", "dpo"]
Level = Literal["completion", "token"]


class ImplicitPRM(Objective):
    """Make the log-ratio to the reference tell right completions from wrong ones; its parts are process rewards.

    Whether a completion is right: its `label`; or its `rating`, from `threshold` on; of pairs and rankings, being the
    best (with `dpo`, being better than another one).

    Args:
        loss: `ce`, the cross-entropy of each completion's outcome (their equation 5): -log sigmoid(r) if it is right,
            -log sigmoid(-r) if it is wrong; or `dpo`, -log sigmoid(r_better - r_worse) of pairs and rankings.
        beta: of the log-ratio; the paper's 0.05.
        level: of `ce`: the outcome of the whole `completion`, as in the paper; or that of every `token` by itself, as
            palm-rlhf-pytorch does.
        threshold: least rating of a right completion.

    Raises:
        ValueError: an argument is out of its range.
    """

    API_VERSION: ClassVar[int] = 1
    kind: ClassVar[Kind] = "policy"
    grouped: ClassVar[bool] = True
    """A rank counts within its ranking."""

    def __init__(
        self, loss: LossName = "ce", beta: float = 0.05, level: Level = "completion", threshold: float = 0.5
    ) -> None:
        for name, choice, choices in (("loss", loss, get_args(LossName)), ("level", level, get_args(Level))):
            if choice not in choices:
                raise ValueError(f"{name} is {choice!r}: choose one of {', '.join(choices)}")
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be finite and positive, got {beta}; 0.05 is usual")
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number, got {threshold}")
        if loss == "dpo" and level != "completion":
            raise ValueError("level: token is for loss: ce; with loss: dpo leave it out")
        self.kind_of_loss, self.beta, self.level, self.threshold = loss, beta, level, threshold

    @property
    def needs(self) -> frozenset[Need]:
        """The reference."""
        return frozenset({"reference"})

    def outcomes(self, experience: Experience) -> Tensor:
        """Whether each completion is right: [B] bool.

        Raises:
            ValueError: the data says nothing about it.
        """
        if "label" in experience:
            label: Tensor = experience["label"]
            return label
        if "rating" in experience:
            rating: Tensor = experience["rating"]
            return rating >= self.threshold
        if "rank" not in experience:
            raise ValueError(
                "ImplicitPRM learns from completions with a label, a rating or a rank, and this data has none: use "
                "PreferenceData, for example with rows of prompt, completion and label"
            )
        _, which = experience["group"].unique(return_inverse=True)
        rank = experience["rank"]
        return rank == torch.full_like(rank, rank.max()).scatter_reduce(0, which, rank, "amin")[which]

    def rows(self, experience: Experience) -> Tensor:
        """Which completions count: [B] bool. Those of other prompts have no outcome; a tie of all is none."""
        counts = rows_that_count(experience)
        if "mismatched" in experience:
            counts = counts & ~experience["mismatched"]
        if "label" not in experience and "rating" not in experience and "rank" in experience:
            _, which = experience["group"].unique(return_inverse=True)
            rank = experience["rank"]
            best, worst = (
                torch.zeros_like(rank).scatter_reduce(0, which, rank, how, include_self=False)
                for how in ("amin", "amax")
            )
            counts = counts & (best != worst)[which]
        return counts

    def weight(self, experience: Experience) -> Tensor:
        """The number of completions, of pairs, or with `level: token` of tokens."""
        if self.kind_of_loss == "dpo":
            return torch.full((), len(self._pairs(experience)[0]), device=experience["tokens"].device)
        mask: Tensor = experience["loss_mask"]
        counts = sent(self.rows(experience.host), mask.device)
        return (mask & counts[:, None]).sum() if self.level == "token" else counts.sum()

    def _pairs(self, experience: Experience) -> tuple[Tensor, Tensor]:
        if "rank" not in experience:
            raise ValueError(
                "ImplicitPRM with loss: dpo learns from pairs and rankings (chosen and rejected, or completions and "
                "ranks); of labels and ratings use loss: ce"
            )
        counts, device = rows_that_count(experience.host), experience["group"].device
        better, worse, _ = pairs_of_rankings(experience.host)
        both = counts[better] & counts[worse]
        return sent(better[both], device), sent(worse[both], device)

    def loss(self, output: Output, experience: Experience) -> Loss:
        """Summed cross-entropy; metrics `accuracy`, `rewards/right`, `rewards/wrong`, or those of pairs."""
        assert output.logps is not None and output.ref_logps is not None
        mask = experience["loss_mask"]
        by_token = self.beta * torch.where(mask, output.logps - output.ref_logps, 0)
        by_row = by_token.sum(1)
        if self.kind_of_loss == "dpo":
            better, worse = self._pairs(experience)
            margin = by_row[better] - by_row[worse]
            count = torch.full((), len(margin), device=mask.device)
            metrics = {
                "accuracy": ((margin > 0).float().sum(), count),
                "rewards/chosen": (by_row[better].sum(), count),
                "rewards/rejected": (by_row[worse].sum(), count),
                "rewards/margins": (margin.sum(), count),
            }
            total = logistic_loss(margin).sum()
        else:
            found = self.outcomes(experience.host), self.rows(experience.host)
            right, counts = (sent(rows, mask.device) for rows in found)
            sign = torch.where(right, 1, -1).to(by_row.dtype)
            if self.level == "token":
                per_token = -F.logsigmoid(sign[:, None] * by_token)
                total = torch.where(mask & counts[:, None], per_token, 0).sum()
            else:
                total = torch.where(counts, -F.logsigmoid(sign * by_row), 0).sum()
            metrics = {"accuracy": (((sign * by_row > 0) & counts).float().sum(), counts.sum())}
            for name, which in (("right", counts & right), ("wrong", counts & ~right)):
                metrics[f"rewards/{name}"] = (torch.where(which, by_row, 0).sum(), which.sum())
        return Loss(total, {name: (value.detach(), n) for name, (value, n) in metrics.items()})
