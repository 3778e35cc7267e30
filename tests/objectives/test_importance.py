"""The correction for completions that came from other kernels or older weights than those trained."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from lit_palm.objectives import PPO
from lit_palm.objectives.functional import IMPORTANCE_CAP, importance_metrics, importance_weights
from lit_palm.types import Experience, Output


def batch(seed: int = 0) -> tuple[Output, Experience]:
    """Rows of ragged completions in float64, with an engine that is off by up to a nat and a half."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(3, 6, generator=generator, dtype=torch.float64)

    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).bool()
    old = -draw().abs()
    experience = Experience(
        tokens=torch.zeros(3, 6, dtype=torch.long), mask=torch.ones_like(mask), loss_mask=mask, old_logps=old,
        rollout_logps=old + draw(0.8), advantages=draw(), returns=draw(), values=draw(), ref_logps=draw(),
    )  # fmt: skip
    logps = (old + draw(0.2)).requires_grad_()
    return Output(logps=logps, values=draw(), entropy=draw().abs()), experience


@pytest.mark.parametrize("cap", [1.2, 2.0, 50.0])
def test_ppo_weighs_tokens_as_a_slow_loop_does(cap: float) -> None:
    """min(p_old / p_rollout, C) times the clipped surrogate, token by token; the value loss is as it was."""
    objective = PPO(kl_coef=0.0, importance_cap=cap, value_coef=0.1)
    assert "rollout_logps" in objective.needs
    output, experience = batch()
    total, gradient = 0.0, torch.zeros(3, 6, dtype=torch.float64)
    values, capped = output.values, 0
    for b in range(3):
        for t in range(6):
            if not experience["loss_mask"][b, t]:
                continue
            old, rollout = experience["old_logps"][b, t].item(), experience["rollout_logps"][b, t].item()
            new, advantage = output.logps[b, t].item(), experience["advantages"][b, t].item()
            weight = min(math.exp(old - rollout), cap)
            capped += weight == cap
            ratio = math.exp(new - old)
            clipped = min(max(ratio, 0.8), 1.2)
            loss = max(-advantage * ratio, -advantage * clipped)
            total += weight * loss
            gradient[b, t] = -weight * advantage * ratio if loss == -advantage * ratio else 0.0
            v, kept, goal = (x[b, t].item() for x in (values, experience["values"], experience["returns"]))
            near = kept + min(max(v - kept, -0.2), 0.2)
            total += 0.1 * 0.5 * max((v - goal) ** 2, (near - goal) ** 2)
    found = objective.loss(output, experience)
    assert found.total.item() == pytest.approx(total, abs=1e-12)
    found.total.backward()
    assert torch.allclose(output.logps.grad, gradient, atol=1e-12)
    assert capped > 0 or cap == 50.0


def test_it_is_the_formula_of_trl() -> None:
    """TRL 1.16 (GRPOTrainer, `token_truncate`): torch.clamp(torch.exp(old - sampling), max=C)."""
    _, experience = batch()
    old, rollout, mask = experience["old_logps"], experience["rollout_logps"], experience["loss_mask"]
    theirs = torch.clamp(torch.exp(old - rollout), max=2.0)
    ours = importance_weights(old, rollout, mask, 2.0)
    assert torch.equal(ours[mask], theirs[mask]) and bool((ours[~mask] == 1).all())
    assert not importance_weights(old.clone().requires_grad_(), rollout, mask, 2.0).requires_grad


def test_an_engine_that_agrees_changes_nothing() -> None:
    output, experience = batch()
    experience["rollout_logps"] = experience["old_logps"].clone()
    plain = PPO(kl_coef=0.0, importance_cap=None).loss(output, experience)
    weighed = PPO(kl_coef=0.0, importance_cap=2.0).loss(output, experience)
    assert torch.equal(plain.total, weighed.total)


def test_it_turns_itself_on_where_completions_come_from_elsewhere() -> None:
    objective = PPO()
    assert objective.importance_cap is None and "rollout_logps" not in objective.needs
    objective.sampled_elsewhere()
    assert objective.importance_cap == IMPORTANCE_CAP and "rollout_logps" in objective.needs
    for given in (None, 3.0):
        told = PPO(importance_cap=given)
        told.sampled_elsewhere()
        assert told.importance_cap == given
    with pytest.raises(ValueError, match="importance_cap must be positive"):
        PPO(importance_cap=0.0)


def test_what_is_logged_of_it() -> None:
    _, experience = batch()
    fields: Any = experience["old_logps"], experience["rollout_logps"], experience["loss_mask"]
    before = copy.deepcopy(fields)
    found = importance_metrics(*fields, 1.2)
    ratios = [math.exp(x) for x in (fields[0] - fields[1])[fields[2]].tolist()]
    assert found["rollout/importance_ratio_mean"] == pytest.approx(sum(ratios) / len(ratios))
    assert found["rollout/importance_ratio_max"] == pytest.approx(max(ratios))
    assert found["rollout/importance_ratio_clipped"] == pytest.approx(sum(r > 1.2 for r in ratios) / len(ratios))
    gaps = [abs(math.log(r)) for r in ratios]
    assert found["rollout/logp_gap"] == pytest.approx(sum(gaps) / len(gaps))
    assert all(torch.equal(a, b) for a, b in zip(fields, before, strict=True))
    assert "rollout/importance_ratio_clipped" not in importance_metrics(*fields, None)
