"""From rows to pairs: what DPO, SimPO, ORPO and CPO share.

A pair is a better and a worse answer of one group. A ranking of K answers gives all its pairs, up to K (K - 1) / 2, and
every pair counts 1, so that a loss is a mean over pairs whatever they come from. Ties form no pair, nor do rows that
only fill a batch up.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lit_palm import Experience, Loss, Objective, Output
from lit_palm.objectives.functional import pairs_of_rankings, rows_that_count
from lit_palm.types import sent

__all__ = ["Metrics", "PairObjective", "Pairs", "check_beta", "check_smoothing", "find_pairs", "row_sums"]

Metrics = dict[str, tuple[Tensor, Tensor]]


def check_beta(beta: float) -> None:
    """Refuse a beta that is not positive.

    Raises:
        ValueError: naming it.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive, got {beta}; 0.1 is usual with a reference, 2 for SimPO")


def check_smoothing(label_smoothing: float) -> None:
    """Refuse a share of wrong labels outside [0, 0.5).

    Raises:
        ValueError: naming it.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is a share of wrong labels, in [0, 0.5); got {label_smoothing}")


def precise(values: Tensor) -> Tensor:
    """At least float32: sums over an answer, squares and exponentials do not fit 16 bits."""
    return values if values.dtype == torch.float64 else values.float()


def row_sums(values: Tensor, mask: Tensor) -> Tensor:
    """[B] sums of [B, T] where `mask` is True."""
    return torch.where(mask, precise(values), 0).sum(1)


def find_pairs(experience: Experience) -> tuple[Tensor, Tensor]:
    """Indices of the better and of the worse row of every pair, [P] each.

    Raises:
        ValueError: the data has no ranks.
    """
    if "rank" not in experience:
        raise ValueError(
            "an objective on pairs needs preferences (`chosen` and `rejected`, or `completions` and `ranks`), of which "
            "this data has none: use PreferenceData, and KTO where answers have a `label`"
        )
    better, worse, _ = pairs_of_rankings(experience.host)
    counted = rows_that_count(experience.host)
    both, device = counted[better] & counted[worse], experience["group"].device
    return sent(better[both], device), sent(worse[both], device)


@dataclass
class Pairs:
    """The P pairs of a micro-batch.

    Args:
        chosen: [P] log-probability of each better answer, summed over its tokens, in nats.
        rejected: [P] the same of each worse answer.
        ref_chosen: [P] the first under the reference; zeros without one.
        ref_rejected: [P] the second.
        chosen_length: [P] tokens of the better answer.
        rejected_length: [P] tokens of the worse answer.
        margin: [P] by how much the better was preferred, when the objective uses it.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    margin: Tensor | None = None

    def __len__(self) -> int:
        return len(self.chosen)


