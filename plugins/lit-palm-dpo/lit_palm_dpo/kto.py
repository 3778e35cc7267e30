"""Learning from single answers that people wanted or did not want (Ethayarajh et al. 2024).

lit-palm fit --config plugins/lit-palm-dpo/configs/kto.yaml --data.train=my_feedback.jsonl
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lit_palm import Experience, Loss, Objective, Output
from lit_palm.objectives.base import Need
from lit_palm.objectives.functional import rows_that_count
from lit_palm_dpo import losses as formulas
from lit_palm_dpo.pairs import Metrics, check_beta, row_sums

__all__ = ["KTO"]


class KTO(Objective):
    """Weighs gains and losses as people do, against what the policy would do anyway; needs no pairs.

    `kto` (Ethayarajh et al. 2024, equation 7): w (1 - sigmoid(beta (h - z))) for an answer that was wanted,
    w (1 - sigmoid(beta (z - h))) for another, with h the log-ratio to the reference of a whole answer. z is the
    divergence from the reference, estimated by the mean log-ratio of answers to other prompts, at least 0, without
    gradient. `apo_zero_unpaired` (D'Oosterlinck et al. 2024, equation 7) is the same with z = 0.

    The loss is a mean over rows; the paper advises to keep desirable_weight * wanted / (undesirable_weight * unwanted),
    numbers of rows, between 1 and 1.33.

    Args:
        beta: how strongly the policy is held to the reference.
        desirable_weight: weight of answers that were wanted.
        undesirable_weight: weight of the others.
        loss: `kto`, for which the data gives answers to other prompts (`data.mismatched: true`), or
            `apo_zero_unpaired`.

    Raises:
        ValueError: an argument is out of range; in training: the data lacks labels or answers to other prompts.
    """

    API_VERSION: ClassVar[int] = 1
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})  # type: ignore[misc]

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        loss: Literal["kto", "apo_zero_unpaired"] = "kto",
    ) -> None:
        check_beta(beta)
        for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
            if not 0 <= weight < float("inf"):
                raise ValueError(f"{name} must not be negative, got {weight}; 1 is usual")
        if loss not in ("kto", "apo_zero_unpaired"):
            raise ValueError(f"loss is {loss!r}: choose kto or apo_zero_unpaired")
        self.beta, self.loss_name = beta, loss
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    @property
    def coupled(self) -> bool:
        """With `kto` all rows of a micro-batch share its estimate of the divergence."""
        return self.loss_name == "kto"

    def _rows(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """[B] bool each: the rows with feedback, and the answers to other prompts.

        Raises:
            ValueError: a field is missing.
        """
        if "label" not in experience:
            raise ValueError(
                "KTO needs feedback on single answers, a `label` (true or false) beside `prompt` and `completion`, of "
                "which this data has none; for pairs and rankings use DPO"
            )
        rows, others = _kinds(experience)
        if self.loss_name == "kto":
            known, unpaired = _kinds(experience.host)
            if bool(known.any()) and not bool(unpaired.any()):
                raise ValueError(
                    "KTO estimates the divergence from the reference on answers to other prompts, and this batch has "
                    "none: set data.mismatched: true, or the objective's loss to apo_zero_unpaired"
                )
        return rows, others

    def weight(self, experience: Experience) -> Tensor:
        """The number of rows with feedback."""
        return self._rows(experience)[0].sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        """Summed over rows; metrics `kl`, and `rewards/*` and `logps/*` of wanted and unwanted answers."""
        rows, others = self._rows(experience)
        mask = experience["loss_mask"]
        reference = output.ref_logps if output.ref_logps is not None else experience["ref_logps"]
        assert output.logps is not None
        logps = row_sums(output.logps, mask)
        ratio = logps - row_sums(reference.detach(), mask)
        kl = torch.zeros((), dtype=ratio.dtype, device=ratio.device)
        if self.loss_name == "kto":
            apart = torch.where(others, ratio.detach(), 0).sum()
            kl = (apart / others.sum().clamp(min=1)).clamp(min=0)
        wanted = experience["label"]
        per_row = formulas.kto(self.beta * ratio, self.beta * kl, wanted)
        per_row = torch.where(wanted, self.desirable_weight * per_row, self.undesirable_weight * per_row)
        metrics = self._metrics(logps.detach(), ratio.detach(), rows & wanted, rows & ~wanted)
        if self.loss_name == "kto":
            metrics["kl"] = (kl, rows.any().long())
        return Loss(torch.where(rows, per_row, 0).sum(), metrics)

    def _metrics(self, logps: Tensor, ratio: Tensor, wanted: Tensor, unwanted: Tensor) -> Metrics:
        """Means by kind of answer; `rewards/margins` is their difference in micro-batches that have both."""
        metrics: Metrics = {}
        means = []
        for name, rows in (("chosen", wanted), ("rejected", unwanted)):
            reward, count = self.beta * torch.where(rows, ratio, 0).sum(), rows.sum()
            metrics[f"rewards/{name}"] = (reward, count)
            metrics[f"logps/{name}"] = (torch.where(rows, logps, 0).sum(), count)
            means.append(reward / count.clamp(min=1))
        both = (wanted.any() & unwanted.any()).long()
        metrics["rewards/margins"] = ((means[0] - means[1]) * both, both)
        return metrics


def _kinds(experience: Experience) -> tuple[Tensor, Tensor]:
    """Rows with feedback, and answers to other prompts: [B] bool each."""
    counted = rows_that_count(experience)
    mismatched = experience.get("mismatched", torch.zeros_like(counted))
    return counted & ~mismatched, counted & mismatched
