"""The loss as a sum: micro-batches, padding, filler rows, extremes, and what each option must change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grpo_batches import cut, loss_and_gradient, mean_of, policy_output, rollouts
from hypothesis import given, settings
from hypothesis import strategies as st
from lit_palm_grpo import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO, ReinforcePlusPlus
from torch import Tensor

from lit_palm import Experience, Output

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64: the same terms in another order

OBJECTIVES: dict[str, GRPO] = {
    "GRPO": GRPO(entropy_coef=0.1, dual_clip=1.4),
    "DrGRPO": DrGRPO(),
    "RLOO": RLOO(),
    "ReinforcePlusPlus": ReinforcePlusPlus(),
    "DAPO": DAPO(importance_cap=2.0, max_completion_length=8, overlong_cache=3),
    "DAPO, filtered": DAPO(mask_truncated_completions=True),
    "GSPO": GSPO(clip_low=0.1, clip_high=0.1),
    "GSPO-token": GSPO(clip_low=0.1, clip_high=0.1, importance_sampling_level="sequence_token"),
    "CISPO": CISPO(kl_coef=0.1),
}


def summed(
    objective: GRPO, experience: Experience, output: Output, parts: list[Tensor]
) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Loss, weight and metrics of the rows, handed over in parts."""
    total, weight, metrics = torch.zeros((), dtype=torch.float64), 0.0, {}
    for rows in parts:
        part = experience.select(rows)
        loss = objective.loss(cut(output, rows, part["tokens"].shape[1]), part)
        assert isinstance(loss.total, Tensor)
        total, weight = total + loss.total, weight + float(objective.weight(part))
        for name, (value, count) in loss.metrics.items():
            metrics[name] = metrics.get(name, 0) + torch.stack([value.double(), count.double()])
    return total, weight, metrics


@pytest.mark.parametrize("name", list(OBJECTIVES))
@settings(max_examples=10, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 8)),
    order=st.permutations(range(9)),
    garbage=st.sampled_from([0.0, -1e30, float("nan")]),
)
def test_every_partition_sums_up_to_the_same(name: str, cuts: set[int], order: list[int], garbage: float) -> None:
    """Also of rows of one prompt apart from each other: advantages are made once a collection."""
    objective = OBJECTIVES[name]
    experience = objective.prepare(rollouts(garbage=garbage))
    output = policy_output(experience, garbage=garbage)
    whole, weight, metrics = summed(objective, experience, output, [torch.arange(9)])
    parts = list(torch.tensor(order).tensor_split(sorted(cuts)))
    total, same, others = summed(objective, experience, output, parts)
    torch.testing.assert_close(total, whole, **EXACT)
    assert same == weight and weight > 0
    for metric, value in metrics.items():
        torch.testing.assert_close(others[metric], value, **EXACT)
    of_whole, of_parts = (torch.autograd.grad(x, output.logps, retain_graph=True)[0] for x in (whole, total))
    torch.testing.assert_close(of_parts, of_whole, **EXACT)
    assert of_whole.isfinite().all() and (of_whole[~experience["loss_mask"]] == 0).all()


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_padding_changes_neither_sum_nor_weight(name: str) -> None:
    objective = OBJECTIVES[name]
    experience, wide = objective.prepare(rollouts()), objective.prepare(rollouts(padding=5, garbage=12345.0))
    output, padded = policy_output(experience), policy_output(wide, garbage=12345.0)
    torch.testing.assert_close(
        loss_and_gradient(objective, wide, padded)[0], loss_and_gradient(objective, experience, output)[0], **EXACT
    )
    assert objective.weight(wide) == objective.weight(experience)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_rows_that_fill_a_batch_weigh_nothing(name: str) -> None:
    objective = OBJECTIVES[name]
    experience = objective.prepare(rollouts())
    output = policy_output(experience)
    without = summed(objective, experience, output, [torch.arange(8)])
    experience["loss_mask"][8] = False
    with_filler = summed(objective, experience, output, [torch.arange(9)])
    torch.testing.assert_close(with_filler[0], without[0], **EXACT)
    assert with_filler[1] == without[1]
    nothing = summed(objective, experience, output, [torch.tensor([8])])
    assert nothing[0] == 0 and nothing[1] == 0 and nothing[0].requires_grad


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("far", [50.0, 1e4, 1e30])
def test_gradients_are_finite_far_from_everything(name: str, far: float) -> None:
    objective = OBJECTIVES[name]
    for sign in (1, -1):
        for moved in ("output", "old_logps", "ref_logps", "rollout_logps"):
            experience = rollouts(dtype=torch.float32)
            if moved != "output":  # every other token
                experience[moved] = experience[moved] - sign * far * (torch.arange(experience[moved].shape[1]) % 2)
            experience = objective.prepare(experience)
            output = policy_output(experience)
            assert output.logps is not None
            if moved == "output":
                output.logps = (output.logps.detach() - sign * far).requires_grad_()
            total = objective.loss(output, experience).total
            assert isinstance(total, Tensor)
            (gradient,) = torch.autograd.grad(total, output.logps)
            assert gradient.isfinite().all() and total.isfinite(), (sign, moved)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_first_step_has_ratio_1(name: str) -> None:
    """The loss of an unmoved policy has the gradient of -A log p whatever the ratio's level and clipping."""
    objective = OBJECTIVES[name]
    experience = objective.prepare(rollouts())
    output = policy_output(experience, step=0.0)
    metrics = objective.loss(output, experience).metrics
    assert mean_of(metrics, "val/ratio") == 1.0
    assert mean_of(metrics, "clip_ratio/region_mean") == 0.0
    with_old = loss_and_gradient(objective, experience, output)[1]
    del experience["old_logps"]
    torch.testing.assert_close(loss_and_gradient(objective, experience, output)[1], with_old, **EXACT)


