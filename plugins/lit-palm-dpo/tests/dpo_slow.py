"""The losses once more, in plain Python and float64, written from the papers: loops over rows, no tensors.

Rows are dictionaries: `logps` and `ref` (lists of floats, one a token of the answer), `group`, `rank`, `margin`. What
the objectives hold constant (the shift of BCO, the divergence of KTO) is an argument, so that finite differences of
these functions are the gradients that the objectives should have.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_palm import Experience, Output

Row = dict[str, Any]


def rows_of(experience: Experience, output: Output) -> list[Row]:
    """All rows, those that fill up included; with `place` where each token stands."""
    assert output.logps is not None and output.ref_logps is not None
    rows = []
    for b in range(experience.num_rows):
        places = [t for t in range(experience["tokens"].shape[1]) if experience["loss_mask"][b, t]]
        row: Row = {
            "logps": [output.logps[b, t].item() for t in places],
            "ref": [output.ref_logps[b, t].item() for t in places],
            "place": [(b, t) for t in places],
        }
        for name in ("group", "rank", "margin", "label", "mismatched"):
            if name in experience:
                row[name] = experience[name][b].item()
        rows.append(row)
    return rows


def pairs_of(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    return [(w, l) for w in rows for l in rows if w["group"] == l["group"] and w["rank"] < l["rank"] and w["logps"] and l["logps"]]  # noqa: E501, E741  # fmt: skip


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > -30 else x


def summed(row: Row, other: Row, key: str, ld_alpha: float | None) -> float:
    """Of LD-DPO: tokens beyond the shorter answer's length count ld_alpha."""
    shared = min(len(row["logps"]), len(other["logps"]))
    factor = 1.0 if ld_alpha is None else ld_alpha
    return sum(row[key][:shared]) + factor * sum(row[key][shared:])


def f_prime(log_u: float, divergence: str, alpha: float) -> float:
    """Derivative of f at u, less that at 1: Wang et al. 2023, table 1."""

    def derivative(u: float) -> float:
        if divergence == "forward_kl":
            return -1 / u
        if divergence == "js":
            return math.log(2 * u / (1 + u))
        assert divergence == "alpha"
        return (1 - u**-alpha) / alpha

    return derivative(math.exp(log_u)) - derivative(1)


def smoothed(x: float, e: float) -> float:
    return -(1 - e) * log_sigma(x) - e * log_sigma(-x)


def dpo_preference(rows: Sequence[Row], name: str, **options: Any) -> float:
    """The sum over all pairs of one loss of `DPO`."""
    beta, e = options.get("beta", 0.1), options.get("label_smoothing", 0.0)
    reference = 0.0 if options.get("reference_free") else 1.0
    averaged = options.get("length_normalised", False) or name in ("ipo", "sigmoid_norm")
    ratios, margins, policy, ref = [], [], [], []
    for w, l in pairs_of(rows):  # noqa: E741
        sums = {}
        for who, row, other in (("w", w, l), ("l", l, w)):
            pi = summed(row, other, "logps", options.get("ld_alpha"))
            pi_ref = reference * summed(row, other, "ref", options.get("ld_alpha"))
            n = len(row["logps"]) if averaged else 1
            score = pi - pi_ref
            if options.get("divergence", "reverse_kl") != "reverse_kl":
                score = f_prime(score, options["divergence"], options.get("alpha", 0.5))
            sums[who] = (score / n, pi / n, pi_ref / n)
        ratios.append((sums["w"][0], sums["l"][0]))
        policy.append(sums["w"][1] - sums["l"][1])
        ref.append(sums["w"][2] - sums["l"][2])
        margins.append(w["margin"] if options.get("margin") else 0.0)
    if name == "aot":
        return sum(smoothed(beta * (p - r), e) for p, r in zip(sorted(policy), sorted(ref), strict=True))
    if name == "aot_unpaired":
        better, worse = sorted(h for h, _ in ratios), sorted(h for _, h in ratios)
        return sum(smoothed(beta * (h - k), e) for h, k in zip(better, worse, strict=True))
    shift = options.get("shift", 0.0)
    total = 0.0
    for (h_w, h_l), margin in zip(ratios, margins, strict=True):
        r_w, r_l = beta * h_w, beta * h_l
        d = r_w - r_l - margin
        if name in ("sigmoid", "sigmoid_norm"):
            total += smoothed(d, e)
        elif name == "hinge":
            total += max(0.0, 1 - d)
        elif name == "ipo":
            total += (h_w - h_l - 1 / (2 * beta)) ** 2
        elif name == "robust":
            total += (-(1 - e) * log_sigma(d) + e * log_sigma(-d)) / (1 - 2 * e)
        elif name == "exo_pair":
            p, q = (1 - e, e), (sigma(d), 1 - sigma(d))
            total += sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True))
        elif name == "nca_pair":
            total += -log_sigma(r_w) - sum(log_sigma(-r) for r in (r_w, r_l)) / 2
        elif name == "bco_pair":
            total += -log_sigma(r_w - shift) - log_sigma(-(r_l - shift))
        elif name == "sppo_hard":
            eta = 1 / beta  # equation 4.7: (log-ratio - eta (P(y wins) - 1/2))^2, P is 1 and 0
            total += (h_w - eta * (1 - 0.5)) ** 2 + (h_l - eta * (0 - 0.5)) ** 2
        elif name == "apo_zero":
            total += 1 - sigma(r_w) + sigma(r_l)
        elif name == "apo_down":
            total += sigma(r_w) + 1 - sigma(r_w - r_l)
        elif name == "discopop":
            mix = sigma(d / options.get("discopop_temperature", 0.05))
            total += (1 - mix) * math.log(1 + math.exp(-d)) + mix * math.exp(-d)
        else:
            raise AssertionError(name)
    return total


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """The best answers of groups in which some answer is worse."""
    best = []
    for row in rows:
        ranks = [r["rank"] for r in rows if r["group"] == row["group"] and r["logps"]]
        if row["logps"] and row["rank"] == min(ranks) and max(ranks) > min(ranks):
            best.append(row)
    return best


