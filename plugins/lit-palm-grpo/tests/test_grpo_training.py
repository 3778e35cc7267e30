"""Training through lit_palm's public door: rewards rise, groups stay together, other engines are corrected for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lit_palm_grpo import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO, ReinforcePlusPlus

from lit_palm import (
    CachedEngine,
    Engine,
    Generation,
    LitPolicy,
    PaLMConfig,
    PromptData,
    PythonReward,
    RolloutConfig,
    Sampling,
)

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


class Logged(Callback):
    """What was logged with the first step of every collection."""

    def __init__(self) -> None:
        self.collections: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if trainer.current_epoch == len(self.collections):
            self.collections.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def lower_case(completions: list[str]) -> list[float]:
    """What part of a completion is a small letter: one byte in ten of an untrained network."""
    return [sum("a" <= c <= "z" for c in text) / max(len(text), 1) for text in completions]


def train(
    objective: GRPO,
    folder: Path,
    collections: int = 8,
    reward: Any = lower_case,
    lr: float = 1e-2,
    flags: dict[str, Any] | None = None,
    ckpt_path: Path | None = None,
    callbacks: list[Callback] | None = None,
    **options: Any,
) -> tuple[list[dict[str, float]], LitPolicy]:
    """Train a tiny PaLM from nothing; what was logged, and the policy."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in ("cat", "a dog", "owls", "the fox sat")))
    torch.manual_seed(0)
    rollout = {"num_prompts": 8, "completions_per_prompt": 8, "minibatch_size": 32, "passes": 2}
    module = LitPolicy(
        PaLMConfig(d_model=32, num_layers=1, num_heads=2, head_dim=16, max_length=32),
        objective=objective,
        rewards=[PythonReward(reward)],
        rollout=RolloutConfig(**{**rollout, **options.pop("rollout", {})}),
        sampling=Sampling(max_new_tokens=8),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        **options,
    )
    logged = Logged()
    flags = {**QUIET, "max_epochs": collections, "gradient_clip_val": 1.0, **(flags or {})}
    trainer = Trainer(callbacks=[logged, *(callbacks or [])], **flags)
    trainer.fit(module, datamodule=PromptData(train=str(path), tokenizer="bytes"), ckpt_path=ckpt_path)
    return logged.collections, module


@pytest.mark.parametrize(
    "objective",
    [
        GRPO(kl_coef=0.01),
        DrGRPO(max_completion_length=8),
        RLOO(kl_coef=0.01),
        ReinforcePlusPlus(kl_coef=0.01),
        DAPO(max_completion_length=8, overlong_cache=2),
        GSPO(),
        CISPO(),
    ],
    ids=lambda o: type(o).__name__,
)
def test_the_reward_rises(objective: GRPO, tmp_path: Path) -> None:
    logged, _ = train(objective, tmp_path)
    rewards = [row["reward"] for row in logged]
    assert rewards[0] < 0.25 and rewards[-1] > rewards[0] + 0.2, rewards
    first = logged[0]
    assert first["val/ratio"] == pytest.approx(1, abs=1e-4)
    assert first["clip_ratio/region_mean"] == 0 if not isinstance(objective, GSPO) else True
    assert {"reward_std", "frac_reward_zero_std", "clip_ratio/low_mean", "clip_ratio/high_mean"} <= first.keys()
    assert ("kl" in first) == ("objective/kl" in first) == (objective.kl_coef > 0)
    if objective.kl_coef:
        assert first["objective/kl"] == pytest.approx(0, abs=1e-3) and logged[-1]["objective/kl"] > 0.1


def says_a(completions: list[str]) -> list[float]:
    """1 for a completion with the letter a: few prompts have both kinds, of an untrained network."""
    return [float("a" in text) for text in completions]


def test_dynamic_sampling_goes_on_until_prompts_teach(tmp_path: Path) -> None:
    rollout = {"completions_per_prompt": 4, "num_prompts": 8, "minibatch_size": 16, "max_rounds": 4}
    logged, _ = train(DAPO(), tmp_path, collections=2, reward=says_a, rollout=rollout)
    # a prompt's completions earn the same in nine cases of ten, so one round does not fill a collection
    assert logged[0]["rollout/rounds"] > 1 and 0 < logged[0]["rollout/accepted"] < 1
    assert all(row["frac_reward_zero_std"] == 0 for row in logged)
    free, _ = train(GRPO(kl_coef=0.0), tmp_path, collections=1, reward=says_a, rollout=rollout)
    assert free[0]["frac_reward_zero_std"] > 0.3 and "rollout/rounds" not in free[0]


