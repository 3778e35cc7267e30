"""KTO against an independent computation from the paper, and what it asks of its data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dpo_batches import batch, feedback, gradient
from dpo_slow import differences, divergence_of, kto, rows_of
from lit_palm_dpo import KTO

VALUE = {"rtol": 1e-9, "atol": 1e-9}  # both are float64
GRADIENT = {"rtol": 1e-6, "atol": 1e-6}  # finite differences with steps of 1e-4
LABELS = [True, False, False, True, True]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_it_is_that_of_its_paper(seed: int, weights: tuple[float, float], loss: Any) -> None:
    experience, output = feedback(LABELS, mismatched=4, seed=seed)
    rows = rows_of(experience, output)
    kl = divergence_of(rows) if loss == "kto" else 0.0
    objective = KTO(0.4, *weights, loss)
    found = objective.loss(output, experience)

    def slow(rows: Any) -> float:
        return kto(rows, 0.4, kl, weights)

    torch.testing.assert_close(found.total.item(), slow(rows), **VALUE)
    expected = differences(rows, slow, experience["tokens"].shape)
    torch.testing.assert_close(gradient(found.total, output), expected, **GRADIENT)
    assert not expected[len(LABELS) :].any(), "nothing is learned from answers to other prompts"
    assert objective.weight(experience) == len(LABELS)
    assert ("kl" in found.metrics) == (loss == "kto")
    if loss == "kto":
        torch.testing.assert_close(found.metrics["kl"][0].item(), kl, **VALUE)


def test_the_divergence_is_at_least_zero_and_sometimes_above() -> None:
    found = [KTO().loss(output, e).metrics["kl"][0].item() for e, output in (feedback(LABELS, 4, s) for s in range(9))]
    assert min(found) == 0 and max(found) > 0.1


def test_what_fills_up_and_labels_of_mismatched_rows_count_for_nothing() -> None:
    experience, output = feedback(LABELS, mismatched=4, fillers=2)
    before = KTO().loss(output, experience)
    experience["label"] = experience["label"].clone()
    experience["label"][len(LABELS) :] ^= True
    after = KTO().loss(output, experience)
    assert torch.equal(before.total, after.total)
    assert before.metrics == after.metrics
    rows = [*range(len(LABELS) + 4)]
    assert output.logps is not None and output.ref_logps is not None
    output.logps, output.ref_logps = output.logps[rows], output.ref_logps[rows]
    part = experience.select(rows)
    width = part["tokens"].shape[1]
    output.logps, output.ref_logps = output.logps[:, :width], output.ref_logps[:, :width]
    torch.testing.assert_close(KTO().loss(output, part).total, before.total, **VALUE)


def test_a_batch_of_fillers_alone_has_no_weight() -> None:
    experience, output = feedback([], mismatched=0, fillers=1)
    loss = KTO().loss(output, experience)
    assert loss.total == 0 and KTO().weight(experience) == 0
    assert not gradient(loss.total, output).any()
    assert all(count == 0 for _, count in loss.metrics.values())


def test_margins_are_known_where_there_are_both_kinds() -> None:
    experience, output = feedback([True, True], mismatched=1)
    assert KTO().loss(output, experience).metrics["rewards/margins"][1] == 0
    experience, output = feedback([True, False], mismatched=1)
    metrics = KTO().loss(output, experience).metrics
    chosen, rejected = (metrics[f"rewards/{name}"][0] for name in ("chosen", "rejected"))
    torch.testing.assert_close(metrics["rewards/margins"][0], chosen - rejected)


def test_it_is_coupled_by_its_divergence_alone() -> None:
    assert KTO().coupled and not KTO(loss="apo_zero_unpaired").coupled
    assert KTO().needs == {"reference"} and not KTO().grouped


def test_missing_rows_and_labels_are_named_with_the_way_out() -> None:
    experience, output = feedback(LABELS, mismatched=0)
    for lacking in ("all of them", "the field"):
        with pytest.raises(ValueError, match=r"data\.mismatched: true"):
            KTO().loss(output, experience)
        assert KTO(loss="apo_zero_unpaired").loss(output, experience).total > 0, lacking
        experience.pop("mismatched", None)
    with pytest.raises(ValueError, match=r"`label`.*use DPO"):
        KTO().loss(*reversed(batch([[0, 1]])))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"desirable_weight": -1.0}, "desirable_weight must not be negative"),
        ({"undesirable_weight": float("nan")}, "undesirable_weight"),
        ({"loss": "bco"}, "choose kto or apo_zero_unpaired"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KTO(**options)