def test_all_levels_agree_on_completions_of_one_token() -> None:
    experience = rollouts(completions=(1,) * 9)
    output = policy_output(experience)
    found = []
    for level in ("token", "sequence", "sequence_token", "trajectory"):
        objective = GRPO(importance_sampling_level=level)  # type: ignore[arg-type]
        found.append(loss_and_gradient(objective, objective.prepare(rollouts(completions=(1,) * 9)), output))
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0], **EXACT)
        torch.testing.assert_close(gradient, found[0][1], **EXACT)


# ------------------------------------------------------------------------------------------ options, by hand


def one_token(advantage: float, ratio: float, **fields: float) -> tuple[Experience, Output]:
    """A single token with an advantage, at a ratio of new to old probability."""
    mask = torch.tensor([[False, True]])
    values = {"old_logps": -2.0, "ref_logps": -2.0, "rollout_logps": -2.0, **fields}
    experience = Experience(
        tokens=torch.ones(1, 2, dtype=torch.long),
        mask=torch.ones(1, 2, dtype=torch.bool),
        loss_mask=mask,
        advantages=torch.tensor([advantage], dtype=torch.float64),
        **{name: torch.tensor([[0.0, value]], dtype=torch.float64) for name, value in values.items()},
    )
    logps = torch.tensor([[0.0, values["old_logps"] + torch.tensor(ratio, dtype=torch.float64).log()]])
    return experience, Output(logps=logps.double().requires_grad_())


