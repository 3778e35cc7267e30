"""Direct preference optimisation (Rafailov et al. 2023) with the losses that have grown around it.

lit-palm fit --config plugins/lit-palm-dpo/configs/dpo.yaml --model.objective.losses=[sigmoid,sft]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lit_palm.objectives.base import Need
from lit_palm_dpo import losses as formulas
from lit_palm_dpo.losses import Divergence
from lit_palm_dpo.pairs import Metrics, PairObjective, Pairs, check_beta, check_smoothing

__all__ = ["DPO", "LossName"]

LossName = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip

SMOOTHED = {"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired"}
# f'(u) holds up to a constant of the prompt, which cancels only in the difference of a pair
ANY_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop", "sft"}
WITH_MARGIN = {"sigmoid", "sigmoid_norm", "hinge", "robust"}


class DPO(PairObjective):
    """Make better answers likelier than worse ones, relative to a reference, without a reward model.

    Args:
        losses: one loss or several, which are added up: `sigmoid` (Rafailov et al. 2023), `sigmoid_norm` (the same
            with log-ratios a token), `hinge` (SLiC), `ipo`, `robust`, `exo_pair`, `nca_pair`, `bco_pair`, `sppo_hard`,
            `aot`, `aot_unpaired`, `apo_zero`, `apo_down`, `discopop`, and `sft`, the negative log-likelihood of a
            token of the best answers. All but `sft` are means over pairs.
        loss_weights: a factor for each of them; None: 1 each.
        beta: how strongly the policy is held to the reference; the larger, the closer (IPO's tau, SPPO's 1 / eta).
        label_smoothing: share of preferences thought to be wrong, in `sigmoid`, `sigmoid_norm`, `aot` and
            `aot_unpaired` (conservative), `robust` (0.1 is usual) and `exo_pair` (which needs some; 0.001 is usual).
        length_normalised: divide each log-ratio by the number of the answer's tokens, as `ipo` and `sigmoid_norm`
            always do.
        divergence: what restrains the policy: `reverse_kl`, `forward_kl`, `js` (Jensen-Shannon) or `alpha` (Wang et
            al. 2023); others than `reverse_kl` for the losses of a difference only (`sigmoid`, `sigmoid_norm`, `hinge`,
            `ipo`, `robust`, `exo_pair`, `discopop`).
        alpha: of the alpha divergence; near 0 it is the reverse KL, at 1 the forward KL.
        reference_free: take the reference as equally likely everywhere; it is then not needed.
        margin: subtract the data's `margin` (by how much the better answer was preferred) from the difference of
            rewards, in `sigmoid`, `sigmoid_norm`, `hinge` and `robust` (Touvron et al. 2023; Amini et al. 2024).
        ld_alpha: weight of the tokens by which an answer is longer than the other of its pair, from 0 to 1 (LD-DPO, Liu
            et al. 2024); None: 1.
        discopop_temperature: of `discopop`.
        bco_shift: of `bco_pair`: `running` is the mean reward of this run's steps, as in the paper; `none` is 0.

    Raises:
        ValueError: an argument is out of range, or does not go with the losses.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        losses: LossName | list[LossName] = "sigmoid",
        loss_weights: list[float] | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        length_normalised: bool = False,
        divergence: Divergence = "reverse_kl",
        alpha: float = 0.5,
        reference_free: bool = False,
        margin: bool = False,
        ld_alpha: float | None = None,
        discopop_temperature: float = 0.05,
        bco_shift: Literal["running", "none"] = "running",
    ) -> None:
        names: list[LossName] = [losses] if isinstance(losses, str) else list(losses)
        factors = [1.0] * len(names) if loss_weights is None else [float(w) for w in loss_weights]
        _check_names(names, factors)
        check_beta(beta)
        check_smoothing(label_smoothing)
        _check_smoothed(names, label_smoothing)
        for name, choice, choices in (
            ("divergence", divergence, get_args(Divergence)),
            ("bco_shift", bco_shift, ("running", "none")),
        ):
            if choice not in choices:
                raise ValueError(f"{name} is {choice!r}: choose one of {', '.join(choices)}")
        if divergence != "reverse_kl":
            _check_subset(f"divergence {divergence}", names, ANY_DIVERGENCE)
        if margin:
            _check_subset("margin", names, WITH_MARGIN | {"sft"})
        if alpha == 0 or not abs(alpha) < float("inf"):
            raise ValueError(f"alpha must be finite and not 0, got {alpha}; near 0 it is divergence reverse_kl")
        if ld_alpha is not None and not 0 <= ld_alpha <= 1:
            raise ValueError(f"ld_alpha must lie in [0, 1], or be null, got {ld_alpha}")
        if not discopop_temperature > 0:
            raise ValueError(f"discopop_temperature must be positive, got {discopop_temperature}; 0.05 is usual")
        self.names, self.factors = [n for n in names if n != "sft"], dict(zip(names, factors, strict=True))
        self.sft_weight, self.only_sft = self.factors.get("sft"), not self.names
        self.beta, self.label_smoothing, self.length_normalised = beta, label_smoothing, length_normalised
        self.divergence, self.alpha, self.reference_free = divergence, alpha, reference_free
        self.uses_margin, self.ld_alpha = margin and not self.only_sft, ld_alpha
        self.discopop_temperature = discopop_temperature
        self.running_shift = bco_shift == "running" and "bco_pair" in self.names
        self.num_steps, self.mean_reward = 0, 0.0

    @property
    def needs(self) -> frozenset[Need]:
        """The reference, unless nothing reads it."""
        return frozenset() if self.reference_free or self.only_sft else frozenset({"reference"})

    @property
    def coupled(self) -> bool:
        """`aot` and `aot_unpaired` sort the pairs of a micro-batch, `bco_pair` shifts by their mean reward."""
        return self.running_shift or "aot" in self.names or "aot_unpaired" in self.names

    # ------------------------------------------------------------------ once a micro-batch

    def per_pair(self, pairs: Pairs) -> Tensor:
        """[P] weighted sum of the losses."""
        lengths = (pairs.chosen_length, pairs.rejected_length)
        ratios = (pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected)
        total = torch.zeros_like(pairs.chosen)
        for name in self.names:
            averaged = self.length_normalised or name in ("ipo", "sigmoid_norm")
            chosen, rejected = (self._score(r) / (n if averaged else 1) for r, n in zip(ratios, lengths, strict=True))
            if name == "aot":
                n = lengths if averaged else (1, 1)
                better = pairs.chosen / n[0] - pairs.rejected / n[1]
                worse = pairs.ref_chosen / n[0] - pairs.ref_rejected / n[1]
                loss = formulas.aot(self.beta * better, self.beta * worse, self.label_smoothing)
            elif name in ANY_DIVERGENCE:
                loss = self._of_difference(name, chosen - rejected, pairs.margin)
            else:
                loss = self._of_rewards(name, chosen, rejected)
            total = total + self.factors[name] * loss
        return total

    def _score(self, log_ratio: Tensor) -> Tensor:
        return formulas.divergence_score(log_ratio, self.divergence, self.alpha)

    def _of_difference(self, name: LossName, ratio: Tensor, margin: Tensor | None) -> Tensor:
        """A loss of the difference [P] of log-ratios."""
        if name == "ipo":
            return formulas.ipo(ratio, self.beta)
        difference = self.beta * ratio if margin is None else self.beta * ratio - margin
        if name == "hinge":
            return formulas.hinge(difference)
        if name == "robust":
            return formulas.robust(difference, self.label_smoothing)
        if name == "exo_pair":
            return formulas.exo_pair(difference, self.label_smoothing)
        if name == "discopop":
            return formulas.discopop(difference, self.discopop_temperature)
        return formulas.sigmoid(difference, self.label_smoothing)

    def _of_rewards(self, name: LossName, chosen: Tensor, rejected: Tensor) -> Tensor:
        """A loss of the log-ratios [P] of the better and of the worse answers."""
        if name == "sppo_hard":
            return formulas.sppo_hard(chosen, rejected, self.beta)
        chosen, rejected = self.beta * chosen, self.beta * rejected
        if name == "nca_pair":
            return formulas.nca_pair(chosen, rejected)
        if name == "bco_pair":
            return formulas.bco_pair(chosen, rejected, self._shift(chosen, rejected))
        if name == "apo_zero":
            return formulas.apo_zero(chosen, rejected)
        if name == "apo_down":
            return formulas.apo_down(chosen, rejected)
        assert name == "aot_unpaired"
        return formulas.aot(chosen, rejected, self.label_smoothing)

    # ------------------------------------------------------------------ the shift of bco_pair

    def _shift(self, chosen: Tensor, rejected: Tensor) -> Tensor | float:
        """The mean reward of all steps so far and of this micro-batch, each step counting 1."""
        if not self.running_shift or not len(chosen):
            return 0.0
        mean = (chosen + rejected).detach().mean() / 2
        return (self.num_steps * self.mean_reward + mean) / (self.num_steps + 1)

    def more_metrics(self, pairs: Pairs) -> Metrics:
        if not self.running_shift:
            return {}
        chosen, rejected = pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected
        if self.length_normalised:
            chosen, rejected = chosen / pairs.chosen_length, rejected / pairs.rejected_length
        total = self.beta * (chosen + rejected).sum() / 2
        return {"rewards/mean": (total, torch.full((), len(pairs), device=total.device))}

    @property
    def watches(self) -> tuple[str, ...]:
        return ("rewards/mean",) if self.running_shift else ()

    def after_step(self, metrics: dict[str, float]) -> bool:
        """Take the step's mean reward, which is that of all ranks, into the shift."""
        if self.running_shift:
            self.num_steps += 1
            self.mean_reward += (metrics["rewards/mean"] - self.mean_reward) / self.num_steps
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps, "mean_reward": self.mean_reward} if self.running_shift else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # a run whose losses changed between checkpoint and resume starts its shift from nothing
        self.num_steps, self.mean_reward = int(state.get("num_steps", 0)), float(state.get("mean_reward", 0.0))