class PairObjective(Objective):
    """A loss for each pair, and optionally the negative log-likelihood of the best answers beside it.

    A subclass sets `beta`, and what differs from the defaults below, and implements `per_pair`. With `sft_weight` the
    loss has two terms, each divided by its own weight: `preference` by the number of pairs, `sft` by the number of
    tokens of the best answers.
    """

    API_VERSION: ClassVar[int] = 1
    grouped: ClassVar[bool] = True

    beta: float
    sft_weight: float | None = None
    """Weight of the negative log-likelihood; None: there is no such term."""
    only_sft: bool = False
    """There is no other term."""
    uses_margin: bool = False
    averages: bool = False
    """Whether `rewards/*` and `logps/*` are those of a token rather than of a whole answer."""
    ld_alpha: float | None = None
    """Weight of the tokens by which an answer is longer than the other of its pair."""

    @abstractmethod
    def per_pair(self, pairs: Pairs) -> Tensor:
        """[P] loss of each pair."""

    def more_metrics(self, pairs: Pairs) -> Metrics:
        """Metrics beside those that all share."""
        return {}

    # ------------------------------------------------------------------ the contract

    def weight(self, experience: Experience) -> Tensor | dict[str, Tensor]:
        """The number of pairs; with `sft` by term, there the number of tokens of the best answers."""
        better, worse = find_pairs(experience)
        count = torch.full((), len(better), device=better.device)
        if self.sft_weight is None:
            return count
        sft = {"sft": self._imitated(experience, better, worse).sum()}
        return sft if self.only_sft else {"preference": count, **sft}

    def loss(self, output: Output, experience: Experience) -> Loss:
        """Summed over pairs (and, for `sft`, tokens)."""
        better, worse = find_pairs(experience)
        pairs = self._pairs(output, experience, better, worse)
        metrics = self._metrics(pairs)
        if self.sft_weight is None:
            return Loss(self.per_pair(pairs).sum(), metrics)
        assert output.logps is not None
        imitated = self._imitated(experience, better, worse)
        nll = -row_sums(output.logps, imitated).sum()
        metrics["nll"] = (nll.detach(), imitated.sum())
        total = {"sft": self.sft_weight * nll}
        return Loss(total if self.only_sft else {"preference": self.per_pair(pairs).sum(), **total}, metrics)

    # ------------------------------------------------------------------ parts

    def _imitated(self, experience: Experience, better: Tensor, worse: Tensor) -> Tensor:
        """[B, T] bool: tokens of answers that are better than another of their group, and worse than none."""
        mask: Tensor = experience["loss_mask"]
        best = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        best[better] = True
        best[worse] = False
        return mask & best[:, None]

    def _pairs(self, output: Output, experience: Experience, better: Tensor, worse: Tensor) -> Pairs:
        mask, logps = experience["loss_mask"], output.logps
        assert logps is not None
        chosen, rejected = self._sums(logps, mask, better, worse)
        if "reference" in self.needs:
            reference = output.ref_logps if output.ref_logps is not None else experience["ref_logps"]
            ref_chosen, ref_rejected = self._sums(reference.detach(), mask, better, worse)
        else:
            ref_chosen, ref_rejected = torch.zeros_like(chosen), torch.zeros_like(rejected)
        margin = None
        if self.uses_margin:
            if "margin" not in experience:
                raise ValueError(
                    f"{type(self).__name__}(margin=True) needs a `margin` column in the preference data: add it, or "
                    "set margin to false"
                )
            margin = precise(experience["margin"])[better]
        length = mask.sum(1).to(chosen.dtype)
        return Pairs(chosen, rejected, ref_chosen, ref_rejected, length[better], length[worse], margin)

    def _sums(self, logps: Tensor, mask: Tensor, better: Tensor, worse: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [P] of both answers of every pair."""
        if self.ld_alpha is None:
            whole = row_sums(logps, mask)
            return whole[better], whole[worse]
        place, length = mask.cumsum(1), mask.sum(1)
        shared = torch.minimum(length[better], length[worse])[:, None]
        sums = []
        for rows in (better, worse):
            common = mask[rows] & (place[rows] <= shared)
            rest = mask[rows] & ~common
            sums.append(row_sums(logps[rows], common) + self.ld_alpha * row_sums(logps[rows], rest))
        return sums[0], sums[1]

    @torch.no_grad()
    def _metrics(self, pairs: Pairs) -> Metrics:
        """Those that TRL logs under the same names."""
        chosen, rejected = pairs.chosen, pairs.rejected
        ratios = chosen - pairs.ref_chosen, rejected - pairs.ref_rejected
        if self.averages:
            chosen, rejected = chosen / pairs.chosen_length, rejected / pairs.rejected_length
            ratios = ratios[0] / pairs.chosen_length, ratios[1] / pairs.rejected_length
        rewards = self.beta * ratios[0], self.beta * ratios[1]
        values = {
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/accuracies": (rewards[0] > rewards[1]).float(),
            "rewards/margins": rewards[0] - rewards[1],
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        count = torch.full((), len(pairs), device=chosen.device)
        metrics = {name: (value.sum(), count) for name, value in values.items()}
        return metrics | self.more_metrics(pairs)
