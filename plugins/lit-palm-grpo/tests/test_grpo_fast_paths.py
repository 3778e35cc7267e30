"""A step of GRPO as it is trained, beside TRL's formula on a plain network in float64.

Ours is a whole run under the Trainer with all that makes it quick: completions sampled from a cache, their
log-probabilities recorded on the way and taken as the old ones, prompts shared side by side, padding left out,
log-probabilities a few tokens at a time, the Trainer's precision, the correction for an engine of other weights. Looked
at is the last step of the second collection, so that ratios differ from 1. Beside it the weights that the step starts
from, those that sampled, and those of the reference are put into networks of float64, which run each row by itself
under a mask, take the softmax of all logits, and hand their log-probabilities to the loss code of TRL's
GRPOTrainer. Compared are the loss, what is logged, and the gradient of every weight that the optimiser gets.

Tolerances, of the gradient as the length of the difference over that of the whole. float32 keeps 24 bits: 1e-4, since
the old log-probabilities are the engine's, from sums in another order (1e-5 nats), and the terms of a group cancel in
part. bfloat16 keeps 8: a token's log-probability is off by up to 0.05 nats, its ratio by as many parts in a hundred,
and the gradient by 4%, by 5% where weights are bfloat16 too. A token whose ratio lies that near to a bound of the
clipping falls to either side of it, and takes all of its gradient along: in 16 bits the bounds are where no ratio
comes.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lit_palm_grpo import GRPO
from torch import Tensor
from trl_grpo_loss import completions as moved_left
from trl_grpo_loss import group_trainer, trl_loss

from lit_palm import (
    CachedEngine,
    ContinuousEngine,
    Experience,
    LitPolicy,
    Output,
    PaLMConfig,
    PromptData,
    PythonReward,
    RolloutConfig,
    Sampling,
)
from lit_palm.models import TokenLogProbs
from lit_palm.modules import parts
from lit_palm.testing.steps import Recorder, Recording, plain_logps

pytest.importorskip("trl")

LONGEST, NEW = 200, 40
STEPS = 4
"""Of a collection: two passes over two minibatches."""
LOGITS = 4096
"""How many are alive at once: those of 15 tokens."""


def network() -> PaLMConfig:
    return PaLMConfig(d_model=32, num_layers=2, num_heads=4, head_dim=8, max_length=256, vocab_size=263)


def letters(number: int, length: int) -> str:
    generator = torch.Generator().manual_seed(number)
    return "".join(chr(97 + i) for i in torch.randint(26, (length,), generator=generator).tolist())


def low(completions: list[str]) -> list[float]:
    """What part of a completion comes before the letter a."""
    return [sum(c < "a" for c in text) / max(len(text), 1) for text in completions]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """What the fast paths did: the share of tokens computed; a few logits at a time."""
    seen: dict[str, list[float]] = {"share": []}
    laid, made = parts.side_by_side, TokenLogProbs.__init__

    def side_by_side(tokens: Tensor, *args: Any) -> Any:
        found = laid(tokens, *args)
        seen["share"].append(2.0 if found is None else found.tokens.numel() / tokens.numel())
        return found

    monkeypatch.setattr(parts, "side_by_side", side_by_side)
    monkeypatch.setattr(
        TokenLogProbs, "__init__", lambda self, *args, **options: made(self, *args, max_elements=LOGITS, **options)
    )
    return seen


def run_of(folder: Path, precision: Any, seen: Recorder, **options: Any) -> tuple[LitPolicy, Recording]:
    """Two collections of eight completions, two minibatches each, twice."""
    path = folder / "prompts.jsonl"
    prompts = [letters(i, LONGEST - 20 * i) for i in range(2)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    torch.manual_seed(0)
    module = LitPolicy(
        network(),
        rewards=[PythonReward(low)],
        rollout=RolloutConfig(num_prompts=2, completions_per_prompt=4, minibatch_size=4, passes=2),
        sampling=Sampling(max_new_tokens=NEW),
        optimizer=partial(Recording, lr=2e-3),
        **options,
    )
    run = Trainer(
        accelerator="cpu", devices=1, precision=precision, max_epochs=2, logger=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[seen],
        limit_val_batches=0, default_root_dir=str(folder),
    )  # fmt: skip
    run.fit(module, datamodule=PromptData(train=str(path), tokenizer="bytes"))
    [recorded] = run.optimizers
    assert isinstance(recorded, Recording) and len(recorded.before) == 2 * STEPS
    return module, recorded


BOUNDS = {"32-true": (1e-4, 1e-5, 2e-5), "bf16-mixed": (0.04, 0.005, 0.05), "bf16-true": (0.05, 0.005, 0.05)}
"""Of the gradient (relative), of loss and metrics (absolute), and of a token's log-probability (nats)."""