def nll(rows: Sequence[Row]) -> tuple[float, int]:
    """Negative log-likelihood of the best answers, and their number of tokens."""
    best = best_rows(rows)
    return -sum(sum(r["logps"]) for r in best), sum(len(r["logps"]) for r in best)


def reference_free(rows: Sequence[Row], name: str, **options: Any) -> float:
    """The sum over all pairs of the preference term of SimPO, ORPO or CPO (`cpo_LOSS`)."""
    beta, e, gamma = options["beta"], options.get("label_smoothing", 0.0), options.get("gamma", 0.0)
    total = 0.0
    for w, l in pairs_of(rows):  # noqa: E741
        s_w, s_l = sum(w["logps"]), sum(l["logps"])
        a_w, a_l = s_w / len(w["logps"]), s_l / len(l["logps"])
        if name in ("simpo", "cpo_simpo"):
            total += smoothed(beta * a_w - beta * a_l - gamma, e)
        elif name == "orpo":
            odds_w, odds_l = (math.exp(a) / (1 - math.exp(a)) for a in (a_w, a_l))
            total += -beta * math.log(sigma(math.log(odds_w / odds_l)))
        elif name == "cpo_sigmoid":
            total += smoothed(beta * s_w - beta * s_l, e)
        elif name == "cpo_hinge":
            total += max(0.0, 1 - beta * (s_w - s_l))
        elif name == "cpo_ipo":
            total += (a_w - a_l - 1 / (2 * beta)) ** 2
        else:
            raise AssertionError(name)
    return total


def divergence_of(rows: Sequence[Row]) -> float:
    """KTO's z without beta: the mean log-ratio of answers to other prompts, at least 0."""
    ratios = [sum(r["logps"]) - sum(r["ref"]) for r in rows if r["mismatched"] and r["logps"]]
    return max(0.0, sum(ratios) / len(ratios)) if ratios else 0.0


def kto(rows: Sequence[Row], beta: float, kl: float, weights: tuple[float, float]) -> float:
    """The sum of KTO's loss over rows with feedback; `kl` 0 gives APO-zero."""
    total = 0.0
    for row in rows:
        if row["mismatched"] or not row["logps"]:
            continue
        h = sum(row["logps"]) - sum(row["ref"])
        if row["label"]:
            total += weights[0] * (1 - sigma(beta * (h - kl)))
        else:
            total += weights[1] * (1 - sigma(beta * (kl - h)))
    return total


def differences(rows: Sequence[Row], function: Callable[[Sequence[Row]], float], shape: torch.Size) -> Tensor:
    """Central finite differences [B, T] of a function of the rows by each `logps`.

    With steps of 1e-4 the truncation is about 1e-8 of third derivatives, the rounding 1e-12 of the value.
    """
    found, step = torch.zeros(shape, dtype=torch.float64), 1e-4
    for number, row in enumerate(rows):
        for token, (b, t) in enumerate(row["place"]):
            values = []
            for sign in (1, -1):
                moved = copy.deepcopy(list(rows))
                moved[number]["logps"][token] += sign * step
                values.append(function(moved))
            found[b, t] = (values[0] - values[1]) / (2 * step)
    return found
