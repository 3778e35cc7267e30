"""What PPO carries from step to step and decides about steps: warm-up, early stop, state, and refused arguments."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from policy_batches import policy_output, rollouts

from lit_palm.objectives import PPO
from lit_palm.types import Loss


def round_trip(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file that may hold nothing but tensors and plain data, as in a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def step(objective: PPO, seed: int) -> Loss:
    """Prepare a collection of its own and take the loss of all of it."""
    experience = objective.prepare(rollouts(seed=seed))
    return objective.loss(policy_output(experience, seed=seed), experience)


@pytest.mark.parametrize(
    "options",
    [
        {"kl_target": 0.5, "kl_horizon": 20},
        {"scale_reward": "running", "center_reward": True},
        {"scale_reward": "ref"},
        {"value_warmup": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_defect_counters_kl_coefficient_and_moments_lost_on_resume(options: dict[str, Any], stop: int) -> None:
    straight, first, resumed = PPO(**options), PPO(**options), PPO(**options)
    for seed in range(stop):
        step(straight, seed)
        step(first, seed)
    resumed.load_state_dict(round_trip(first.state_dict()))
    for seed in range(stop, stop + 3):
        want, got = (step(o, seed) for o in (straight, resumed))
        assert torch.equal(got.total, want.total)
        assert got.frozen == want.frozen
        assert resumed.state_dict() == straight.state_dict()
    fresh = PPO(**options)
    losses = [step(o, stop) for o in (fresh, resumed)]
    assert fresh.state_dict() != resumed.state_dict() or losses[0].total != losses[1].total, "the state matters here"


def test_a_fixed_coefficient_is_the_configurations_not_the_checkpoints() -> None:
    state = PPO(kl_coef=0.5).state_dict()
    fixed, adaptive = PPO(kl_coef=0.1), PPO(kl_coef=0.1, kl_target=6.0)
    for objective in (fixed, adaptive):
        objective.load_state_dict(state)
    assert fixed.kl_coef == 0.1 and adaptive.kl_coef == 0.5


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_value_warmup_freezes_the_policy_for_so_many_collections(warmup: int) -> None:
    objective = PPO(value_warmup=warmup)
    frozen = [step(objective, seed).frozen for seed in range(5)]
    assert frozen == [frozenset({"policy"})] * warmup + [frozenset()] * (5 - warmup)


def test_all_minibatches_of_a_collection_are_of_one_mind_about_warmup() -> None:
    objective = PPO(value_warmup=1)
    for frozen in (frozenset({"policy"}), frozenset()):
        experience = objective.prepare(rollouts())
        for _ in range(3):
            assert objective.loss(policy_output(experience), experience).frozen == frozen


def test_an_update_stops_beyond_max_update_kl_only() -> None:
    objective = PPO(max_update_kl=0.02)
    assert objective.watches == ("policy/approxkl_avg",)
    experience = objective.prepare(rollouts())
    for distance, stops in ((0.1, False), (0.3, True)):  # half the squared step: 0.005 and 0.045
        output = policy_output(experience)
        output.logps = torch.where(experience["loss_mask"], experience["old_logps"] + distance, 0)
        value, count = objective.loss(output, experience).metrics["policy/approxkl_avg"]
        assert objective.after_step({"policy/approxkl_avg": (value / count).item()}) is stops


def test_without_max_update_kl_nothing_is_watched_and_no_update_stops() -> None:
    objective = PPO()
    assert objective.watches == ()
    assert objective.after_step({}) is False and objective.after_step({"policy/approxkl_avg": 1e9}) is False


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"clip": 0.0}, "clip"),
        ({"dual_clip": 1.1}, "dual_clip"),
        ({"gamma": 1.1}, "gamma"),
        ({"lam": -0.1}, "lam"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"value_coef": -1.0}, "value_coef"),
        ({"kl_horizon": 0}, "kl_horizon"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target"),
        ({"kl_target": 0.0}, "kl_target"),
        ({"kl_in": "loss"}, "k2 or k3"),
        ({"kl_in": "nowhere"}, "reward, loss"),
        ({"kl_estimator": "k4"}, "k1, k2, k3"),
        ({"scale_reward": "sometimes"}, "none, running, ref"),
        ({"center_reward": True}, "scale_reward"),
        ({"clip_reward": -1.0}, "clip_reward"),
        ({"value_clip": 0.0}, "value_clip"),
        ({"max_update_kl": 0.0}, "max_update_kl"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_meant_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        PPO(**options)
