"""The same values as TRL's own trainers, whose loss code runs here on a stand-in for the model.

The stand-in returns the log-probabilities of the test; where TRL wants logits, two logits a token whose softmax they
are.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dpo_batches import batch, feedback
from lit_palm_dpo import CPO, DPO, KTO, ORPO, SimPO
from torch import Tensor
from trl_dpo_loss import Model, stacked, trl_dpo, without_constructor

from lit_palm import Experience, Output

pytest.importorskip("trl", minversion="1.16")

PAIRS = [[0, 1]] * 5
EXACT = {"rtol": 1e-9, "atol": 1e-9}  # both in float64
SINGLE = {"rtol": 1e-6, "atol": 1e-6}  # TRL's ORPO and alpha divergence compute in float32


def ours(objective: Any, experience: Experience, output: Output) -> tuple[Tensor, dict[str, float]]:
    """The loss and the metrics as the host divides them."""
    loss, weight = objective.loss(output, experience), objective.weight(experience)
    metrics = {name: (value / count.clamp(min=1)).item() for name, (value, count) in loss.metrics.items()}
    if isinstance(loss.total, dict):
        return torch.stack([loss.total[k] / weight[k] for k in loss.total]).sum(), metrics
    return loss.total / weight, metrics


def slope(value: Tensor, output: Output) -> Tensor:
    assert output.logps is not None
    return torch.autograd.grad(value, output.logps)[0]


DPO_CASES: list[tuple[list[str], dict[str, Any], dict[str, Any]]] = [
    (["sigmoid"], {}, {}),
    (["sigmoid"], {"beta": 0.7}, {"beta": 0.7}),
    (["sigmoid_norm"], {}, {}),
    (["hinge"], {}, {}),
    (["ipo"], {}, {}),
    (["robust"], {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    (["nca_pair"], {}, {}),
    (["bco_pair"], {"bco_shift": "none"}, {}),
    (["sppo_hard"], {}, {}),
    (["aot"], {}, {}),
    (["aot"], {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    (["aot_unpaired"], {}, {}),
    (["apo_zero"], {}, {}),
    (["apo_down"], {}, {}),
    (["discopop"], {}, {}),
    (["discopop"], {"discopop_temperature": 0.7}, {"discopop_tau": 0.7}),
    (["sft"], {}, {}),
    (["sigmoid", "bco_pair", "sft"], {"loss_weights": [0.8, 0.2, 1.0], "bco_shift": "none"}, {"loss_weights": [0.8, 0.2, 1.0]}),  # noqa: E501
    (["sigmoid"], {"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    (["sigmoid"], {"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    (["sigmoid_norm"], {"divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    (["ipo"], {"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    (["hinge"], {"divergence": "js"}, {"f_divergence_type": "js_divergence"}),
]  # fmt: skip


@pytest.mark.parametrize("names, options, theirs", DPO_CASES, ids=lambda v: "-".join(map(str, v)) or "plain")
def test_dpo_is_trls(names: Any, options: dict[str, Any], theirs: dict[str, Any]) -> None:
    experience, output = batch(PAIRS, seed=11)
    expected, their_metrics = trl_dpo(experience, output, names, **theirs)
    found, metrics = ours(DPO(names, **options), experience, output)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(slope(found, output), slope(expected, output), **EXACT)
    shared = set(metrics) & set(their_metrics)
    assert len(shared) == 6 and all(name.startswith(("rewards/", "logps/")) for name in shared)
    if "sft" not in names or len(names) > 1:
        assert {k: metrics[k] for k in shared} == pytest.approx({k: their_metrics[k] for k in shared})


def test_exo_is_trls() -> None:
    """TRL takes the logarithm of a label smoothing that it holds in float32."""
    experience, output = batch(PAIRS, seed=11)
    expected, _ = trl_dpo(experience, output, ["exo_pair"], label_smoothing=0.001)
    found, _ = ours(DPO("exo_pair", label_smoothing=0.001), experience, output)
    torch.testing.assert_close(found, expected, **SINGLE)
    torch.testing.assert_close(slope(found, output), slope(expected, output), **SINGLE)


def test_the_alpha_divergence_is_trls_with_one_minus_its_coefficient() -> None:
    experience, output = batch(PAIRS, seed=11)
    assert output.logps is not None and output.ref_logps is not None
    output.logps, output.ref_logps = output.logps.detach().float().requires_grad_(), output.ref_logps.float()
    for alpha in (0.3, 0.5):
        expected, _ = trl_dpo(experience, output, ["sigmoid"], f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - alpha)  # noqa: E501  # fmt: skip
        found, _ = ours(DPO(divergence="alpha", alpha=alpha), experience, output)
        torch.testing.assert_close(found, expected, **SINGLE)
        torch.testing.assert_close(slope(found, output), slope(expected, output), **SINGLE)


# ------------------------------------------------------------------------------------------ without a reference


class TwoLogits:
    """A model of two tokens: token 0, which all rows consist of, has the log-probability of the test."""

    def __init__(self, logps: Tensor) -> None:
        self.logps = logps

    def __call__(self, *_: Any, **__: Any) -> SimpleNamespace:
        other = torch.log(-torch.expm1(self.logps))
        logits = torch.stack([self.logps, other], dim=-1)  # of the token at the same place: shift it to the one before
        return SimpleNamespace(logits=torch.cat([logits[:, 1:], torch.zeros_like(logits[:, :1])], dim=1))


def concatenated(experience: Experience, output: Output) -> tuple[TwoLogits, dict[str, Tensor]]:
    """Chosen and rejected rows as CPO and ORPO take them; of one prompt token, so that ORPO imitates answers alone."""
    order, _, _, mask = stacked(experience, output)
    assert output.logps is not None
    labels = torch.where(mask, 0, -100)[order]
    parts = {
        "labels": labels,
        "input_ids": torch.zeros_like(labels),
        "attention_mask": experience["mask"][order].long(),
    }
    inputs = {}
    for name, values in parts.items():
        inputs[f"chosen_{name}"], inputs[f"rejected_{name}"] = values.chunk(2)
    return TwoLogits(torch.where(mask, output.logps, -1.0)[order]), inputs


@pytest.mark.parametrize(
    "objective, theirs",
    [
        (CPO(), {}),
        (CPO(0.5, 0.3, label_smoothing=0.1), {"beta": 0.5, "cpo_alpha": 0.3, "label_smoothing": 0.1}),
        (CPO(loss="hinge"), {"loss_type": "hinge"}),
        (CPO(loss="ipo"), {"loss_type": "ipo"}),
        (CPO(2.0, 0.5, "simpo", gamma=0.7), {"loss_type": "simpo", "beta": 2.0, "cpo_alpha": 0.5, "simpo_gamma": 0.7}),
        (SimPO(2.5, 0.9), {"loss_type": "simpo", "beta": 2.5, "cpo_alpha": 0.0, "simpo_gamma": 0.9}),
    ],
)
def test_cpo_and_simpo_are_trls(objective: Any, theirs: dict[str, Any]) -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    experience, output = batch(PAIRS, seed=12)
    model, inputs = concatenated(experience, output)
    options = {"beta": 0.1, "cpo_alpha": 1.0, "loss_type": "sigmoid", "label_smoothing": 0.0, "simpo_gamma": 0.5,
               "alpha": 0.0, "is_encoder_decoder": False, "pad_token_id": 0}  # fmt: skip
    trainer = without_constructor(CPOTrainer, **{**options, **theirs})
    expected, their_metrics = trainer.get_batch_loss_metrics(model, inputs)
    found, metrics = ours(objective, experience, output)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(slope(found, output), slope(expected, output), **EXACT)
    same = [name for name in metrics if name != "nll"]
    assert {k: metrics[k] for k in same} == pytest.approx({k: their_metrics[k] for k in same})
    if "nll" in metrics:
        assert metrics["nll"] == pytest.approx(their_metrics["nll_loss"])


def test_orpo_is_trls() -> None:
    """TRL imitates prompts too: rows with a prompt of one token, which nothing predicts, have none to imitate."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    experience, output = batch(PAIRS, seed=13)
    assert output.logps is not None
    experience["mask"] = experience["mask"].clone()
    experience["loss_mask"] = experience["mask"].clone()
    experience["loss_mask"][:, 0] = False
    experience["loss_mask"][-1] = False  # the row that fills up
    logps = torch.where(experience["loss_mask"], output.logps.detach().nan_to_num(-0.4), float("nan"))
    output.logps = logps.float().requires_grad_()
    model, inputs = concatenated(experience, output)
    trainer = without_constructor(ORPOTrainer, beta=0.3, is_encoder_decoder=False, padding_value=0)
    expected, their_metrics = trainer.get_batch_loss_metrics(model, inputs)
    found, metrics = ours(ORPO(0.3), experience, output)
    torch.testing.assert_close(found, expected, **SINGLE)
    torch.testing.assert_close(slope(found, output), slope(expected, output), rtol=1e-5, atol=1e-6)
    same = [name for name in metrics if name != "nll"]
    assert {"log_odds_ratio", "log_odds_chosen"} <= set(same)
    assert {k: metrics[k] for k in same} == pytest.approx({k: their_metrics[k] for k in same}, rel=1e-5)