def test_one_completion_a_prompt_is_refused_before_anything_is_sampled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RLOO compares .* rollout\.completions_per_prompt to 2"):
        train(RLOO(), tmp_path, rollout={"completions_per_prompt": 1, "minibatch_size": 8})


class Elsewhere(Engine):
    """An engine of another make: every token is 2% less likely than training finds it."""

    def generate(self, *args: Any, **kwargs: Any) -> Generation:
        found = CachedEngine().generate(*args, **kwargs)
        found.logps = [values - 0.02 for values in found.logps]
        return found


def test_another_engines_probabilities_are_corrected_for(tmp_path: Path) -> None:
    free, _ = train(GRPO(kl_coef=0.0, importance_cap=2.0), tmp_path, collections=1, engine=Elsewhere())
    assert free[0]["startup/engine_logratio"] == pytest.approx(0.02, abs=1e-4)
    assert free[0]["sampling/importance_mean"] == pytest.approx(1.0202, abs=1e-4)
    assert free[0]["val/ratio"] == pytest.approx(1, abs=1e-4)  # of training to training
    capped, _ = train(GRPO(kl_coef=0.0, importance_cap=1.01), tmp_path, collections=1, engine=Elsewhere())
    assert capped[0]["sampling/importance_mean"] == pytest.approx(1.01, abs=1e-6)
    own, _ = train(GRPO(kl_coef=0.0, importance_cap=1.01), tmp_path, collections=1)
    assert own[0]["sampling/importance_mean"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("objective", [GRPO, DrGRPO, CISPO])
def test_one_step_a_collection_takes_its_own_probabilities(
    objective: Any, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass is made for them after the first collection, and the step is the same: float32 rounds to 1e-5 of it.

    The engine is one whose log-probabilities do not stand in for them.
    """

    passes: list[int] = []  # collections for which one was made
    made = LitPolicy.policy_logps

    def policy_logps(module: LitPolicy, batch: Any) -> Any:
        passes.append(module.trainer.current_epoch)
        return made(module, batch)

    monkeypatch.setattr(LitPolicy, "policy_logps", policy_logps)

    def run(choice: str) -> tuple[list[dict[str, float]], LitPolicy]:
        passes.clear()
        rollout = {"passes": 1, "minibatch_size": 64 // steps, "old_logps": choice}
        engine = CachedEngine(weights="bf16")
        return train(objective(kl_coef=0.1), tmp_path, 3, rollout=rollout, engine=engine, lr=1e-3)

    own, policy = run("auto")
    assert set(passes) == ({0} if steps == 1 else {0, 1, 2})
    passed, other = run("trainer")
    assert set(passes) == {0, 1, 2}
    assert all(abs(logged["val/ratio"] - 1) <= (0 if steps == 1 else 1e-4) for logged in own)
    for mine, theirs in zip(own, passed, strict=True):
        assert mine["objective/kl"] == pytest.approx(theirs["objective/kl"], abs=1e-4)
    for mine, theirs in zip(policy.networks["policy"].parameters(), other.networks["policy"].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_a_second_step_of_a_collection_sampled_for_one_is_refused(tmp_path: Path) -> None:
    """Its log-probabilities would be compared with themselves, and no ratio ever leave 1."""

    class Fewer(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            trainer.accumulate_grad_batches = 1 if trainer.current_epoch else 2

    rollout: dict[str, Any] = {"passes": 1, "minibatch_size": 32}
    flags = {"accumulate_grad_batches": 2}
    with pytest.raises(RuntimeError, match=r"learned from in one step.*rollout\.old_logps to trainer"):
        train(GRPO(kl_coef=0.1), tmp_path, 3, rollout=rollout, flags=flags, callbacks=[Fewer()])
    rollout["old_logps"] = "trainer"
    train(GRPO(kl_coef=0.1), tmp_path, 3, rollout=rollout, flags=flags, callbacks=[Fewer()])


def test_nor_after_resuming_in_its_midst(tmp_path: Path) -> None:
    """What was sampled for one step lies in the checkpoint; fewer batches a step would make two of it."""

    class Midst(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1 and batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "midst.ckpt")

    rollout: dict[str, Any] = {"passes": 1, "minibatch_size": 32}
    train(GRPO(kl_coef=0.1), tmp_path, 2, rollout=rollout, flags={"accumulate_grad_batches": 2}, callbacks=[Midst()])
    resumed = {"rollout": rollout, "ckpt_path": tmp_path / "midst.ckpt"}
    train(GRPO(kl_coef=0.1), tmp_path, 2, flags={"accumulate_grad_batches": 2}, **resumed)
    with pytest.raises(RuntimeError, match=r"learned from in one step"):
        train(GRPO(kl_coef=0.1), tmp_path, 2, flags={"accumulate_grad_batches": 1}, **resumed)
