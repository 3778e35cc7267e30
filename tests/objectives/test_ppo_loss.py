"""PPO's loss against a loop over tokens, TRL's formulas, and what each option must change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import slow_rlhf as slow
import torch
from policy_batches import policy_output, rollouts
from torch import Tensor

from lit_palm.objectives import PPO
from lit_palm.types import Experience, Loss, Output

# float64 against Python floats: the same sums in another order
EXACT = 1e-9

OPTIONS: Sequence[dict[str, Any]] = [
    {},
    {"clip": 0.05},
    {"dual_clip": 1.3},
    {"value_clip": None},
    {"value_clip": 0.05, "value_coef": 2.0},
    {"value_coef": 0.0},
    {"entropy_coef": 0.3},
    {"kl_coef": 0.5, "kl_estimator": "k2", "kl_in": "loss"},
    {"kl_coef": 0.5, "kl_estimator": "k3", "kl_in": "loss"},
    {"kl_coef": 0.5, "kl_estimator": "k3", "kl_in": "reward"},
]


def mean_of(loss: Loss, name: str) -> float:
    value, count = loss.metrics[name]
    return value.item() / count.item()


def slow_loss(objective: PPO, experience: Experience, output: Output) -> tuple[float, list[dict[str, float]]]:
    """The loss as a loop over tokens, and what it found at each."""
    assert output.logps is not None and output.values is not None and output.entropy is not None
    found = dict(experience) | {"new": output.logps, "value": output.values, "entropy": output.entropy}
    names = {"old": "old_logps", "ref": "ref_logps", "old_value": "values", "advantage": "advantages"}
    rows = slow.as_rows(found, new="new", value="value", entropy="entropy", target="returns", **names)
    tokens, total = [], []
    for row in rows:
        for t in range(len(row["new"])):
            at = {name: values[t] for name, values in row.items()}
            token = slow.token_loss(
                **{k: v for k, v in at.items() if k not in ("ref", "entropy")},
                clip=objective.clip,
                dual_clip=objective.dual_clip,
                value_clip=objective.value_clip,
            )
            loss = token["policy"] + objective.value_coef * token["value"] - objective.entropy_coef * at["entropy"]
            if objective.kl_in == "loss":
                loss += objective.kl_coef * slow.KL[objective.kl_estimator](at["new"] - at["ref"])
            total.append(loss)
            tokens.append(token | {"entropy": at["entropy"]})
    return math.fsum(total), tokens


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_matches_a_loop_over_tokens(options: dict[str, Any]) -> None:
    objective = PPO(**options)
    experience = objective.prepare(rollouts())
    output = policy_output(experience)
    loss = objective.loss(output, experience)
    assert isinstance(loss.total, Tensor)
    total, tokens = slow_loss(objective, experience, output)
    assert loss.total.item() == pytest.approx(total, rel=EXACT)
    assert objective.weight(experience).item() == len(tokens)
    for metric, name in {
        "policy/approxkl_avg": "approxkl",
        "policy/clipfrac_avg": "clipped",
        "policy/entropy_avg": "entropy",
        "loss/policy_avg": "policy",
        "loss/value_avg": "value",
        "val/clipfrac_avg": "value_clipped",
        "val/ratio": "ratio",
    }.items():
        assert mean_of(loss, metric) == pytest.approx(slow.mean([t[name] for t in tokens]), rel=EXACT), metric
    ratios = [t["ratio"] for t in tokens]
    spread = slow.mean([(r - slow.mean(ratios)) ** 2 for r in ratios])
    assert mean_of(loss, "val/ratio_var") == pytest.approx(spread, rel=EXACT)


def test_the_loss_has_the_gradient_of_its_definition() -> None:
    """Central differences of the loop over tokens, one log-probability, value and entropy at a time."""
    objective = PPO(dual_clip=1.3, entropy_coef=0.3, kl_coef=0.5, kl_estimator="k3", kl_in="loss")
    experience = objective.prepare(rollouts(prompts=(1, 3), completions=(4, 3)))
    output = policy_output(experience)
    leaves = {"logps": output.logps, "values": output.values, "entropy": output.entropy}
    total = objective.loss(output, experience).total
    gradients = torch.autograd.grad(total, list(leaves.values()))
    step = 1e-6
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        for b, t in experience["loss_mask"].nonzero().tolist():
            around = []
            for sign in (1, -1):
                moved = leaf.detach().clone()
                moved[b, t] += sign * step
                fields = {k: v.detach() for k, v in leaves.items()} | {name: moved}
                around.append(slow_loss(objective, experience, Output(**fields))[0])
            # the differences of sums of size 10 are known to 1e-15 * 10 / step
            assert gradient[b, t].item() == pytest.approx((around[0] - around[1]) / (2 * step), abs=1e-6), (name, b, t)


def test_masked_terms_match_trls_trainer() -> None:
    """TRL's PPOTrainer on one minibatch: masked means of the clipped surrogate and of half the clipped value error."""
    objective = PPO(clip=0.2, value_clip=0.2, value_coef=0.1)
    experience = objective.prepare(rollouts())
    output = policy_output(experience)
    mask, advantages = experience["loss_mask"], experience["advantages"]

    def masked(values: Tensor) -> Tensor:
        return (values * mask).sum() / mask.sum()

    ratio = torch.exp(output.logps - experience["old_logps"])
    plain, limited = -advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)
    policy = masked(torch.max(plain, limited))
    near = torch.clamp(output.values, experience["values"] - 0.2, experience["values"] + 0.2)
    errors = (output.values - experience["returns"]) ** 2, (near - experience["returns"]) ** 2
    value = 0.5 * masked(torch.max(*errors))
    loss = objective.loss(output, experience)
    torch.testing.assert_close(loss.total / objective.weight(experience), policy + 0.1 * value, rtol=EXACT, atol=EXACT)
    assert mean_of(loss, "policy/clipfrac_avg") == pytest.approx(masked((limited > plain).double()).item())
    assert mean_of(loss, "val/clipfrac_avg") == pytest.approx(masked((errors[1] > errors[0]).double()).item())
    approx = 0.5 * masked((output.logps - experience["old_logps"]) ** 2)
    assert mean_of(loss, "policy/approxkl_avg") == pytest.approx(approx.item())


