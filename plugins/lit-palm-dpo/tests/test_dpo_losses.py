"""Every loss against an independent float64 computation from its paper: value, gradient, weight and metrics."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from dpo_batches import batch, gradient
from dpo_slow import best_rows, differences, dpo_preference, nll, pairs_of, reference_free, rows_of
from lit_palm_dpo import CPO, DPO, ORPO, SimPO
from lit_palm_dpo.dpo import ANY_DIVERGENCE, LossName
from torch import Tensor

# pairs, a ranking of four, one with ties at the top and in the middle, and one that is all ties
RANKS = [[0, 1], [1, 0], [2, 0, 3, 1], [0, 0, 1, 1, 2], [4, 4]]
NUM_PAIRS = 1 + 1 + 6 + 8 + 0
NAMES = [name for name in get_args(LossName) if name != "sft"]
VALUE = {"rtol": 1e-9, "atol": 1e-9}  # both are float64
GRADIENT = {"rtol": 1e-6, "atol": 1e-6}  # finite differences with steps of 1e-4


def defaults(name: str) -> dict[str, Any]:
    """What a loss needs to be allowed at all."""
    return {"label_smoothing": {"exo_pair": 0.01, "robust": 0.1}[name]} if name in ("exo_pair", "robust") else {}


def cases() -> list[tuple[str, dict[str, Any]]]:
    found = [(name, defaults(name)) for name in NAMES]
    found += [(name, {**defaults(name), "beta": 0.7, "length_normalised": True}) for name in NAMES]
    found += [(name, {**defaults(name), "reference_free": True}) for name in NAMES]
    found += [(name, {"label_smoothing": 0.2}) for name in ("sigmoid", "sigmoid_norm", "aot", "aot_unpaired")]
    found += [(name, {"margin": True, **defaults(name)}) for name in ("sigmoid", "sigmoid_norm", "hinge", "robust")]
    found += [(name, {**defaults(name), "ld_alpha": 0.3}) for name in ("sigmoid", "ipo", "nca_pair", "aot")]
    found += [("discopop", {"discopop_temperature": 1.5, "beta": 1.0}), ("bco_pair", {"bco_shift": "none"})]
    for divergence in ({"divergence": "forward_kl"}, {"divergence": "js"}, {"divergence": "alpha", "alpha": 0.3}):
        found += [(name, {**defaults(name), **divergence}) for name in NAMES if name in ANY_DIVERGENCE]
    return found


def shift_of(rows: list[dict[str, Any]], name: str, options: dict[str, Any]) -> float:
    """BCO's mean of all rewards of the batch."""
    if name != "bco_pair" or options.get("bco_shift") == "none":
        return 0.0
    rewards = []
    for pair in pairs_of(rows):
        for row in pair:
            ratio = sum(row["logps"]) - (0 if options.get("reference_free") else sum(row["ref"]))
            length = len(row["logps"]) if options.get("length_normalised") else 1
            rewards.append(options.get("beta", 0.1) * ratio / length)
    return sum(rewards) / len(rewards)


@pytest.mark.parametrize("name, options", cases(), ids=lambda v: v if isinstance(v, str) else "-".join(v) or "plain")
def test_a_dpo_loss_is_that_of_its_paper(name: LossName, options: dict[str, Any]) -> None:
    experience, output = batch(RANKS, seed=len(name) + len(options))
    objective = DPO(name, **options)
    if objective.reference_free:
        assert not objective.needs
    loss = objective.loss(output, experience)
    rows = rows_of(experience, output)
    shift = shift_of(rows, name, options)

    def slow(rows: Any) -> float:
        return dpo_preference(rows, name, shift=shift, **options)

    assert isinstance(loss.total, Tensor) and loss.total.dtype == torch.float64
    torch.testing.assert_close(loss.total.item(), slow(rows), **VALUE)
    expected = differences(rows, slow, experience["tokens"].shape)
    torch.testing.assert_close(gradient(loss.total, output), expected, **GRADIENT)
    assert expected.abs().max() > 1e-3
    assert objective.weight(experience) == NUM_PAIRS


