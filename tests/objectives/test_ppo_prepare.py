"""What PPO makes of a collection: shaped rewards, advantages, returns and `objective/*`, against loops over tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import slow_rlhf as slow
import torch
from policy_batches import rollouts

from lit_palm.objectives import PPO
from lit_palm.types import Experience

# float64 against Python floats: the same sums in another order
EXACT = 1e-9


def scattered(experience: Experience, rows: list[list[float]]) -> torch.Tensor:
    """Lists of completion tokens back in [B, T], zero elsewhere."""
    out = torch.zeros(experience["tokens"].shape, dtype=torch.float64)
    out[experience["loss_mask"]] = torch.tensor([v for row in rows for v in row], dtype=torch.float64)
    return out


def expected(
    experience: Experience, beta: float, scores: list[float], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = slow.as_rows(experience, old="old_logps", ref="ref_logps", values="values")
    advantages, returns = slow.prepare(rows, scores, beta=beta, **options)
    return scattered(experience, advantages), scattered(experience, returns)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"whiten_advantages": False},
        {"gamma": 0.9},
        {"lam": 0.0},
        {"lam": 1.0, "gamma": 0.7, "whiten_advantages": False},
        {"kl_coef": 0.0},
        {"kl_coef": 0.7, "kl_estimator": "k2"},
        {"kl_coef": 0.7, "kl_estimator": "k3"},
        {"kl_coef": 0.7, "kl_estimator": "k3", "kl_in": "loss"},
        {"missing_eos_penalty": 1.5},
        {"clip_reward": 0.5, "missing_eos_penalty": 1.5},
    ],
    ids=str,
)
def test_advantages_and_returns_match_a_loop_over_tokens(options: dict[str, Any]) -> None:
    experience = rollouts()
    objective = PPO(**options)
    scores = slow.shaped_scores(
        experience["scores"].tolist(),
        experience["ended"].tolist(),
        clip=objective.clip_reward,
        missing_eos_penalty=objective.missing_eos_penalty,
    )
    advantages, returns = expected(
        experience,
        beta=objective.kl_coef if objective.kl_in == "reward" else 0.0,
        scores=scores,
        estimator=objective.kl_estimator,
        gamma=objective.gamma,
        lam=objective.lam,
        whiten=objective.whiten_advantages,
    )
    prepared = objective.prepare(experience)
    torch.testing.assert_close(prepared["advantages"], advantages, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(prepared["returns"], returns, rtol=EXACT, atol=EXACT)


def test_in_float32_the_result_is_that_of_float64_to_rounding() -> None:
    narrow = PPO().prepare(rollouts(dtype=torch.float32))
    wide = PPO().prepare(rollouts())
    # some ten sums of numbers of size 1, each rounded to 6e-8, divided by a deviation of size 1
    torch.testing.assert_close(narrow["advantages"].double(), wide["advantages"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(narrow["returns"].double(), wide["returns"], rtol=1e-5, atol=1e-5)


def test_completions_that_fill_the_width_match_trls_trainer() -> None:
    """TRL's PPOTrainer on responses [B, R] without padding, where its conventions and the paper's coincide."""
    experience = rollouts(prompts=(2,) * 5, completions=(6,) * 5)
    response = {name: experience[name][:, 2:] for name in ("old_logps", "ref_logps", "values")}
    log_ratio = response["ref_logps"] - response["old_logps"]
    reward = -0.3 * (log_ratio.exp() - 1 - log_ratio)  # its k3
    penalised = experience["scores"] - 1.0 * (~experience["ended"])
    reward[:, -1] += penalised
    last, reversed_advantages = 0.0, []
    for t in range(5, -1, -1):
        following = response["values"][:, t + 1] if t < 5 else 0.0
        last = reward[:, t] + 0.9 * following - response["values"][:, t] + 0.9 * 0.8 * last
        reversed_advantages.append(last)
    advantages = torch.stack(reversed_advantages[::-1], 1)
    whitened = (advantages - advantages.mean()) / torch.sqrt(advantages.var() + 1e-8)

    prepared = PPO(gamma=0.9, lam=0.8, kl_coef=0.3, kl_estimator="k3", missing_eos_penalty=1.0).prepare(experience)
    torch.testing.assert_close(prepared["advantages"][:, 2:], whitened, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(prepared["returns"][:, 2:], advantages + response["values"], rtol=EXACT, atol=EXACT)
    metrics = prepared["metrics"]
    assert metrics["objective/kl"] == pytest.approx((-log_ratio).sum(1).mean().item())
    assert metrics["objective/entropy"] == pytest.approx((-response["old_logps"]).sum(1).mean().item())
    non_score = -0.3 * (log_ratio.exp() - 1 - log_ratio)
    assert metrics["objective/non_score_reward"] == pytest.approx(non_score.sum(1).mean().item())
    assert metrics["objective/rlhf_reward"] == pytest.approx((non_score.sum(1) + penalised).mean().item())
    assert metrics["val/num_eos_tokens"] == experience["ended"].sum().item()


def test_the_score_is_paid_at_the_last_token_of_the_completion() -> None:
    experience = rollouts(padding=3)
    experience["values"].zero_()
    prepared = PPO(gamma=1.0, lam=0.0, kl_coef=0.0, whiten_advantages=False).prepare(experience)
    for b, mask in enumerate(experience["loss_mask"]):
        last = int(mask.nonzero().max())
        assert prepared["advantages"][b].nonzero().flatten().tolist() == [last]
        assert prepared["advantages"][b, last] == experience["scores"][b]


def test_values_that_explain_the_returns_have_explained_variance_1() -> None:
    experience = rollouts()
    returns = PPO(lam=1.0, kl_coef=0.0).prepare(rollouts())["returns"]
    for values, explained in ((returns, 1.0), (torch.zeros_like(returns), 0.0), (-returns, -3.0)):
        experience = rollouts()
        experience["values"] = values.clone()
        metrics = PPO(lam=1.0, kl_coef=0.0).prepare(experience)["metrics"]
        assert metrics["value/explained_var"] == pytest.approx(explained, abs=1e-9)


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("scale", ["running", "ref"])
def test_scaling_uses_all_scores_so_far_or_those_of_the_first_collection(scale: str, center: bool) -> None:
    objective = PPO(scale_reward=scale, center_reward=center)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    collections = [3 * k + torch.randn(16, generator=generator, dtype=torch.float64) for k in range(1, 4)]
    ended = torch.ones(16, dtype=torch.bool)
    for k, scores in enumerate(collections):
        seen = collections[: k + 1] if scale == "running" else collections[:1]
        want = slow.shaped_scores(scores.tolist(), ended.tolist(), all_scores=torch.cat(seen).tolist(), center=center)
        assert objective.shape_scores(scores, ended).tolist() == pytest.approx(want, rel=EXACT)


def test_scores_are_scaled_then_clipped_then_charged_for_a_missing_eos() -> None:
    objective = PPO(scale_reward="ref", clip_reward=1.0, missing_eos_penalty=0.25)
    scores, ended = torch.tensor([-9.0, 0.1, 9.0, 9.0]), torch.tensor([True, True, True, False])
    shaped = objective.shape_scores(scores, ended)
    deviation = scores.double().std().item()
    assert shaped.tolist() == pytest.approx([-1.0, 0.1 / deviation, 1.0, 0.75], rel=1e-6)


def test_scores_without_spread_are_left_alone() -> None:
    objective = PPO(scale_reward="running")
    scores = torch.full((12,), 0.1)
    assert torch.equal(objective.shape_scores(scores, torch.ones(12, dtype=torch.bool)), scores)


def test_scores_are_logged_as_the_rewards_gave_them() -> None:
    experience = rollouts()
    objective = PPO(scale_reward="running", clip_reward=0.1, missing_eos_penalty=3.0)
    metrics = objective.prepare(experience)["metrics"]
    assert metrics["objective/scores"] == pytest.approx(rollouts()["scores"].mean().item())


# ---------------------------------------------------------------------- adaptive KL


@pytest.mark.parametrize(("kl", "error"), [(0.0, -0.2), (5.5, -1 / 12), (6.0, 0.0), (6.6, 0.1), (60.0, 0.2)])
def test_the_coefficient_follows_zieglers_controller(kl: float, error: float) -> None:
    experience = rollouts()
    mask = experience["loss_mask"]
    per_token = kl / mask.sum(1, keepdim=True).double()  # nats a completion
    experience["ref_logps"] = torch.where(mask, experience["old_logps"] - per_token, 0)
    objective = PPO(kl_coef=0.2, kl_target=6.0, kl_horizon=100)
    metrics = objective.prepare(experience)["metrics"]
    assert metrics["objective/kl"] == pytest.approx(kl, abs=1e-9)
    assert metrics["objective/kl_coef"] == 0.2, "the collection was made with the coefficient before"
    assert objective.kl_coef == pytest.approx(0.2 * (1 + error * mask.shape[0] / 100), rel=1e-9)


def test_a_fixed_coefficient_stays_fixed() -> None:
    objective = PPO(kl_coef=0.2)
    objective.prepare(rollouts())
    assert objective.kl_coef == 0.2


def test_a_horizon_that_could_turn_the_coefficient_negative_is_refused() -> None:
    objective = PPO(kl_target=1.0, kl_horizon=1)  # 6 completions: a step of up to 1.2 of the coefficient
    with pytest.raises(ValueError, match="kl_horizon"):
        objective.prepare(rollouts())
    assert objective.kl_coef > 0


def test_the_logged_divergence_is_k1_whatever_the_loss_uses() -> None:
    rows = slow.as_rows(rollouts(), old="old_logps", ref="ref_logps")
    want = slow.mean([math.fsum(row["old"]) - math.fsum(row["ref"]) for row in rows])
    for options in ({}, {"kl_estimator": "k3"}, {"kl_estimator": "k2", "kl_in": "loss"}):
        metrics = PPO(**options).prepare(rollouts())["metrics"]  # type: ignore[arg-type]
        assert metrics["objective/kl"] == pytest.approx(want, rel=EXACT)


def test_without_a_price_no_reference_is_needed() -> None:
    experience = rollouts()
    del experience["ref_logps"]
    objective = PPO(kl_coef=0.0)
    assert "reference" not in objective.needs and "reference" in PPO().needs
    assert "objective/kl" not in objective.prepare(experience)["metrics"]


# ---------------------------------------------------------------------- defects that peers shipped


def test_defect_whitening_unmasked() -> None:
    """Moments over padding and prompts would shrink the advantages; they are those of the completion tokens alone."""
    for padding in (0, 50):
        prepared = PPO().prepare(rollouts(padding=padding))
        picked = prepared["advantages"][prepared["loss_mask"]]
        # the 1e-8 added to a variance of size 1
        assert picked.mean().item() == pytest.approx(0.0, abs=1e-7)
        assert picked.var().item() == pytest.approx(1.0, abs=1e-7)


def test_defect_whitening_by_minibatch_instead_of_over_the_collection() -> None:
    prepared = PPO().prepare(rollouts())
    part = prepared.select([0, 1])
    picked = part["advantages"][part["loss_mask"]]
    assert torch.equal(picked, prepared["advantages"][:2][prepared["loss_mask"][:2]])
    assert abs(picked.mean().item()) > 0.01, "a part of the collection has moments of its own"


@pytest.mark.parametrize("garbage", [1e30, math.nan])
def test_defect_kl_or_rewards_covering_prompt_and_padding(garbage: float) -> None:
    options: list[dict[str, Any]] = [{}, {"kl_estimator": "k3"}, {"kl_target": 6.0}, {"scale_reward": "running"}]
    for option in options:
        clean, dirty = PPO(**option), PPO(**option)
        want, got = clean.prepare(rollouts(padding=4)), dirty.prepare(rollouts(padding=4, garbage=garbage))
        for name in ("advantages", "returns"):
            assert torch.equal(got[name], want[name]), name
            assert not got[name][~got["loss_mask"]].any(), name
        assert got["metrics"] == want["metrics"]
        assert dirty.state_dict() == clean.state_dict()


def test_padding_changes_no_advantage() -> None:
    narrow, wide = PPO().prepare(rollouts()), PPO().prepare(rollouts(padding=9))
    width = narrow["tokens"].shape[1]
    for name in ("advantages", "returns"):
        torch.testing.assert_close(wide[name][:, :width], narrow[name], rtol=EXACT, atol=EXACT)
        assert not wide[name][:, width:].any()
    assert wide["metrics"] == pytest.approx(narrow["metrics"], rel=EXACT)


def test_defect_eos_inside_the_prompt_or_as_padding_moves_the_score() -> None:
    """The end of a completion comes from the masks: what ids stand in the prompt or in the padding changes nothing."""
    eos = 3
    experience, plain = rollouts(padding=2), rollouts(padding=2)
    experience["tokens"] = torch.where(experience["loss_mask"], experience["tokens"], eos)
    for name in ("advantages", "returns"):
        assert torch.equal(PPO().prepare(experience)[name], PPO().prepare(plain)[name])


def test_rows_in_another_order_have_the_same_advantages() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = PPO().prepare(rollouts().select(order))
    prepared = PPO().prepare(rollouts())
    torch.testing.assert_close(shuffled["advantages"], prepared["advantages"][order], rtol=EXACT, atol=EXACT)
