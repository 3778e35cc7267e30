"""Every variant, from rewards to gradients, against a loop written from its paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import slow_grpo as slow
import torch
from grpo_batches import as_rows, loss_and_gradient, policy_output, rollouts
from lit_palm_grpo import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO, ReinforcePlusPlus
from slow_grpo import Row
from torch import Tensor

# float64: the same terms in another order
EXACT = {"rtol": 1e-9, "atol": 1e-11}

CASES: dict[str, tuple[GRPO, Callable[[Sequence[Row]], Tensor]]] = {
    "GRPO": (GRPO(), slow.grpo),
    "GRPO, other numbers": (
        GRPO(clip_low=0.05, clip_high=0.05, kl_coef=0.5),
        lambda rows: slow.grpo(rows, epsilon=0.05, beta=0.5),
    ),
    "DrGRPO": (DrGRPO(max_completion_length=8), lambda rows: slow.dr_grpo(rows, longest=8)),
    "RLOO": (RLOO(), slow.rloo),
    "RLOO, dear reference": (RLOO(kl_coef=1.0), lambda rows: slow.rloo(rows, beta=1.0)),
    "ReinforcePlusPlus": (ReinforcePlusPlus(), slow.reinforce_plus_plus),
    "ReinforcePlusPlus, dear reference": (
        ReinforcePlusPlus(kl_coef=1.0),
        lambda rows: slow.reinforce_plus_plus(rows, beta=1.0),
    ),
    "DAPO": (DAPO(), slow.dapo),
    "GSPO": (GSPO(), slow.gspo),
    "GSPO-token": (
        GSPO(importance_sampling_level="sequence_token"),
        lambda rows: slow.gspo(rows, of_tokens=True),
    ),
    "CISPO": (CISPO(), slow.cispo),
    "CISPO, low bound": (CISPO(clip_high=0.1), lambda rows: slow.cispo(rows, high=0.1)),
}


# near 0 GSPO clips some sequences and not others, at .3 the others do
@pytest.mark.parametrize("step", [0.3, 5e-4])
@pytest.mark.parametrize("name", list(CASES))
def test_value_and_gradient_are_those_of_the_paper(name: str, step: float) -> None:
    objective, paper = CASES[name]
    experience = objective.prepare(rollouts(garbage=1e30))
    output = policy_output(experience, step, garbage=-1e30)
    assert output.logps is not None
    value, gradient = loss_and_gradient(objective, experience, output)
    expected = paper(as_rows(experience, output.logps))
    torch.testing.assert_close(value, expected.detach(), **EXACT)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, output.logps)[0], **EXACT)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", ["GRPO", "DrGRPO", "RLOO", "ReinforcePlusPlus", "DAPO", "GSPO", "CISPO"])
def test_some_tokens_are_clipped_and_some_are_not(name: str) -> None:
    """Otherwise the comparisons above would not show what clipping does."""
    objective, _ = CASES["CISPO, low bound" if name == "CISPO" else name]
    experience = objective.prepare(rollouts())
    loss = objective.loss(policy_output(experience, 5e-4 if name == "GSPO" else 0.3), experience)
    clipped, count = loss.metrics["clip_ratio/region_mean"]
    assert 0 < clipped < count


def test_dapo_punishes_long_completions_softly() -> None:
    """Yu et al. 2025, equation 13: shaped rewards are compared, so the advantages change, not the loss."""
    objective = DAPO(max_completion_length=8, overlong_cache=4)
    experience = objective.prepare(rollouts())
    output = policy_output(experience)
    assert output.logps is not None
    rows = as_rows(experience, output.logps)
    for row in rows:
        row.reward += slow.overlong(row.length, longest=8, cache=4)
    value, gradient = loss_and_gradient(objective, experience, output)
    expected = slow.dapo(rows)
    torch.testing.assert_close(value, expected.detach(), **EXACT)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, output.logps)[0], **EXACT)
    plain, _ = loss_and_gradient(DAPO(), DAPO().prepare(rollouts()), output)
    assert (value - plain).abs() > 1e-3


def test_rloos_first_step_is_reinforce_on_whole_completions() -> None:
    """Ahmadian et al. 2024: the gradient of log pi(y) is multiplied by R(y) less the others' mean."""
    experience = RLOO().prepare(rollouts())
    output = policy_output(experience, step=0.0)
    assert output.logps is not None
    _, gradient = loss_and_gradient(RLOO(), experience, output)
    rows = as_rows(experience, output.logps)
    for b, advantage in enumerate(slow.leave_one_out(rows, beta=0.05)):
        mask = experience["loss_mask"][b]
        expected = torch.full((int(mask.sum()),), -advantage / len(rows), dtype=torch.float64)
        torch.testing.assert_close(gradient[b, mask], expected, **EXACT)


def test_reinforce_plus_plus_needs_no_groups() -> None:
    objective = ReinforcePlusPlus()
    experience = objective.prepare(rollouts(groups=tuple(range(9))))
    output = policy_output(experience)
    assert output.logps is not None
    value, _ = loss_and_gradient(objective, experience, output)
    torch.testing.assert_close(value, slow.reinforce_plus_plus(as_rows(experience, output.logps)).detach(), **EXACT)


def test_reinforce_plus_plus_with_a_baseline() -> None:
    """Hu et al. 2025, REINFORCE++-baseline: the prompt's mean is subtracted, then all tokens are whitened."""
    options: dict[str, Any] = {"baseline": "group", "kl_in": "loss", "kl_estimator": "k2", "kl_coef": 0.3}
    objective = ReinforcePlusPlus(**options)
    experience = objective.prepare(rollouts())
    output = policy_output(experience)
    assert output.logps is not None
    rows = as_rows(experience, output.logps)
    expected = torch.zeros((), dtype=torch.float64)
    for row in rows:
        for new, ref in zip(row.new, row.ref, strict=True):
            expected = expected + 0.3 * (new - ref) ** 2 / 2
    expected = expected / sum(row.length for row in rows)
    means = [sum(r := slow.rewards_of_prompt(rows, row)) / len(r) for row in rows]
    for row, mean in zip(rows, means, strict=True):
        row.reward -= mean
    expected = expected + slow.reinforce_plus_plus(rows, beta=0.0)
    value, gradient = loss_and_gradient(objective, experience, output)
    torch.testing.assert_close(value, expected.detach(), **EXACT)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, output.logps)[0], **EXACT)