# ------------------------------------------------------------------------------------------ unpaired feedback


SEED = 2  # the divergence is above 0


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("labels", [[True, False, True, True], [True] * 4, [False] * 4])
def test_kto_is_trls(loss: Any, labels: list[bool]) -> None:
    from trl.trainer.kto_trainer import KTOTrainer

    experience, output = feedback(labels, mismatched=4, seed=SEED)
    mask = experience["loss_mask"]
    assert output.logps is not None and output.ref_logps is not None
    sums = torch.where(mask, output.ref_logps, 0).sum(1)
    ids = experience["tokens"].clone()
    ids[:, 0] = 100 + torch.arange(len(ids))
    model = Model({100 + i: output.logps[i] for i in range(len(ids))})
    inputs: dict[str, Tensor] = {"label": experience["label"][:4], "ref_logps": sums[:4], "ref_KL_logps": sums[4:8]}
    for prefix, rows in (("", slice(4)), ("KL_", slice(4, 8))):
        inputs[f"{prefix}input_ids"] = ids[rows]
        inputs[f"{prefix}attention_mask"] = experience["mask"][rows].long()
        inputs[f"{prefix}completion_mask"] = mask[rows].long()
    trainer = without_constructor(
        KTOTrainer,
        model=model,
        beta=0.3,
        loss_type=loss,
        calculate_KL=loss == "kto",
        precompute_ref_logps=True,
        desirable_weight=1.3,
        undesirable_weight=0.7,
    )
    expected = trainer._compute_loss(model, inputs, return_outputs=False)
    found, metrics = ours(KTO(0.3, 1.3, 0.7, loss), experience, output)
    torch.testing.assert_close(found, expected, **EXACT)
    torch.testing.assert_close(slope(found, output), slope(expected, output), **EXACT)
    theirs = {k: v[0] for k, v in trainer._metrics["train"].items()}
    assert math.isfinite(theirs["kl"]) and (theirs["kl"] > 0 or loss != "kto")
    for name in set(metrics) & set(theirs):
        assert metrics[name] == pytest.approx(theirs[name]), name
