"""What the pair objectives promise beyond their formulas: extremes, fillers, micro-batches, state, bad arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from dpo_batches import RUBBISH, batch, gradient
from lit_palm_dpo import CPO, DPO, KTO, ORPO, SimPO
from lit_palm_dpo.dpo import LossName
from lit_palm_dpo.losses import divergence_score, log_odds
from torch import Tensor

from lit_palm import Experience, Objective, Output

RANKS = [[0, 1], [1, 0], [2, 0, 3, 1]]
SMOOTHING: dict[str, Any] = {"exo_pair": {"label_smoothing": 0.01}, "robust": {"label_smoothing": 0.1}}
DIVERGENCES: list[dict[str, Any]] = [
    {"divergence": "forward_kl"}, {"divergence": "js"}, {"divergence": "alpha", "alpha": 0.5},
    {"divergence": "forward_kl", "losses": "ipo"}, {"divergence": "forward_kl", "losses": "discopop"},
]  # fmt: skip
EVERY: list[Callable[[], Objective]] = [
    *[lambda name=name: DPO(name, **SMOOTHING.get(name, {})) for name in get_args(LossName)],
    *[lambda options=options: DPO(**options) for options in DIVERGENCES],
    lambda: DPO("discopop", beta=1.0, discopop_temperature=5.0),
    lambda: DPO(["sigmoid", "sft"], [1.0, 0.3]),
    SimPO,
    ORPO,
    CPO,
    *[lambda loss=loss: CPO(loss=loss) for loss in ("hinge", "ipo", "simpo")],
]


def whole(total: Tensor | dict[str, Tensor]) -> Tensor:
    return torch.stack(list(total.values())).sum() if isinstance(total, dict) else total


# ------------------------------------------------------------------------------------------ numbers


EXTREMES = [(-1e4, -9e3), (-9e3, -1e4), (-1e4, -1e4), (0.0, -1e3), (-1e3, 0.0)]


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_log_probabilities_give_finite_gradients(make: Callable[[], Objective], dtype: torch.dtype) -> None:
    """Chosen at one extreme and rejected at the other, in answers of one token and of several; mirrored for the
    reference. In 16 bits the log-probabilities are rounded, the loss is computed in 32."""
    for chosen, rejected in EXTREMES:
        experience, _ = batch([[0, 1], [1, 0]])
        mask, better = experience["loss_mask"], experience["rank"] == 0
        extremes = torch.where(better[:, None], torch.tensor(chosen), torch.tensor(rejected))
        logps = torch.where(mask, extremes, RUBBISH).to(dtype).requires_grad_()
        mirrored = torch.where(mask, torch.where(better[:, None], rejected, chosen), RUBBISH).to(dtype)
        output = Output(logps=logps, ref_logps=mirrored)
        loss = make().loss(output, experience)
        assert whole(loss.total).dtype == torch.float32 and whole(loss.total).isfinite()
        found = gradient(loss.total, output)
        # float16 ends at 65504, beyond which its gradients are scaled down and the step repeated
        assert not found.isnan().any() and (found.isfinite().all() or dtype == torch.float16)
        assert not found[~mask].any()
        assert all(value.isfinite() for value, _ in loss.metrics.values())


def test_beyond_the_largest_exponent_gradients_do_not_vanish() -> None:
    """A policy that has gone too far must find back: exp is continued by its tangent."""
    far = torch.tensor([-1000.0, -30.0, -19.0], requires_grad=True)
    for divergence in ("forward_kl", "alpha"):
        score = divergence_score(far, divergence, 1.0)
        (slope,) = torch.autograd.grad(score.sum(), far)
        assert score.isfinite().all() and slope.isfinite().all() and (slope > 1e8).all()
        assert (score.diff() > 0).all()


def test_log_odds_are_exact_on_both_sides_and_bounded_at_certainty() -> None:
    p = torch.tensor([1e-12, 0.01, 0.3, 0.5, 0.9, 0.99999], dtype=torch.float64)
    torch.testing.assert_close(log_odds(p.log()), p.logit(), rtol=1e-9, atol=1e-12)
    certain = torch.zeros(3, requires_grad=True)
    log_odds(certain).sum().backward()
    assert certain.grad is not None and certain.grad.isfinite().all()


# ------------------------------------------------------------------------------------------ rows and pairs


@pytest.mark.parametrize("make", EVERY)
def test_fillers_and_padding_count_for_nothing(make: Callable[[], Objective]) -> None:
    """Also a filler that somebody put into the group of real rows."""
    objective = make()
    experience, output = batch(RANKS, fillers=3)
    real = experience["loss_mask"].any(1)
    experience["group"] = torch.where(real, experience["group"], experience["group"][0])
    experience["rank"] = torch.where(real, experience["rank"], torch.tensor(9))
    loss = objective.loss(output, experience)
    assert output.logps is not None and output.ref_logps is not None
    part = experience.select(real.nonzero().flatten())
    width = part["tokens"].shape[1]
    cut = Output(output.logps[real][:, :width], ref_logps=output.ref_logps[real][:, :width])
    torch.testing.assert_close(whole(loss.total), whole(objective.loss(cut, part).total), rtol=1e-12, atol=1e-12)
    assert objective.weight(experience) == objective.weight(part)
    assert not gradient(loss.total, output)[~real].any()


@pytest.mark.parametrize("make", EVERY)
def test_a_batch_without_pairs_has_no_weight_and_still_a_gradient(make: Callable[[], Objective]) -> None:
    """A process that got fillers or ties alone still takes part in the step."""
    objective = make()
    experience, output = batch([[1, 1]], fillers=1)
    loss, weight = objective.loss(output, experience), objective.weight(experience)
    assert whole(loss.total) == 0 and whole(loss.total).requires_grad
    assert all(w == 0 for w in (weight.values() if isinstance(weight, dict) else [weight]))
    assert not gradient(loss.total, output).any()
    assert all(count == 0 for _, count in loss.metrics.values())


@pytest.mark.parametrize("make", EVERY)
def test_only_coupled_losses_change_with_micro_batches(make: Callable[[], Objective]) -> None:
    objective = make()
    experience, output = batch(RANKS * 2, fillers=0, seed=4)
    together = whole(objective.loss(output, experience).total)
    apart = torch.zeros_like(together)
    assert output.logps is not None and output.ref_logps is not None
    for group in experience["group"].unique().tolist():
        rows = (experience["group"] == group).nonzero().flatten()
        part = experience.select(rows)
        width = part["tokens"].shape[1]
        cut = Output(output.logps[rows][:, :width], ref_logps=output.ref_logps[rows][:, :width])
        apart = apart + whole(objective.loss(cut, part).total)
    agree = torch.allclose(together, apart, rtol=1e-10)
    assert agree == (not objective.coupled)


def test_what_is_coupled_says_so() -> None:
    coupled = {name for name in get_args(LossName) if DPO(name, **SMOOTHING.get(name, {})).coupled}
    assert coupled == {"aot", "aot_unpaired", "bco_pair"}
    assert DPO(["sft", "aot"]).coupled and not DPO("bco_pair", bco_shift="none").coupled


def test_pairs_need_ranks_and_margins_need_a_column() -> None:
    experience, output = batch(RANKS)
    without = Experience({k: v for k, v in experience.items() if k not in ("rank", "margin")})
    for objective in (DPO(), SimPO(), ORPO(), CPO()):
        with pytest.raises(ValueError, match=r"`chosen` and `rejected`.*KTO"):
            objective.loss(output, without)
        with pytest.raises(ValueError, match="PreferenceData"):
            objective.weight(without)
    without = Experience({k: v for k, v in experience.items() if k != "margin"})
    assert DPO().loss(output, without).total > 0
    with pytest.raises(ValueError, match=r"`margin` column.*margin to false"):
        DPO(margin=True).loss(output, without)


# ------------------------------------------------------------------------------------------ the shift of bco_pair


def mean_reward(objective: DPO, experience: Experience, output: Output) -> float:
    value, count = objective.loss(output, experience).metrics["rewards/mean"]
    return (value / count).item()


def test_the_shift_is_the_mean_over_steps_and_survives_a_checkpoint() -> None:
    objective = DPO("bco_pair", beta=0.5)
    assert objective.watches == ("rewards/mean",) and DPO("bco_pair", bco_shift="none").watches == ()
    means = []
    for seed in range(3):
        experience, output = batch(RANKS, seed=seed)
        before = objective.loss(output, experience).total
        assert torch.equal(before, objective.loss(output, experience).total), (
            "loss changes nothing: validation calls it"
        )
        means.append(mean_reward(objective, experience, output))
        # the loss of a micro-batch: its own mean joins those of the steps before
        shift = sum(means) / len(means)
        fixed = DPO("bco_pair", beta=0.5)
        fixed.num_steps, fixed.mean_reward = 10**12, shift
        torch.testing.assert_close(fixed.loss(output, experience).total, before, rtol=1e-6, atol=1e-6)
        assert objective.after_step({"rewards/mean": means[-1]}) is False
    assert objective.mean_reward == pytest.approx(sum(means) / 3)
    assert abs(means[0] - means[1]) > 1e-2
    state = objective.state_dict()
    assert state == {"num_steps": 3, "mean_reward": objective.mean_reward}
    resumed = DPO("bco_pair", beta=0.5)
    experience, output = batch(RANKS, seed=9)
    assert not torch.equal(resumed.loss(output, experience).total, objective.loss(output, experience).total)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.loss(output, experience).total, objective.loss(output, experience).total)


def test_other_losses_carry_nothing() -> None:
    objective = DPO()
    assert objective.state_dict() == {} and objective.after_step({}) is False
    objective.load_state_dict({})
    changed = DPO("bco_pair")  # resumed from a run without it
    changed.load_state_dict({})
    assert changed.num_steps == 0


# ------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"losses": "dpo"}, "unknown loss 'dpo'"),
        ({"losses": []}, "losses is empty"),
        ({"losses": ["sft", "sft"]}, "names one twice"),
        ({"losses": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 factors for 2 losses"),
        ({"loss_weights": [-1.0]}, "loss_weights must not be negative"),
        ({"loss_weights": [0.0]}, "nor all 0"),
        ({"loss_weights": [float("inf")]}, "loss_weights"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"beta": float("nan")}, "beta must be positive"),
        ({"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ({"label_smoothing": -0.1}, r"\[0, 0.5\)"),
        ({"losses": "hinge", "label_smoothing": 0.1}, "label_smoothing has no effect on hinge"),
        ({"losses": "exo_pair"}, "exo_pair needs a label_smoothing"),
        ({"divergence": "tv"}, "divergence is 'tv'"),
        ({"losses": ["sigmoid", "nca_pair"], "divergence": "js"}, "does not go with nca_pair"),
        ({"losses": "sft", "divergence": "js"}, "does not go with sft"),
        ({"losses": "ipo", "margin": True}, "margin does not go with ipo"),
        ({"alpha": 0.0}, "alpha must be finite and not 0"),
        ({"ld_alpha": 1.5}, "ld_alpha must lie"),
        ({"discopop_temperature": 0.0}, "discopop_temperature must be positive"),
        ({"bco_shift": "mean"}, "bco_shift is 'mean'"),
    ],
)
def test_bad_arguments_of_dpo_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPO(**options)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SimPO(beta=-1), "beta must be positive"),
        (lambda: SimPO(gamma=-0.5), "gamma must not be negative"),
        (lambda: SimPO(label_smoothing=0.7), "label_smoothing"),
        (lambda: ORPO(0), "beta must be positive"),
        (lambda: CPO(cpo_alpha=-1), "cpo_alpha must not be negative"),
        (lambda: CPO(loss="kto"), "choose one of sigmoid, hinge, ipo, simpo"),
        (lambda: CPO(loss="ipo", label_smoothing=0.1), "label_smoothing has no effect on the loss ipo"),
    ],
)
def test_bad_arguments_of_the_others_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_every_class_states_its_version_and_what_it_is() -> None:
    for cls in (DPO, SimPO, ORPO, CPO, KTO):
        assert vars(cls)["API_VERSION"] == 1 and cls.kind == "policy"
        assert cls.grouped == (cls is not KTO)