OTHER = {"engine": ContinuousEngine(3, weights="bf16")}
"""An engine that is not the network: weights of 8 bits, rows that come and go."""


@pytest.mark.parametrize("precision", list(BOUNDS))
@pytest.mark.parametrize("options, cap", [({"engine": CachedEngine(3)}, None), (OTHER, 1.001)], ids=["own", "capped"])
def test_a_step_as_it_is_trained_is_trls(
    precision: Any, options: dict[str, Any], cap: float | None, tmp_path: Path, fast: dict[str, list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    low, high = (0.15, 0.2) if precision == "32-true" else (0.9, 9.0)
    seen, objective = Recorder(), GRPO(clip_low=low, clip_high=high, kl_coef=0.3, importance_cap=cap)
    module, recorded = run_of(tmp_path, precision, seen, objective=objective, **options)
    batch, found = seen.batches[-1], seen.logged[-1]
    of_gradient, of_loss, of_token = BOUNDS[precision]

    assert fast["share"][-1] < 0.5, "one prompt for all completions"

    mask = batch["loss_mask"]
    new, leaves = plain_logps(network(), recorded.before[-1], module, batch)
    old, reference = (plain_logps(network(), recorded.before[i], module, batch)[0].detach() for i in (STEPS, 0))
    if precision == "32-true":  # the old ones are then those that the engine recorded
        assert module.engine_agrees is (cap is None)
    for name, expected in (("old_logps", old), ("ref_logps", reference)):
        assert float((batch[name].double() - expected)[mask].abs().max()) < of_token, name

    plain = Experience({**batch, "advantages": batch["advantages"].double(), "old_logps": old, "ref_logps": reference})
    trainer = group_trainer(
        loss_type="grpo", beta=0.3, epsilon_low=low, epsilon_high=high, use_vllm=cap is not None,
        vllm_importance_sampling_correction=cap is not None,
    )  # fmt: skip
    inputs: dict[str, Any] = {}
    if cap is not None:  # as in TRL's _generate_and_score_completions, mode token_truncate
        apart = moved_left(plain, old - batch["rollout_logps"].double())
        inputs["importance_sampling_ratio"] = torch.clamp(torch.exp(apart), max=cap)
        real = moved_left(plain, torch.ones_like(old)) > 0
        weights = inputs["importance_sampling_ratio"][real]
        assert (weights == cap).any() and (weights < 1).any()
        assert found["sampling/importance_mean"] == pytest.approx(weights.mean().item(), abs=of_loss)
    leaf = new.detach().requires_grad_()
    loss, slope = trl_loss(trainer, plain, Output(logps=leaf, entropy=torch.zeros_like(leaf)), **inputs)
    theirs = {name: values[0] for name, values in trainer._metrics["train"].items()}
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(new, leaves, slope)])
    gradient = torch.cat([g.double().flatten() for g in recorded.gradients[-1]])
    assert found["loss"] == pytest.approx(loss.item(), abs=of_loss)
    shares = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
    assert (theirs["clip_ratio/region_mean"] > 0.1) == (precision == "32-true"), "something is clipped"
    for name in ("kl", *shares):
        assert found[name] == pytest.approx(theirs[name], abs=of_loss), name
    assert (gradient - wanted).norm() <= of_gradient * wanted.norm()
