"""Whole trainings of a tiny PaLM: preferences through PreferenceData, samples through rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lit_palm_dpo import CPO, DPO, KTO, ORPO, OnlineDPO, SimPO

from lit_palm import LitPolicy, Objective, PaLMConfig, PreferenceData, PromptData, PythonReward, RolloutConfig, Sampling
from lit_palm.modules.reference import ReferenceUpdate

PAIRS = [
    {"prompt": "the cat", "chosen": " sat", "rejected": " flew away"},
    {"prompt": "two", "chosen": " birds sing", "rejected": " stones"},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))


def network() -> PaLMConfig:
    return PaLMConfig(d_model=16, num_layers=1, num_heads=2, head_dim=8, max_length=64)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "log_every_n_steps": 1,
        "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(default_root_dir=str(folder), **{**quiet, **options})


def policy(objective: Objective, lr: float = 5e-3, **options: Any) -> LitPolicy:
    torch.manual_seed(0)
    return LitPolicy(network(), objective, optimizer=lambda p: torch.optim.AdamW(p, lr=lr), **options)


@pytest.mark.parametrize(
    "objective",
    [
        DPO(),
        DPO(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 0.5]),
        DPO("ipo", divergence="js"),
        SimPO(),
        ORPO(),
        CPO(),
    ],
    ids=lambda o: type(o).__name__,
)
def test_two_pairs_are_learned(objective: Objective, tmp_path: Path) -> None:
    """An untrained network prefers neither answer of a pair; after a few steps it prefers the chosen ones clearly."""
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    data = PreferenceData(train=path, validation=path, tokenizer="bytes", batch_size=2)
    start = policy(objective)
    before = trainer(tmp_path, max_epochs=1, limit_train_batches=1)
    before.fit(start, datamodule=data)
    module = policy(objective)
    run = trainer(tmp_path, max_epochs=40, gradient_clip_val=1.0)
    run.fit(module, datamodule=data)
    first, last = before.callback_metrics, run.callback_metrics
    assert last["rewards/accuracies"] == 1
    assert last["rewards/margins"] > first["rewards/margins"] + 0.05
    assert last["loss"] < first["loss"]
    if "nll" in last:
        assert last["nll"] < first["nll"] - 0.5
    if "reference" in objective.needs:
        # float32: for so few tokens a pass without gradients takes its products the other way round
        assert abs(first["rewards/margins"]) < 1e-5, "the policy starts as its reference"


def test_accumulation_takes_the_step_of_a_large_batch_with_both_terms(tmp_path: Path) -> None:
    """Pairs and tokens have weights of their own; float32 sums in another order differ by up to 1e-5 of a weight."""
    rows = [{**p, "prompt": p["prompt"] + " " * i} for i in range(4) for p in PAIRS]
    path = write(tmp_path / "pairs.jsonl", rows)

    def weights(batch_size: int, ways: int) -> torch.Tensor:
        module = policy(DPO(["sigmoid", "sft"], [1.0, 0.3]))
        data = PreferenceData(train=path, validation=path, tokenizer="bytes", batch_size=batch_size)
        trainer(tmp_path, max_epochs=2, accumulate_grad_batches=ways, gradient_clip_val=1.0).fit(
            module, datamodule=data
        )
        return torch.cat([p.detach().flatten() for p in module.networks.parameters()])

    large, small = weights(8, 1), weights(2, 4)
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)
    assert (large - weights(2, 1)).abs().max() > 1e-3


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_unpaired_feedback_is_learned(loss: Any, tmp_path: Path) -> None:
    rows = [{"prompt": p["prompt"], "completion": p[kind], "label": kind == "chosen"} for p in PAIRS for kind in p if kind != "prompt"]  # noqa: E501  # fmt: skip
    path = write(tmp_path / "feedback.jsonl", rows)
    data = PreferenceData(train=path, validation=path, tokenizer="bytes", batch_size=4, mismatched=loss == "kto")
    run = trainer(tmp_path, max_epochs=40, gradient_clip_val=1.0)
    run.fit(policy(KTO(loss=loss)), datamodule=data)
    metrics = run.callback_metrics
    assert metrics["rewards/chosen"] > 0.05 > -0.05 > metrics["rewards/rejected"]
    assert metrics["val/rewards/margins"] > 0.1 and metrics["loss"] < 0.49
    assert ("val/kl" in metrics) == (loss == "kto")


def test_kto_names_the_way_out_where_nothing_is_mismatched(tmp_path: Path) -> None:
    path = write(tmp_path / "feedback.jsonl", [{"prompt": "a", "completion": x, "label": x == "b"} for x in "bc"])
    with pytest.raises(ValueError, match=r"data\.mismatched: true"):
        trainer(tmp_path, max_epochs=1).fit(policy(KTO()), datamodule=PreferenceData(train=path, tokenizer="bytes"))


@pytest.mark.parametrize("options", [{"precompute_reference": True}, {"reference_update": ReferenceUpdate(0.5, 1)}])
def test_references_of_another_kind(options: dict[str, Any], tmp_path: Path) -> None:
    """One known in advance takes the same steps; one that follows the policy, half the way each step, is nearer."""
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    found = []
    for more in ({}, options):
        data = PreferenceData(train=path, validation=path, tokenizer="bytes", batch_size=2)
        run = trainer(tmp_path, max_epochs=20)
        run.fit(policy(DPO(), **more), datamodule=data)
        found.append({k: v.item() for k, v in run.callback_metrics.items() if k.startswith(("rewards/", "logps/"))})
    if "precompute_reference" in options:
        assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-5)
    else:
        assert 0 < found[1]["rewards/margins"] < found[0]["rewards/margins"] / 2


def lower_case(completions: list[str]) -> list[float]:
    return [float(sum(c.islower() for c in text)) for text in completions]


def test_online_dpo_raises_a_verifiable_reward(tmp_path: Path) -> None:
    """Lower-case letters in eight tokens: a fresh network writes any byte, so it starts below one."""
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "abcdefgh"[: 1 + i % 8]} for i in range(16)])
    module = policy(
        OnlineDPO(beta=0.05),
        lr=5e-3,
        rewards=[PythonReward(lower_case)],
        rollout=RolloutConfig(num_prompts=32, completions_per_prompt=4, minibatch_size=32, passes=2),
        sampling=Sampling(max_new_tokens=8),
    )
    data = PromptData(train=path, validation=path, tokenizer="bytes", batch_size=16)
    run = trainer(tmp_path, max_epochs=24, check_val_every_n_epoch=24, gradient_clip_val=1.0)
    start = run.validate(module, datamodule=data, verbose=False)[0]["val/reward"]
    run.fit(module, datamodule=data)
    metrics = run.callback_metrics
    assert start < 2
    assert metrics["val/reward"] > start + 2
    assert metrics["objective/kl"] > 0.1 and metrics["reward_std"] > 0
    assert metrics["rewards/accuracies"] > 0.5


def test_online_dpo_refuses_one_completion_a_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    module = policy(
        OnlineDPO(), rewards=[PythonReward(lower_case)], rollout=RolloutConfig(num_prompts=2, minibatch_size=2)
    )
    with pytest.raises(ValueError, match=r"rollout\.completions_per_prompt to 2 or more"):
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=PromptData(train=path, tokenizer="bytes"))
