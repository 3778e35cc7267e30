"""Preference objectives that need no reference: SimPO, ORPO and CPO.

lit-palm fit --config plugins/lit-palm-dpo/configs/dpo.yaml --model.objective=SimPO --model.objective.beta=2
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm_dpo import losses as formulas
from lit_palm_dpo.pairs import Metrics, PairObjective, Pairs, check_beta, check_smoothing

__all__ = ["CPO", "ORPO", "SimPO"]


def _averages(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """[P] log-probability a token, of the better and of the worse answers."""
    return pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length


def _check_gamma(gamma: float) -> None:
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must not be negative, got {gamma}; half of beta is usual")


class SimPO(PairObjective):
    """-log sigmoid(beta * (log-probability a token of the better answer minus that of the worse) - gamma).

    Meng et al. 2024, equation 6. There is no reference: length normalisation and a small learning rate hold the policy.
    `rewards/*` and `logps/*` are those of a token.

    Args:
        beta: scale of the reward; 2 to 10 are usual.
        gamma: the margin by which the better answer should win; the paper advises about half of beta.
        label_smoothing: share of preferences thought to be wrong.

    Raises:
        ValueError: an argument is out of range.
    """

    API_VERSION: ClassVar[int] = 1
    averages = True

    def __init__(self, beta: float = 2.0, gamma: float = 1.0, label_smoothing: float = 0.0) -> None:
        check_beta(beta)
        check_smoothing(label_smoothing)
        _check_gamma(gamma)
        self.beta, self.gamma, self.label_smoothing = beta, gamma, label_smoothing

    def per_pair(self, pairs: Pairs) -> Tensor:
        """[P] loss of each pair."""
        chosen, rejected = _averages(pairs)
        return formulas.sigmoid(self.beta * (chosen - rejected) - self.gamma, self.label_smoothing)


class ORPO(PairObjective):
    """Fine-tuning on the best answers, with a term that raises their odds over those of worse answers.

    Hong et al. 2024, equations 6 and 7: L = L_sft + beta * -log sigmoid(log odds(y_w) - log odds(y_l)), the odds of the
    geometric mean of an answer's token probabilities. L_sft is the negative log-likelihood of a token of the best
    answers. It also logs `log_odds_ratio` (the mean log sigmoid) and `log_odds_chosen` (the mean difference);
    `rewards/*` and `logps/*` are those of a token.

    Args:
        beta: weight of the odds term, the paper's lambda.

    Raises:
        ValueError: beta is not positive.
    """

    API_VERSION: ClassVar[int] = 1
    averages = True

    def __init__(self, beta: float = 0.1) -> None:
        check_beta(beta)
        self.beta, self.sft_weight = beta, 1.0

    def per_pair(self, pairs: Pairs) -> Tensor:
        """[P] loss of each pair."""
        return self.beta * formulas.sigmoid(self._difference(pairs))

    def _difference(self, pairs: Pairs) -> Tensor:
        chosen, rejected = _averages(pairs)
        return formulas.log_odds(chosen) - formulas.log_odds(rejected)

    def more_metrics(self, pairs: Pairs) -> Metrics:
        difference = self._difference(pairs)
        count = torch.full((), len(pairs), device=difference.device)
        return {
            "log_odds_ratio": (F.logsigmoid(difference).sum(), count),
            "log_odds_chosen": (difference.sum(), count),
        }


class CPO(PairObjective):
    """A preference loss without reference, and fine-tuning on the best answers (Xu et al. 2024).

    With d = log pi(y_w) - log pi(y_l), of whole answers for `sigmoid` and `hinge`, of a token for `ipo` and `simpo`:
    `sigmoid` -log sigmoid(beta d), `hinge` max(0, 1 - beta d), `ipo` (d - 1 / (2 beta))^2, `simpo`
    -log sigmoid(beta d - gamma). `rewards/*` and `logps/*` are those of a token for `ipo` and `simpo`.

    Args:
        beta: scale of the difference.
        cpo_alpha: weight of the negative log-likelihood of a token of the best answers; 0: without it.
        loss: `sigmoid`, `hinge`, `ipo` or `simpo`.
        label_smoothing: share of preferences thought to be wrong, in `sigmoid` and `simpo`.
        gamma: the margin of `simpo`.

    Raises:
        ValueError: an argument is out of range.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        beta: float = 0.1,
        cpo_alpha: float = 1.0,
        loss: Literal["sigmoid", "hinge", "ipo", "simpo"] = "sigmoid",
        label_smoothing: float = 0.0,
        gamma: float = 0.5,
    ) -> None:
        check_beta(beta)
        check_smoothing(label_smoothing)
        _check_gamma(gamma)
        if loss not in ("sigmoid", "hinge", "ipo", "simpo"):
            raise ValueError(f"loss is {loss!r}: choose one of sigmoid, hinge, ipo, simpo")
        if label_smoothing and loss in ("hinge", "ipo"):
            raise ValueError(f"label_smoothing has no effect on the loss {loss}: only on sigmoid and simpo")
        if not 0 <= cpo_alpha < float("inf"):
            raise ValueError(f"cpo_alpha must not be negative, got {cpo_alpha}; 1 is usual")
        self.beta, self.loss_name, self.label_smoothing, self.gamma = beta, loss, label_smoothing, gamma
        self.sft_weight = cpo_alpha or None
        self.averages = loss in ("ipo", "simpo")

    def per_pair(self, pairs: Pairs) -> Tensor:
        """[P] loss of each pair."""
        chosen, rejected = _averages(pairs) if self.averages else (pairs.chosen, pairs.rejected)
        if self.loss_name == "ipo":
            return formulas.ipo(chosen - rejected, self.beta)
        difference = self.beta * (chosen - rejected)
        if self.loss_name == "hinge":
            return formulas.hinge(difference)
        return formulas.sigmoid(difference - (self.gamma if self.loss_name == "simpo" else 0), self.label_smoothing)
