"""TRL's own loss code, run on the same numbers: GRPOTrainer and RLOOTrainer without their networks.

TRL averages inside one process, as the host here does over an optimiser step.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from grpo_batches import loss_and_gradient, mean_of, policy_output, rollouts
from lit_palm_grpo import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO
from lit_palm_grpo.advantages import overlong_punishment
from trl_grpo_loss import completions, group_trainer, stub, trl_loss

pytest.importorskip("trl")

# float64 on both sides: the same terms in another order
EXACT = {"rtol": 1e-9, "atol": 1e-11}


DELTA = SimpleNamespace(delta=1.3, use_bias_correction_kl=False, steps_per_generation=1)

CASES: dict[str, tuple[GRPO, dict[str, Any]]] = {
    "grpo": (GRPO(kl_coef=0.0), {"loss_type": "grpo"}),
    "grpo, beta": (GRPO(kl_coef=0.3), {"loss_type": "grpo", "beta": 0.3}),
    "grpo, delta": (GRPO(kl_coef=0.0, dual_clip=1.3), {"loss_type": "grpo", "args": DELTA}),
    "grpo, epsilons": (
        GRPO(clip_low=0.1, clip_high=0.4, kl_coef=0.0),
        {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.4},
    ),
    "bnpo": (GRPO(aggregation="token", kl_coef=0.3), {"loss_type": "bnpo", "beta": 0.3}),
    "dapo": (DAPO(), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": (DrGRPO(max_completion_length=8, kl_coef=0.3), {"loss_type": "dr_grpo", "beta": 0.3}),
    "cispo": (CISPO(clip_high=0.1), {"loss_type": "cispo", "epsilon_high": 1.1}),
    "gspo": (GSPO(), {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4,
                      "epsilon_high": 4e-4}),
    "gspo over tokens": (GSPO(aggregation="token", clip_low=0.05, clip_high=0.05), {"loss_type": "bnpo",
                         "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.05}),
    # LUSPO: the sum over a completion's tokens of its one ratio, averaged over completions
    "luspo": (GSPO(aggregation="constant", max_completion_length=100, clip_low=0.1, clip_high=0.1), {
              "loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_loss_gradient_and_metrics_are_trls(name: str) -> None:
    objective, settings = CASES[name]
    trainer = group_trainer(**settings)
    experience = objective.prepare(rollouts())
    output = policy_output(experience)
    value, gradient = loss_and_gradient(objective, experience, output)
    if name == "luspo":  # there the sum is not divided by a constant
        value, gradient = 100 * value, 100 * gradient
    expected, expected_gradient = trl_loss(trainer, experience, output)
    torch.testing.assert_close(value, expected, **EXACT)
    torch.testing.assert_close(gradient, expected_gradient, **EXACT)
    metrics = objective.loss(output, experience).metrics
    theirs = {k: v[0] for k, v in trainer._metrics["train"].items()}
    if objective.kl_coef:
        assert mean_of(metrics, "kl") == pytest.approx(theirs["kl"], rel=1e-6)  # TRL counts in float32
    if settings["loss_type"] != "cispo" and objective.importance_sampling_level == "token":
        for share in ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
            assert mean_of(metrics, share) == pytest.approx(theirs[share], rel=1e-6), share


def test_the_entropy_bonus_over_tokens_is_trls() -> None:
    objective = DAPO(entropy_coef=0.3)
    experience = objective.prepare(rollouts())
    output = policy_output(experience)
    trainer = group_trainer(loss_type="dapo", epsilon_high=0.28, entropy_coef=0.3, _entropy_bonus_enabled=True)
    value, gradient = loss_and_gradient(objective, experience, output)
    expected, expected_gradient = trl_loss(trainer, experience, output)
    torch.testing.assert_close(value, expected, **EXACT)
    torch.testing.assert_close(gradient, expected_gradient, **EXACT)
    assert mean_of(objective.loss(output, experience).metrics, "entropy") == pytest.approx(
        trainer._metrics["train"]["entropy"][0]
    )


@pytest.mark.parametrize("objective", [GRPO(importance_cap=1.5), DAPO(importance_cap=1.5), GSPO(importance_cap=1.5)])
def test_the_correction_for_another_engine_is_trls_token_truncate(objective: GRPO) -> None:
    settings: dict[str, Any] = {
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "beta": objective.kl_coef,
    }
    settings |= {"loss_type": "bnpo" if objective.aggregation == "token" else "grpo"}
    settings |= {"importance_sampling_level": objective.importance_sampling_level}
    settings |= {"epsilon_low": objective.clip_low, "epsilon_high": objective.clip_high}
    experience = objective.prepare(rollouts())
    output = policy_output(experience)
    difference = completions(experience, experience["old_logps"] - experience["rollout_logps"])
    # as in TRL's _generate_and_score_completions, mode token_truncate
    correction = torch.clamp(torch.exp(difference), max=1.5)
    value, gradient = loss_and_gradient(objective, experience, output)
    expected = trl_loss(group_trainer(**settings), experience, output, importance_sampling_ratio=correction)
    torch.testing.assert_close(value, expected[0], **EXACT)
    torch.testing.assert_close(gradient, expected[1], **EXACT)
    mask = completions(experience, torch.ones_like(output.logps)) > 0
    share = mean_of(objective.loss(output, experience).metrics, "sampling/importance_mean")
    assert share == pytest.approx(correction[mask].mean().item())
    assert (correction[mask] == 1.5).any() and (correction[mask] < 1).any()


def test_without_old_logps_both_take_the_policy_itself() -> None:
    objective = GRPO()
    experience = objective.prepare(rollouts())
    output = policy_output(experience)
    del experience["old_logps"]
    value, gradient = loss_and_gradient(objective, experience, output)
    experience["old_logps"] = output.logps.detach() if output.logps is not None else None
    expected = trl_loss(group_trainer(beta=0.04), experience, output, old_per_token_logps=None)
    torch.testing.assert_close(value, expected[0], **EXACT)
    torch.testing.assert_close(gradient, expected[1], **EXACT)
    assert mean_of(objective.loss(output, experience).metrics, "val/ratio") == 1.0


def test_rloo_is_trls() -> None:
    from trl.trainer.rloo_trainer import RLOOTrainer

    objective = RLOO()
    experience = objective.prepare(rollouts())
    output = policy_output(experience)
    old = torch.where(experience["loss_mask"], experience["old_logps"], 0).sum(1)
    value, gradient = loss_and_gradient(objective, experience, output)
    expected = trl_loss(stub(RLOOTrainer), experience, output, old_logps=old)
    torch.testing.assert_close(value, expected[0], **EXACT)
    torch.testing.assert_close(gradient, expected[1], **EXACT)


def test_the_soft_overlong_punishment_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = list(range(1, 41))
    theirs = get_soft_overlong_punishment(max_completion_len=32, soft_punish_cache=12)([[0] * n for n in lengths])
    assert overlong_punishment(torch.tensor(lengths), 32, 12).tolist() == pytest.approx(theirs)