@pytest.mark.parametrize(
    "objective, name, options",
    [
        (SimPO(), "simpo", {"beta": 2.0, "gamma": 1.0}),
        (SimPO(3.0, 0.4, 0.1), "simpo", {"beta": 3.0, "gamma": 0.4, "label_smoothing": 0.1}),
        (ORPO(), "orpo", {"beta": 0.1, "sft": 1.0}),
        (ORPO(0.6), "orpo", {"beta": 0.6, "sft": 1.0}),
        (CPO(), "cpo_sigmoid", {"beta": 0.1, "sft": 1.0}),
        (CPO(0.4, 0.3, label_smoothing=0.2), "cpo_sigmoid", {"beta": 0.4, "sft": 0.3, "label_smoothing": 0.2}),
        (CPO(loss="hinge"), "cpo_hinge", {"beta": 0.1, "sft": 1.0}),
        (CPO(loss="ipo"), "cpo_ipo", {"beta": 0.1, "sft": 1.0}),
        (CPO(2.0, 0.0, "simpo", 0.1, 0.7), "cpo_simpo", {"beta": 2.0, "gamma": 0.7, "label_smoothing": 0.1}),
    ],
)
def test_a_loss_without_reference_is_that_of_its_paper(objective: Any, name: str, options: dict[str, Any]) -> None:
    experience, output = batch(RANKS, seed=3)
    rows = rows_of(experience, output)
    output.ref_logps = None
    assert not objective.needs and objective.grouped and not objective.coupled
    loss, weight = objective.loss(output, experience), objective.weight(experience)
    sft = options.pop("sft", None)
    expected, tokens = nll(rows)
    total = loss.total
    if sft is None:
        assert isinstance(total, Tensor) and weight == NUM_PAIRS
        torch.testing.assert_close(total.item(), reference_free(rows, name, **options), **VALUE)
    else:
        assert set(total) == {"preference", "sft"} and weight == {"preference": NUM_PAIRS, "sft": tokens}
        torch.testing.assert_close(total["preference"].item(), reference_free(rows, name, **options), **VALUE)
        torch.testing.assert_close(total["sft"].item(), sft * expected, **VALUE)
        assert loss.metrics["nll"][1] == tokens
        torch.testing.assert_close(loss.metrics["nll"][0].item(), expected, **VALUE)

    def slow(rows: Any) -> float:
        return reference_free(rows, name, **options) + (sft or 0) * nll(rows)[0]

    torch.testing.assert_close(gradient(total, output), differences(rows, slow, experience["tokens"].shape), **GRADIENT)
    if name == "orpo":
        difference = loss.metrics["log_odds_chosen"][0] / NUM_PAIRS
        assert loss.metrics["log_odds_ratio"][0] < 0 and difference.isfinite()
        assert loss.metrics["log_odds_ratio"][0].item() == pytest.approx(-total["preference"].item() / objective.beta)


def test_several_losses_add_up_with_their_weights() -> None:
    experience, output = batch(RANKS, seed=5)
    rows = rows_of(experience, output)
    names: list[LossName] = ["sigmoid", "sft", "bco_pair", "ipo"]
    objective = DPO(names, [0.8, 0.3, 0.2, 0.05], beta=0.3)
    loss = objective.loss(output, experience)
    shift = shift_of(rows, "bco_pair", {"beta": 0.3})

    def slow(rows: Any) -> float:
        terms = {name: dpo_preference(rows, name, beta=0.3, shift=shift) for name in names if name != "sft"}
        return 0.8 * terms["sigmoid"] + 0.2 * terms["bco_pair"] + 0.05 * terms["ipo"]

    expected, tokens = nll(rows)
    assert isinstance(loss.total, dict) and list(loss.total) == ["preference", "sft"]
    torch.testing.assert_close(loss.total["preference"].item(), slow(rows), **VALUE)
    torch.testing.assert_close(loss.total["sft"].item(), 0.3 * expected, **VALUE)
    assert objective.weight(experience) == {"preference": NUM_PAIRS, "sft": tokens}
    found = differences(rows, lambda r: slow(r) + 0.3 * nll(r)[0], experience["tokens"].shape)
    torch.testing.assert_close(gradient(loss.total, output), found, **GRADIENT)


