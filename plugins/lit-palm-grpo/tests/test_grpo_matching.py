"""TPO, FlowRL and the parabola of SPO: by hand, against palm-rlhf-pytorch's formulas, and whether they learn."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lit_palm_grpo import GRPO, TPO, FlowRL
from lit_palm_grpo.surrogates import surrogate_loss
from torch import Tensor

from lit_palm import LitPolicy, Objective, PaLMConfig, PromptData, PythonReward, RolloutConfig, Sampling
from lit_palm.testing import ObjectiveChecks, ObjectiveConformance, tiny_batch


class TestTPO(ObjectiveConformance):
    @pytest.fixture
    def objective(self) -> Any:
        return functools.partial(TPO, entropy_coef=0.1)

    test_two_processes_take_the_step_of_one = None  # FlowRL, with two networks, is the harder case
    test_command_line_gives_it_back = None


class TestFlowRL(ObjectiveConformance):
    @pytest.fixture
    def objective(self) -> Any:
        return functools.partial(FlowRL, beta=0.5)


class TestSPO(ObjectiveChecks):
    @pytest.fixture
    def objective(self) -> Any:
        return functools.partial(GRPO, surrogate="spo", clip_high=0.3)


def test_the_parabola_turns_at_the_bounds() -> None:
    """Best at 1 + clip_high for what is good, at 1 - clip_low for what is bad; palm-rlhf-pytorch's line for both."""
    ratio = torch.tensor([[0.6, 0.8, 1.0, 1.3, 1.5]], dtype=torch.float64, requires_grad=True)
    for sign, at in ((2.0, 3), (-2.0, 1)):
        advantages = torch.full_like(ratio, sign).detach()
        loss = surrogate_loss(ratio, advantages, ratio, "spo", (0.8, 1.3))
        (slope,) = torch.autograd.grad(loss.sum(), ratio)
        assert slope[0, at].abs() < 1e-9 and int(loss.argmin()) == at
        same = surrogate_loss(ratio, advantages, ratio, "spo", (0.8, 1.2))
        theirs = -(ratio * advantages) + (ratio - 1.0).square() * (advantages.abs() / (2 * 0.2))
        torch.testing.assert_close(same, theirs)
    with pytest.raises(ValueError, match="set clip_low and clip_high"):
        GRPO(surrogate="spo", clip_low=None)


def test_tpo_equals_palm_rlhf_pytorchs_cross_entropy() -> None:
    """A group at a time, by its `learn` and `train`: z scores, softmax targets, F.cross_entropy; float64."""
    objective = TPO(eta=0.7, entropy_coef=0.3)
    experience, output = tiny_batch(objective)
    assert output.logps is not None and output.entropy is not None
    total = torch.zeros((), dtype=torch.float64)
    mask = experience["loss_mask"]
    for group in experience["group"].unique():
        rows = experience["group"] == group
        scores = experience["scores"][rows]
        z = (scores - scores.mean()) / scores.std()
        old = F.log_softmax(torch.where(mask, experience["old_logps"], 0).sum(1)[rows], dim=-1)
        target = F.softmax(old + z / 0.7, dim=-1)
        torch.testing.assert_close(experience["targets"][rows], target)
        now = torch.where(mask, output.logps, 0).sum(1)[rows]
        entropies = (torch.where(mask, output.entropy, 0).sum(1) / mask.sum(1))[rows]
        total = total + F.cross_entropy(now[None], target[None], reduction="sum") - 0.3 * entropies.mean()
    found = objective.loss(output, experience).total
    assert isinstance(found, Tensor)
    assert found.item() == pytest.approx(total.item(), rel=1e-9)
    assert objective.weight(experience).item() == len(experience["group"].unique())


def test_tpo_has_nothing_to_say_where_all_earn_the_same() -> None:
    """The target is then the policy that sampled: no gradient before the first step."""
    objective = TPO()
    experience, output = tiny_batch(objective)
    experience["scores"] = torch.ones_like(experience["scores"])
    experience["ended"] = torch.ones_like(experience["ended"])
    experience["rewards"] = {}
    prepared = objective.prepare(experience)
    output.logps = prepared["old_logps"].clone().requires_grad_()
    total = objective.loss(output, prepared).total
    assert isinstance(total, Tensor)
    (slope,) = torch.autograd.grad(total, output.logps)
    assert slope.abs().max() < 1e-9


def test_flow_by_hand() -> None:
    objective = FlowRL(beta=2.0, clip=0.2, missing_eos_penalty=0.5)
    experience, output = tiny_batch(objective)
    assert output.logps is not None and output.values is not None
    total = 0.0
    for b in range(experience.num_rows):
        same = (experience["group"] == experience["group"][b]).nonzero().squeeze(1).tolist()
        rewards = [experience["scores"][i].item() - (0 if experience["ended"][i] else 0.5) for i in same]
        mean = sum(rewards) / len(rewards)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        z = (rewards[same.index(b)] - mean) / deviation
        places = experience["loss_mask"][b].nonzero().squeeze(1).tolist()
        new, old, ref = (
            sum(values[b, t].item() for t in places)
            for values in (output.logps, experience["old_logps"], experience["ref_logps"])
        )
        weight = min(max(math.exp(new - old), 0.8), 1.2)
        total += weight * (output.values[b, places[0]].item() + (new - ref) / len(places) - 2.0 * z) ** 2
    found = objective.loss(output, experience).total
    assert isinstance(found, Tensor)
    assert found.item() == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: TPO(eta=0.0), "eta must be"),
        (lambda: TPO(entropy_coef=-1.0), "entropy_coef must be"),
        (lambda: FlowRL(beta=-1.0), "beta must be"),
        (lambda: FlowRL(clip=1.0), "clip must lie"),
        (lambda: FlowRL(missing_eos_penalty=math.inf), "missing_eos_penalty must be"),
        (lambda: TPO().num_kept(4, 1), "completions_per_prompt to 2 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make()


def lower_case(completions: list[str]) -> list[float]:
    return [float(sum(c.islower() for c in text)) for text in completions]


@pytest.mark.parametrize("objective, lr", [(TPO(eta=0.3), 3e-2), (FlowRL(beta=0.5), 1e-2)], ids=["TPO", "FlowRL"])
def test_a_verifiable_reward_rises(
    objective: Objective, lr: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lower-case letters in eight tokens: a fresh network writes any byte, so it starts below one."""
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f'{{"prompt": "{"abcdefgh"[: 1 + i % 8]}"}}\n' for i in range(16)), encoding="utf-8")
    torch.manual_seed(0)
    module = LitPolicy(
        PaLMConfig(d_model=16, num_layers=1, num_heads=2, head_dim=8, max_length=64),
        objective,
        rewards=[PythonReward(lower_case)],
        rollout=RolloutConfig(num_prompts=16, completions_per_prompt=8, minibatch_size=64, passes=4),
        sampling=Sampling(max_new_tokens=8),
        optimizer=lambda params: torch.optim.AdamW(params, lr=lr),
    )
    data = PromptData(train=str(path), validation=str(path), tokenizer="bytes", batch_size=16)
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    run = Trainer(
        max_epochs=16, check_val_every_n_epoch=16, gradient_clip_val=1.0, enable_checkpointing=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=str(tmp_path), **options,
    )  # fmt: skip
    start = run.validate(module, datamodule=data, verbose=False)[0]["val/reward"]
    run.fit(module, datamodule=data)
    assert start < 2
    assert run.callback_metrics["val/reward"] > start + 1.5, float(run.callback_metrics["val/reward"])