def test_at_ratio_1_the_policy_loss_is_minus_the_mean_advantage() -> None:
    objective = PPO(whiten_advantages=False)
    experience = objective.prepare(rollouts())
    mask = experience["loss_mask"]
    logps = experience["old_logps"].clone().requires_grad_()
    output = Output(logps=logps, values=experience["values"], entropy=torch.zeros_like(logps))
    loss = objective.loss(output, experience)
    assert mean_of(loss, "loss/policy_avg") == pytest.approx(-experience["advantages"][mask].mean().item(), rel=1e-12)
    assert mean_of(loss, "val/ratio") == 1.0
    for name in ("val/ratio_var", "policy/approxkl_avg", "policy/clipfrac_avg"):
        assert mean_of(loss, name) == 0.0
    (gradient,) = torch.autograd.grad(loss.total, logps)
    torch.testing.assert_close(gradient, -experience["advantages"], rtol=1e-12, atol=0)


# ---------------------------------------------------------------------- what each option changes


def one_token(advantage: float, log_ratio: float, **options: Any) -> tuple[float, float]:
    """Policy loss and its gradient by the log-probability, of one token."""
    logps = torch.tensor([[0.0, -1.0 + log_ratio]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    mask = torch.tensor([[False, True]])
    experience = Experience(tokens=mask.long(), mask=mask | True, loss_mask=mask, values=zero, returns=zero)
    experience["old_logps"] = torch.tensor([[0.0, -1.0]], dtype=torch.float64)
    experience["advantages"] = torch.tensor([[0.0, advantage]], dtype=torch.float64)
    loss = PPO(**options).loss(Output(logps=logps, values=zero, entropy=zero), experience)
    assert isinstance(loss.total, Tensor)
    return loss.total.item(), torch.autograd.grad(loss.total, logps)[0][0, 1].item()


@pytest.mark.parametrize(
    ("advantage", "ratio", "clipped"),
    [(2.0, 1.5, True), (2.0, 0.5, False), (-2.0, 0.5, True), (-2.0, 1.5, False), (2.0, 1.1, False), (-2.0, 0.9, False)],
)
def test_defect_clip_flag_never_applied(advantage: float, ratio: float, clipped: bool) -> None:
    """Beyond 1 +- clip the loss is constant, but only on the side where moving further would be rewarded."""
    loss, gradient = one_token(advantage, math.log(ratio), clip=0.2)
    bound = 1.2 if ratio > 1 else 0.8
    assert loss == pytest.approx(-advantage * (bound if clipped else ratio))
    assert gradient == pytest.approx(0.0 if clipped else -advantage * ratio)
    loss, gradient = one_token(advantage, math.log(ratio), clip=0.9)
    assert loss == pytest.approx(-advantage * ratio) and gradient == pytest.approx(-advantage * ratio)


@pytest.mark.parametrize(
    ("advantage", "ratio", "bounded"), [(-2.0, 5.0, True), (-2.0, 2.9, False), (2.0, 5.0, False), (-2.0, 0.1, False)]
)
def test_dual_clip_bounds_the_loss_of_negative_advantages_only(advantage: float, ratio: float, bounded: bool) -> None:
    without, _ = one_token(advantage, math.log(ratio))
    loss, gradient = one_token(advantage, math.log(ratio), dual_clip=3.0)
    assert loss == pytest.approx(6.0 if bounded else without)
    if bounded:
        assert gradient == 0.0 and without == pytest.approx(10.0)


def test_defect_probability_used_where_log_probability_was_meant() -> None:
    """The ratio is that of the probabilities of two distributions, not of their logarithms or differences."""
    new, old = torch.tensor([0.1, 0.6, 0.3]), torch.tensor([0.2, 0.5, 0.3])
    for token in range(3):
        loss, _ = one_token(-1.0, (new.log() - old.log())[token].item(), clip=0.9)
        assert loss == pytest.approx((new / old)[token].item(), rel=1e-6)  # float32 probabilities


def test_value_clip_keeps_values_near_the_old_ones() -> None:
    losses = {}
    for value_clip in (None, 1e-3, 1e3):
        objective = PPO(value_clip=value_clip)
        experience = objective.prepare(rollouts())
        losses[value_clip] = mean_of(objective.loss(policy_output(experience), experience), "loss/value_avg")
    assert losses[1e3] == pytest.approx(losses[None]), "a wide clip clips nothing"
    assert losses[1e-3] > losses[None], "the larger of both errors counts"


def test_the_value_loss_alone_moves_the_values_and_the_policy_terms_the_policy() -> None:
    objective = PPO(value_coef=0.5)
    experience = objective.prepare(rollouts())
    output = policy_output(experience)
    assert output.logps is not None and output.values is not None and output.entropy is not None
    objective.loss(output, experience).total.backward()
    half = Output(**{k: getattr(output, k).detach().clone().requires_grad_() for k in ("logps", "values", "entropy")})
    PPO(value_coef=0.25).loss(half, experience).total.backward()
    torch.testing.assert_close(output.values.grad, 2 * half.values.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.logps.grad, half.logps.grad, rtol=1e-12, atol=0)
    assert output.entropy.grad is None, "without a coefficient the entropy is only looked at"


def test_extreme_ratios_are_finite() -> None:
    for options in ({}, {"kl_estimator": "k3", "kl_in": "loss"}):
        objective = PPO(**options)  # type: ignore[arg-type]
        experience = objective.prepare(rollouts(dtype=torch.float32))
        for shift in (-1e4, -100.0, 100.0, 1e4):
            logps = (experience["old_logps"] + shift).requires_grad_()
            zero = torch.zeros_like(logps)
            loss = objective.loss(Output(logps=logps, values=zero, entropy=zero), experience)
            assert loss.total.isfinite()
            assert torch.autograd.grad(loss.total, logps)[0].isfinite().all()
            assert all(value.isfinite() for value, _ in loss.metrics.values())


@pytest.mark.parametrize("garbage", [-1e30, 1e30])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_outside_the_completions_has_influence(options: dict[str, Any], garbage: float) -> None:
    objective = PPO(**options)
    dirty = objective.prepare(rollouts(garbage=garbage))
    clean = objective.prepare(rollouts())
    outputs = [policy_output(dirty, garbage=garbage), policy_output(clean)]
    losses = [objective.loss(o, e) for o, e in zip(outputs, (dirty, clean), strict=True)]
    assert losses[0].total.item() == losses[1].total.item()
    for name, (value, count) in losses[1].metrics.items():
        assert losses[0].metrics[name][0].item() == value.item() and losses[0].metrics[name][1] == count, name
    for loss in losses:
        loss.total.backward()
    for name in ("logps", "values"):
        wrong, right = (getattr(o, name).grad for o in outputs)
        assert torch.equal(wrong, right), name
        assert not wrong[~clean["loss_mask"]].any(), name


def test_metrics_carry_no_graph() -> None:
    objective = PPO(entropy_coef=0.1)
    experience = objective.prepare(rollouts())
    loss = objective.loss(policy_output(experience), experience)
    assert not any(value.requires_grad for value, _ in loss.metrics.values())
