"""A step of DPO as it is trained, beside TRL's formula on a plain network in float64.

Ours is a step of `LitPolicy` under the Trainer with all that makes it quick: prompts shared side by side, padding left
out, log-probabilities a few tokens at a time, the Trainer's precision, the reference computed in advance. Beside it the
network's weights before that step are put into one of float64, which runs each row by itself under a mask, takes the
softmax of all its logits, and hands the log-probabilities to the loss code of TRL's DPOTrainer.
Compared are the loss, what is logged, and the gradient of every weight that the optimiser gets.

Tolerances, of the gradient as the length of the difference over that of the whole. float32 keeps 24 bits: 1e-4, after
sums of some hundred terms and differences of log-probabilities that almost cancel. bfloat16 keeps 8: each number on the
way through two blocks is rounded by up to one part in 256, at random, and what adds up over some hundred tokens stays
within 3%; an answer's log-probability within 0.1 nats of about -280, and beta (0.1) times it, which the loss reads,
within 0.01. Weights of 8 bits (bf16-true) change nothing of it, since the float64 network has just these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lit_palm_dpo import DPO
from trl_dpo_loss import trl_dpo

from lit_palm import Experience, LitPolicy, Output, PaLMConfig, PreferenceData
from lit_palm.models import TokenLogProbs
from lit_palm.modules import parts
from lit_palm.testing.steps import Recorder, Recording, plain_logps

pytest.importorskip("trl", minversion="1.16")

PROMPTS = [150, 160, 149, 155]
ANSWERS = [(60, 41), (38, 55), (52, 30), (25, 47)]
STEPS = 3
LOGITS = 4096
"""How many are alive at once: those of 15 tokens."""


def network() -> PaLMConfig:
    return PaLMConfig(d_model=32, num_layers=2, num_heads=4, head_dim=8, max_length=256, vocab_size=263)


def letters(number: int, length: int) -> str:
    generator = torch.Generator().manual_seed(number)
    return "".join(chr(97 + i) for i in torch.randint(26, (length,), generator=generator).tolist())


def pairs(folder: Path) -> PreferenceData:
    rows = [
        {"prompt": letters(3 * i, prompt), "chosen": letters(3 * i + 1, n), "rejected": letters(3 * i + 2, m)}
        for i, (prompt, (n, m)) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return PreferenceData(train=str(path), tokenizer="bytes", batch_size=len(rows))


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """What the fast paths did: tokens computed; a few logits at a time."""
    seen: dict[str, list[int]] = {"tokens": []}
    laid, made = parts.side_by_side, TokenLogProbs.__init__

    def side_by_side(*args: Any) -> Any:
        found = laid(*args)
        seen["tokens"].append(-1 if found is None else found.tokens.numel())
        return found

    monkeypatch.setattr(parts, "side_by_side", side_by_side)
    monkeypatch.setattr(
        TokenLogProbs, "__init__", lambda self, *args, **options: made(self, *args, max_elements=LOGITS, **options)
    )
    return seen


BOUNDS = {"32-true": (1e-4, 1e-5, 5e-4), "bf16-mixed": (0.03, 0.01, 0.1), "bf16-true": (0.03, 0.01, 0.1)}
"""Of the gradient (relative), of the loss (relative) and rewards (absolute), of an answer's log-probability (nats)."""


@pytest.mark.parametrize(
    "loss, precision, precomputed",
    [*(("sigmoid", name, False) for name in BOUNDS), ("sigmoid", "32-true", True), ("ipo", "bf16-mixed", False)],
)
def test_a_step_as_it_is_trained_is_trls(
    loss: Any, precision: Any, precomputed: bool, tmp_path: Path, fast: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    module = LitPolicy(network(), DPO(loss), optimizer=Recording, precompute_reference=precomputed)
    seen = Recorder()
    run = Trainer(
        accelerator="cpu", devices=1, precision=precision, max_steps=STEPS, logger=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[seen], default_root_dir=str(tmp_path),
    )  # fmt: skip
    run.fit(module, datamodule=pairs(tmp_path))
    [recorded], batch = run.optimizers, seen.batches[-1]
    assert isinstance(recorded, Recording)

    # a BOS and a prompt once, answers with their EOS, which nothing follows
    tokens = sum(1 + prompt + n + m for prompt, (n, m) in zip(PROMPTS, ANSWERS, strict=True))
    assert set(fast["tokens"]) == {tokens} and tokens < 0.6 * batch["tokens"].numel()

    logps, leaves = plain_logps(network(), recorded.before[-1], module, batch)
    reference, _ = plain_logps(network(), recorded.before[0], module, batch)
    plain = Experience({**batch, "mask": batch["mask"].clone()})
    expected, their_metrics = trl_dpo(plain, Output(logps=logps, ref_logps=reference.detach()), [loss])
    of_gradient, of_loss, of_answer = BOUNDS[precision]
    assert float((reference - logps).detach().abs().max()) > 0.3, "the policy has moved"
    found = run.callback_metrics
    assert float(found["loss"]) == pytest.approx(expected.item(), rel=of_loss)
    for name, value in their_metrics.items():
        if name.startswith(("rewards/", "logps/")):
            bound = of_answer if name.startswith("logps/") else of_loss
            assert float(found[name]) == pytest.approx(value, abs=bound), name
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(expected, leaves)])
    gradient = torch.cat([g.double().flatten() for g in recorded.gradients[-1]])
    assert (gradient - wanted).norm() <= of_gradient * wanted.norm()