def _check_names(names: Sequence[str], factors: Sequence[float]) -> None:
    known = get_args(LossName)
    if not names:
        raise ValueError(f"losses is empty: name at least one of {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown loss {name!r} in losses: choose from {', '.join(known)}")
    if len(set(names)) != len(names):
        raise ValueError(f"losses names one twice: {', '.join(names)}; use loss_weights instead")
    if len(factors) != len(names):
        raise ValueError(f"loss_weights has {len(factors)} factors for {len(names)} losses: give one for each")
    if any(not 0 <= f < float("inf") for f in factors) or not any(factors):
        raise ValueError(f"loss_weights must not be negative, nor all 0, got {list(factors)}")


def _check_smoothed(names: Sequence[str], label_smoothing: float) -> None:
    if "exo_pair" in names and label_smoothing == 0:
        raise ValueError("exo_pair needs a label_smoothing above 0, which it takes the logarithm of; 0.001 is usual")
    if label_smoothing and not SMOOTHED & set(names):
        raise ValueError(f"label_smoothing has no effect on {', '.join(names)}: only on {', '.join(sorted(SMOOTHED))}")


def _check_subset(what: str, names: Sequence[str], allowed: set[str]) -> None:
    others = [name for name in names if name not in allowed]
    if others or set(names) <= {"sft"}:
        raise ValueError(
            f"{what} does not go with {', '.join(others or names)}: only with {', '.join(sorted(allowed - {'sft'}))}"
        )