@pytest.mark.parametrize(
    "options, advantage, ratio, loss, slope",
    [
        ({}, 1.0, 1.1, -1.1, -1.1),
        ({}, 1.0, 1.5, -1.2, 0.0),  # clipped from above: nothing more to gain
        ({}, 1.0, 0.5, -0.5, -0.5),  # worse than before: not clipped
        ({}, -1.0, 0.5, 0.8, 0.0),
        ({}, -1.0, 3.0, 3.0, 3.0),
        ({"dual_clip": 2.0}, -1.0, 3.0, 2.0, 0.0),
        ({"dual_clip": 2.0}, -1.0, 1.5, 1.5, 1.5),
        ({"clip_high": 0.5}, 1.0, 1.4, -1.4, -1.4),
        ({"clip_high": None}, 1.0, 9.0, -9.0, -9.0),
        ({"clip_low": None}, -1.0, 0.1, 0.1, 0.1),
        ({"clip_low": 0.5}, -1.0, 0.4, 0.5, 0.0),
    ],
)
def test_clipping_by_hand(options: dict[str, Any], advantage: float, ratio: float, loss: float, slope: float) -> None:
    """The slope is with respect to the log-probability, where the ratio's own derivative is the ratio."""
    experience, output = one_token(advantage, ratio)
    value, gradient = loss_and_gradient(GRPO(kl_coef=0.0, **options), experience, output)
    assert value.item() == pytest.approx(loss) and gradient[0, 1].item() == pytest.approx(slope)


def test_the_weight_for_another_engine_by_hand() -> None:
    """The trainer finds the token e times likelier than the engine said; at most 2 of that counts."""
    experience, output = one_token(1.0, 1.1, rollout_logps=-3.0)
    free, capped = GRPO(kl_coef=0.0, importance_cap=10.0), GRPO(kl_coef=0.0, importance_cap=2.0)
    assert loss_and_gradient(free, experience, output)[0].item() == pytest.approx(-1.1 * 2.718281828459045)
    assert loss_and_gradient(capped, experience, output)[0].item() == pytest.approx(-2.2)
    assert mean_of(capped.loss(output, experience).metrics, "sampling/importance_mean") == 2.0
    assert loss_and_gradient(GRPO(kl_coef=0.0), experience, output)[0].item() == pytest.approx(-1.1)
    # the price of divergence is no expectation over samples that the engine gets wrong
    priced = GRPO(kl_coef=1.0, importance_cap=2.0, kl_estimator="k2")
    log_ratio = torch.tensor(1.1).log().item()
    assert loss_and_gradient(priced, experience, output)[0].item() == pytest.approx(-2.2 + log_ratio**2 / 2, rel=1e-6)


def test_entropy_is_rewarded_and_logged_only_when_asked() -> None:
    experience = GRPO().prepare(rollouts())
    output = policy_output(experience)
    assert output.logps is not None and output.entropy is not None
    bonus = GRPO(entropy_coef=0.5)
    plain, more = loss_and_gradient(GRPO(), experience, output)[0], loss_and_gradient(bonus, experience, output)[0]
    of_rows = [output.entropy[b, mask].mean().item() for b, mask in enumerate(experience["loss_mask"])]
    assert (plain - more).item() == pytest.approx(0.5 * sum(of_rows) / len(of_rows))
    assert "entropy" not in GRPO().loss(Output(logps=output.logps), experience).metrics
    assert "entropy" in bonus.needs and "entropy" not in GRPO().needs


def test_aggregations_by_hand() -> None:
    """Two completions of 1 and 3 tokens with losses 1 and 3 a token."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    ones = torch.ones(2, 3, dtype=torch.float64)
    experience = Experience(
        tokens=torch.ones(2, 3, dtype=torch.long), mask=mask, loss_mask=mask, old_logps=-ones,
        advantages=torch.tensor([-1.0, -3.0], dtype=torch.float64),
    )  # fmt: skip

    def mean(**options: Any) -> float:
        objective = GRPO(kl_coef=0.0, **options)
        return loss_and_gradient(objective, experience, Output(logps=(-ones).requires_grad_()))[0].item()

    assert mean(aggregation="row") == pytest.approx((1 + 3) / 2)
    assert mean(aggregation="token") == pytest.approx((1 + 9) / 4)
    assert mean(aggregation="constant", max_completion_length=5) == pytest.approx((1 / 5 + 9 / 5) / 2)