def test_sft_alone_needs_no_reference() -> None:
    experience, output = batch(RANKS)
    output.ref_logps = None
    objective = DPO("sft", [0.5])
    loss, (expected, tokens) = objective.loss(output, experience), nll(rows_of(*batch(RANKS)))
    assert not objective.needs and not objective.coupled
    assert isinstance(loss.total, dict) and list(loss.total) == ["sft"]
    torch.testing.assert_close(loss.total["sft"].item(), 0.5 * expected, **VALUE)
    assert objective.weight(experience) == {"sft": tokens}
    # of [0, 0, 1, 1, 2] both best answers are imitated, of [4, 4] none
    assert len(best_rows(rows_of(*batch(RANKS)))) == 1 + 1 + 1 + 2


def test_metrics_are_means_over_pairs_of_the_implied_rewards() -> None:
    experience, output = batch(RANKS, seed=2)
    metrics = {k: (v / n).item() for k, (v, n) in DPO(beta=0.5).loss(output, experience).metrics.items()}
    pairs = pairs_of(rows_of(experience, output))
    rewards = [[0.5 * (sum(r["logps"]) - sum(r["ref"])) for r in pair] for pair in pairs]
    count = len(pairs)
    assert metrics == pytest.approx(
        {
            "rewards/chosen": sum(w for w, _ in rewards) / count,
            "rewards/rejected": sum(v for _, v in rewards) / count,
            "rewards/accuracies": sum(w > v for w, v in rewards) / count,
            "rewards/margins": sum(w - v for w, v in rewards) / count,
            "logps/chosen": sum(sum(w["logps"]) for w, _ in pairs) / count,
            "logps/rejected": sum(sum(v["logps"]) for _, v in pairs) / count,
        }
    )
    assert not any(v.requires_grad for v, _ in DPO().loss(output, experience).metrics.values())


def test_metrics_of_length_normalised_objectives_are_those_of_a_token() -> None:
    experience, output = batch([[0, 1]], fillers=0)
    (chosen, rejected) = rows_of(experience, output)
    mean = [sum(r["logps"]) / len(r["logps"]) for r in (chosen, rejected)]
    for objective in (SimPO(), CPO(2.0, loss="simpo"), ORPO(2.0)):
        metrics = objective.loss(output, experience).metrics
        assert metrics["logps/chosen"][0].item() == pytest.approx(mean[0])
        assert metrics["rewards/rejected"][0].item() == pytest.approx(2 * mean[1])


def test_the_reference_of_rollouts_is_read_from_the_experience() -> None:
    experience, output = batch(RANKS)
    expected = DPO().loss(output, experience).total
    experience["ref_logps"], output.ref_logps = output.ref_logps, None
    assert torch.equal(DPO().loss(output, experience).total, expected)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_agrees_with_double(name: LossName) -> None:
    """What training computes; 1e-5 is a hundred times the rounding of a sum of sixteen pairs in float32."""
    experience, output = batch(RANKS)
    objective = DPO(name, **defaults(name))
    exact = objective.loss(output, experience).total
    assert output.logps is not None and output.ref_logps is not None
    output.logps, output.ref_logps = output.logps.detach().float().requires_grad_(), output.ref_logps.float()
    single = objective.loss(output, experience).total
    assert isinstance(single, Tensor) and single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-5)
