"""What is done once a collection: groups, baselines, shaping, dynamic sampling, metrics; whatever the order of rows."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from grpo_batches import COMPLETIONS, GROUPS, rollouts
from lit_palm_grpo import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO, ReinforcePlusPlus
from torch import Tensor

from lit_palm import Experience

VARIANTS = [GRPO, DrGRPO, RLOO, ReinforcePlusPlus, DAPO, GSPO, CISPO]

EXACT = {"rtol": 1e-9, "atol": 1e-10}  # float64


def scored(*scores: float, groups: tuple[int, ...] | None = None, **changes: Any) -> Experience:
    """A collection with these scores, two completions a prompt unless told otherwise."""
    groups = groups or tuple(i // 2 for i in range(len(scores)))
    experience = rollouts(groups=groups, completions=COMPLETIONS[: len(scores)])
    experience["scores"] = torch.tensor(scores, dtype=torch.float64)
    experience["ended"] = torch.ones(len(scores), dtype=torch.bool)
    for name, value in changes.items():
        experience[name] = value
    return experience


def advantages(objective: GRPO, experience: Experience) -> list[float]:
    found: Tensor = objective.prepare(experience)["advantages"]
    assert found.shape == (experience.num_rows,)
    return found.tolist()


# ------------------------------------------------------------------------------------------ baselines and scales


def test_baselines_by_hand() -> None:
    plain: dict[str, Any] = {"scale_rewards": "none", "kl_coef": 0.0}
    rewards, groups = (1.0, 2.0, 6.0, 0.0, 4.0), (0, 0, 0, 1, 1)

    def with_baseline(name: Any) -> list[float]:
        return advantages(GRPO(baseline=name, **plain), scored(*rewards, groups=groups))

    assert with_baseline("group") == pytest.approx([-2, -1, 3, -2, 2])
    assert with_baseline("leave_one_out") == pytest.approx([-3, -1.5, 4.5, -4, 4])
    assert with_baseline("batch") == pytest.approx([-1.6, -0.6, 3.4, -2.6, 1.4])
    assert with_baseline("none") == pytest.approx(rewards)


def test_scales_by_hand() -> None:
    rewards = (1.0, 3.0, 0.0, 10.0)

    def with_scale(name: Any) -> list[float]:
        return advantages(GRPO(scale_rewards=name, kl_coef=0.0), scored(*rewards))

    small, large, whole = statistics.stdev(rewards[:2]), statistics.stdev(rewards[2:]), statistics.stdev(rewards)
    assert with_scale("none") == [-1, 1, -5, 5]
    assert with_scale("group") == pytest.approx([-1 / (small + 1e-4), 1 / (small + 1e-4), -5 / (large + 1e-4),
                                                 5 / (large + 1e-4)])  # fmt: skip
    assert with_scale("batch") == pytest.approx([a / (whole + 1e-4) for a in (-1, 1, -5, 5)])


def test_equal_rewards_teach_nothing() -> None:
    """0.1 in float32 is no round number: a deviation that is not exactly 0 would be divided by 1e-4."""
    experience = scored(*[0.1] * 6, groups=(0,) * 6)
    experience["scores"] = experience["scores"].float() * 1000
    assert advantages(GRPO(kl_coef=0.0), experience) == [0.0] * 6
    assert experience["advantages"].dtype == torch.float32


def test_rows_can_be_normalized_over_the_collection() -> None:
    """TRL's RLOOConfig.normalize_advantages."""
    found = advantages(RLOO(kl_coef=0.0, normalize_advantages="row"), scored(1.0, 3.0, 0.0, 10.0))
    raw = [-2.0, 2.0, -10.0, 10.0]
    assert found == pytest.approx([a / (statistics.stdev(raw) + 1e-4) for a in raw])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_rows_changes_nothing(variant: type[GRPO]) -> None:
    expected = variant().prepare(rollouts())
    order = torch.tensor([4, 8, 0, 7, 2, 6, 1, 3, 5])
    shuffled = variant().prepare(rollouts().select(order))
    torch.testing.assert_close(shuffled["advantages"], expected["advantages"][order], **EXACT)
    assert shuffled["metrics"] == pytest.approx(expected["metrics"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_and_prompts_have_no_influence(variant: type[GRPO]) -> None:
    expected = variant().prepare(rollouts())
    found = variant().prepare(rollouts(padding=5, garbage=float("nan")))
    width = expected["tokens"].shape[1]
    values = found["advantages"]
    torch.testing.assert_close(values[:, :width] if values.dim() == 2 else values, expected["advantages"], **EXACT)
    assert found["metrics"] == pytest.approx(expected["metrics"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_that_fills_a_batch_counts_for_nothing(variant: type[GRPO]) -> None:
    expected = variant().prepare(rollouts())
    experience = rollouts(groups=(*GROUPS[:6], -1, *GROUPS[7:]))
    experience["loss_mask"][6] = False
    experience["scores"][6] = float("nan")
    rest = torch.tensor([0, 1, 2, 3, 4, 5, 7, 8])
    found, without = variant().prepare(experience), variant().prepare(rollouts().select(rest))
    width = without["tokens"].shape[1]
    values = found["advantages"][rest]
    torch.testing.assert_close(values[:, :width] if values.dim() == 2 else values, without["advantages"], **EXACT)
    assert found["metrics"] == pytest.approx(without["metrics"])
    assert found["metrics"] != pytest.approx(expected["metrics"])
    assert (found["advantages"][6] == 0).all()


@pytest.mark.parametrize("variant", [GRPO, DrGRPO, RLOO, DAPO, GSPO, CISPO])
def test_one_completion_a_prompt_is_refused(variant: type[GRPO]) -> None:
    lonely = rollouts(groups=(*GROUPS[:8], 99))
    with pytest.raises(ValueError, match=rf"{variant.__name__} compares .* rollout\.completions_per_prompt"):
        variant().prepare(lonely)
    with pytest.raises(ValueError, match=r"rollout\.completions_per_prompt"):
        DAPO().accept(lonely)


# ------------------------------------------------------------------------------------------ shaping


def test_soft_overlong_punishment_by_hand() -> None:
    """Completions have 4, 6, 1, 3 tokens; at most 6, of which the last 4 cost a quarter each."""
    objective = GRPO(max_completion_length=6, overlong_cache=4, baseline="none", scale_rewards="none", kl_coef=0.0)
    assert advantages(objective, scored(1.0, 1.0, 1.0, 1.0)) == pytest.approx([0.5, 0.0, 1.0, 0.75])
    assert objective.prepare(scored(1.0, 1.0, 1.0, 1.0))["metrics"]["reward"] == 1.0
    assert objective.prepare(scored(1.0, 1.0, 1.0, 1.0))["metrics"]["objective/rlhf_reward"] == 0.5625


def test_a_completion_longer_than_stated_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"6 tokens, more than max_completion_length 5: .* sampling\.max_new_tokens"):
        DrGRPO(max_completion_length=5).prepare(scored(1.0, 2.0))


def test_a_missing_end_costs_what_is_stated() -> None:
    objective = GRPO(missing_eos_penalty=0.5, baseline="none", scale_rewards="none", kl_coef=0.0)
    ended = torch.tensor([True, False])
    assert advantages(objective, scored(1.0, 1.0, ended=ended)) == [1.0, 0.5]


def test_truncated_completions_count_for_the_baseline_and_are_not_learned_from() -> None:
    experience = scored(1.0, 3.0, 5.0, 1.0, ended=torch.tensor([True, False, True, True]))
    objective = GRPO(mask_truncated_completions=True, scale_rewards="none", kl_coef=0.0)
    assert advantages(objective, experience) == [-1.0, 1.0, 2.0, -2.0]
    assert experience["loss_mask"].any(1).tolist() == [True, False, True, True]
    assert objective.weight(experience) == 3
    assert DAPO(mask_truncated_completions=True).weight(experience) == 4 + 1 + 3


# ------------------------------------------------------------------------------------------ KL in the reward


def test_the_divergence_in_the_reward_is_charged_before_the_baseline() -> None:
    experience = scored(1.0, 1.0)
    k1 = torch.where(experience["loss_mask"], experience["old_logps"] - experience["ref_logps"], 0).sum(1)
    found = advantages(RLOO(kl_coef=0.2), experience)
    assert found == pytest.approx([-0.2 * (k1[0] - k1[1]).item(), -0.2 * (k1[1] - k1[0]).item()])
    assert experience["metrics"]["objective/kl"] == pytest.approx(k1.mean().item())
    assert experience["metrics"]["objective/rlhf_reward"] == pytest.approx(1 - 0.2 * k1.mean().item())


def test_a_token_pays_for_what_comes_after_it() -> None:
    """k2 of 0.5, 0, 2 nats after one another, at a price of 2: 5, 4 and 4 to the end."""
    experience = scored(7.0, 7.0, groups=(0, 1))
    experience["loss_mask"][:] = False
    experience["loss_mask"][0, 3:6] = True
    experience["loss_mask"][1, 2] = True
    experience["old_logps"][:] = 0.0
    experience["ref_logps"][:] = 0.0
    experience["ref_logps"][0, 3:6] = torch.tensor([1.0, 0.0, 2.0])
    objective = ReinforcePlusPlus(kl_coef=2.0, kl_estimator="k2", normalize_advantages="none")
    found = objective.prepare(experience)["advantages"]
    assert found[0, 3:6].tolist() == [7.0 - 5, 7.0 - 4, 7.0 - 4] and found[1, 2] == 7.0
    assert found.count_nonzero() == 4


def test_whitening_is_over_every_token_of_the_collection() -> None:
    experience = ReinforcePlusPlus().prepare(rollouts())
    inside = experience["advantages"][experience["loss_mask"]]
    assert inside.mean().abs() < 1e-12 and inside.std().item() == pytest.approx(1, abs=1e-6)
    assert (experience["advantages"][~experience["loss_mask"]] == 0).all()


def test_select_slices_advantages_of_both_shapes() -> None:
    for objective, shape in ((GRPO(), (2,)), (ReinforcePlusPlus(), (2, 10))):
        part = objective.prepare(rollouts()).select([0, 4])
        assert part["advantages"].shape == (2, part["tokens"].shape[1])[: len(shape)]


# ------------------------------------------------------------------------------------------ dynamic sampling


def test_dynamic_sampling_rejects_prompts_that_teach_nothing() -> None:
    experience = scored(1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, groups=(4, 2, 4, 2, 9, 9, 7, 7))
    verdict = DAPO().accept(experience)
    assert verdict is not None
    assert verdict.tolist() == [False, True, False, True, False, False, True, True]
    assert GRPO().accept(experience) is None and CISPO(dynamic_sampling=True).accept(experience) is not None


def test_what_is_left_is_prepared_as_if_nothing_else_had_been() -> None:
    experience = scored(1.0, 0.0, 1.0, 1.0, 0.0, 3.0, 2.0, groups=(4, 2, 4, 2, 5, 5, 5))
    verdict = DAPO().accept(experience)
    assert verdict is not None
    left = DAPO().prepare(experience.select(verdict.nonzero().squeeze(1)))
    assert left["group"].tolist() == [2, 2, 5, 5, 5]
    whole = DAPO().prepare(experience)
    torch.testing.assert_close(left["advantages"], whole["advantages"][verdict], **EXACT)
    assert whole["metrics"]["frac_reward_zero_std"] == pytest.approx(2 / 7)
    assert left["metrics"]["frac_reward_zero_std"] == 0.0


# ------------------------------------------------------------------------------------------ metrics


def test_metrics_of_a_collection() -> None:
    experience = GRPO().prepare(scored(1.0, 3.0, 2.0, 2.0))
    metrics = experience["metrics"]
    assert metrics["reward"] == 2.0
    assert metrics["reward_std"] == pytest.approx(statistics.stdev([1.0, 3.0, 2.0, 2.0]))
    assert metrics["frac_reward_zero_std"] == 0.5
    assert "objective/kl" in metrics
    experience = scored(1.0, 3.0)
    del experience["ref_logps"]
    assert "objective/kl" not in GSPO().prepare(experience)["metrics"]
    assert "frac_reward_zero_std" not in ReinforcePlusPlus(kl_coef=0.0).prepare(scored(1.0, groups=(0,)))["metrics"]
