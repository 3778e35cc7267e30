"""The losses of this package, each a pure function of [P] tensors, one element a pair, with its paper.

Notation, for a pair of a chosen answer y_w and a rejected one y_l to a prompt x:

    log-ratio   log pi(y|x) - log pi_ref(y|x), in nats, of a whole answer (or a token of it, where that is said)
    reward      beta times the log-ratio, what the policy implies (Rafailov et al. 2023, section 4)
    difference  reward of y_w minus reward of y_l

All give a loss for each pair (or row), and stay finite, with finite gradients, for log-ratios of thousands of nats.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.objectives.functional import MAX_EXPONENT, logistic_loss

__all__ = [
    "Divergence",
    "aot",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "discopop",
    "divergence_score",
    "exo_pair",
    "hinge",
    "ipo",
    "kto",
    "log_odds",
    "nca_pair",
    "robust",
    "sigmoid",
    "sppo_hard",
]

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


def bounded_exp(exponent: Tensor) -> Tensor:
    """exp up to MAX_EXPONENT, beyond it the tangent there: never infinite, and the gradient never vanishes."""
    beyond = (exponent - MAX_EXPONENT).clamp(min=0)
    return exponent.clamp(max=MAX_EXPONENT).exp() + beyond * math.exp(MAX_EXPONENT)


def divergence_score(log_ratio: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """f'(u) - f'(1) at u = pi / pi_ref, in the log-ratio's place when another divergence restrains the policy.

    Wang et al. 2023, "Beyond Reverse KL", table 1: reverse KL log u, forward KL 1 - 1/u, Jensen-Shannon
    log(2u / (1 + u)), alpha (1 - u^-alpha) / alpha, which is reverse KL at 0, forward at 1. (f is only given up to a
    multiple of u - 1. The choice cancels in a pair, unless lengths are divided by.)
    """
    if divergence == "forward_kl":
        return 1 - bounded_exp(-log_ratio)
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    if divergence == "alpha":
        return (1 - bounded_exp(-alpha * log_ratio)) / alpha
    return log_ratio


# ------------------------------------------------------------------ losses of the difference


def sigmoid(difference: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(d): Rafailov et al. 2023, equation 7.

    With label smoothing e: -(1 - e) log sigmoid(d) - e log sigmoid(-d), the conservative DPO of Mitchell 2023, for
    preferences of which a share e is wrong.
    """
    if not label_smoothing:
        return logistic_loss(difference)
    return (1 - label_smoothing) * logistic_loss(difference) + label_smoothing * logistic_loss(-difference)


def hinge(difference: Tensor) -> Tensor:
    """max(0, 1 - d): Zhao et al. 2023 (SLiC-HF), on normalised likelihoods as in Liu et al. 2023 (RSO)."""
    return torch.relu(1 - difference)


def ipo(difference: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2: Azar et al. 2023, equation 17, with tau = beta.

    Args:
        difference: [P] h, the log-ratio a token of y_w minus that of y_l, not multiplied by beta. (The paper writes
            sums; its results are those of averages, as its authors told the maintainers of TRL.)
        beta: the paper's tau.
    """
    return (difference - 1 / (2 * beta)).square()


def robust(difference: Tensor, label_smoothing: float) -> Tensor:
    """(-(1 - e) log sigmoid(d) + e log sigmoid(-d)) / (1 - 2e): Chowdhury et al. 2024.

    Where a share e of the labels is flipped, its expectation is the loss of the right ones.
    """
    kept, flipped = logistic_loss(difference), logistic_loss(-difference)
    return ((1 - label_smoothing) * kept - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair(difference: Tensor, label_smoothing: float) -> Tensor:
    """KL(p_theta || p) of p_theta = (sigmoid(d), sigmoid(-d)) and p = (1 - e, e): Ji et al. 2024, equation 16."""
    chosen = difference.sigmoid() * (F.logsigmoid(difference) - math.log1p(-label_smoothing))
    rejected = (-difference).sigmoid() * (F.logsigmoid(-difference) - math.log(label_smoothing))
    return chosen + rejected


def discopop(difference: Tensor, temperature: float) -> Tensor:
    """(1 - s) * -log sigmoid(d) + s * exp(-d) with s = sigmoid(d / temperature): Lu et al. 2024, equation 5."""
    share = (difference / temperature).sigmoid()
    return logistic_loss(difference) * (1 - share) + bounded_exp(-difference) * share


# ------------------------------------------------------------------ losses of the two rewards


def nca_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(r_w) - 1/2 log sigmoid(-r_w) - 1/2 log sigmoid(-r_l): Chen et al. 2024 (noise contrastive)."""
    return logistic_loss(chosen) + 0.5 * logistic_loss(-chosen) + 0.5 * logistic_loss(-rejected)


def bco_pair(chosen: Tensor, rejected: Tensor, shift: Tensor | float) -> Tensor:
    """-log sigmoid(r_w - s) - log sigmoid(s - r_l): Jung et al. 2024; the shift s is the mean of all rewards."""
    return logistic_loss(chosen - shift) + logistic_loss(shift - rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2: Wu et al. 2024, equation 4.7 with 1 / eta = beta and
    probabilities of winning of 1 and 0.

    Args:
        chosen: [P] log-ratio h_w, not multiplied by beta.
        rejected: [P] log-ratio h_l.
        beta: the paper's 1 / eta.
    """
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def apo_zero(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 - sigmoid(r_w) + sigmoid(r_l): D'Oosterlinck et al. 2024, equation 7, for answers better than its own."""
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor) -> Tensor:
    """sigmoid(r_w) + 1 - sigmoid(r_w - r_l): D'Oosterlinck et al. 2024, equation 8, for answers worse than its own."""
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


def aot(better: Tensor, worse: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss of sorted differences: Melnyk et al. 2024, first-order dominance of one distribution by another.

    Args:
        better: [P] beta times log pi(y_w) - log pi(y_l) (paired), or the rewards of all y_w (unpaired).
        worse: [P] the same under the reference, or the rewards of all y_l; each is sorted by itself.
        label_smoothing: as for `sigmoid`.
    """
    return sigmoid(better.sort().values - worse.sort().values, label_smoothing)


# ------------------------------------------------------------------ others


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(logps): Hong et al. 2024 (ORPO), equation 4, with p a token's geometric mean.

    Args:
        logps: [P] length-averaged log-probabilities, in nats; taken as at most -1e-6, where the odds are a million.
    """
    logps = logps.clamp(max=-1e-6)
    # log(1 - exp(x)) loses no digits on either side of -ln 2 (Maechler 2012)
    small, large = torch.log1p(-logps.exp()), torch.log(-torch.expm1(logps))
    return logps - torch.where(logps < -math.log(2), small, large)


def kto(reward: Tensor, baseline: Tensor | float, wanted: Tensor) -> Tensor:
    """1 - sigmoid(r - z) where an answer was wanted, 1 - sigmoid(z - r) elsewhere: Ethayarajh et al. 2024, equation 7.

    Args:
        reward: [B].
        baseline: z, beta times the divergence from the reference; 0 gives APO-zero on unpaired data.
        wanted: [B] bool.
    """
    gain = reward - baseline
    return torch.where(wanted, -gain, gain).sigmoid()
