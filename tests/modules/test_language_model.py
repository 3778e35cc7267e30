"""LitLanguageModel: what it reports agrees with a slow computation, and it learns."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lit_palm.data import TextData
from lit_palm.data.tokenizers import BPETokenizer
from lit_palm.objectives import LanguageModeling
from lit_palm.rollout.sampling import Sampling
from tests.support import (
    config,
    demonstration_data,
    language_model,
    prompt_data,
    sentence,
    text_data,
    trainer,
    weights,
    write_jsonl,
)

TEXTS = ["the cat sat", "naïve café ☕ 東京", "a", sentence(3)]


def documents(folder: Path, tokenizer: Any, **options: Any) -> TextData:
    path = write_jsonl(folder / "documents.jsonl", [{"text": t} for t in TEXTS])
    return TextData(train=path, validation=path, tokenizer=tokenizer, sequence_length=64, **options)


@pytest.mark.parametrize("pack, batch_size", [(True, 3), (False, 1)])
@pytest.mark.parametrize("make_tokenizer", [lambda: "bytes", lambda: BPETokenizer(vocab_size=290)], ids=["b", "bpe"])
def test_bits_per_byte_agree_with_one_document_at_a_time(
    make_tokenizer: Any, pack: bool, batch_size: int, tmp_path: Path
) -> None:
    module, data = language_model(), documents(tmp_path, make_tokenizer(), pack=pack, batch_size=batch_size)
    found = trainer(tmp_path).validate(module, datamodule=data, verbose=False)[0]
    network, tokenizer = module.networks["policy"].eval(), module.ready_tokenizer
    nats, tokens, size = 0.0, 0, 0
    for text in TEXTS:
        ids = torch.tensor([*tokenizer.prefix, *tokenizer.encode(text), tokenizer.eos_id])
        nats += F.cross_entropy(network(ids[None])[0, :-1], ids[1:], reduction="sum").item()
        tokens, size = tokens + len(ids) - 1, size + len(text.encode())
    # float32 forward passes over packed and single rows
    assert found["val/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert found["val/loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["val/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_the_z_loss_is_in_the_gradient(tmp_path: Path) -> None:
    coefficient = 0.3
    module = language_model(
        objective=LanguageModeling(z_loss=coefficient), optimizer=lambda params: torch.optim.SGD(params, lr=1.0)
    )
    data = demonstration_data(tmp_path, shuffle=False)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    module.tokenizer = data.tokenizer
    module.configure_model()
    network = copy.deepcopy(module.networks["policy"])
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, datamodule=data)
    logits, picked = network(batch["tokens"])[:, :-1], batch["loss_mask"][:, 1:]
    nll = F.cross_entropy(logits[picked], batch["tokens"][:, 1:][picked])
    z = coefficient * logits[picked].logsumexp(-1).square().mean()
    (nll + z).backward()
    assert run.callback_metrics["z_loss"].item() == pytest.approx(z.item(), rel=1e-5)
    assert run.callback_metrics["loss"].item() == pytest.approx((nll + z).item(), rel=1e-5)
    after = weights(module)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(after[f"networks.policy.{name}"], parameter.detach() - parameter.grad,
                                   rtol=1e-5, atol=1e-6)  # fmt: skip


def test_it_learns_a_text_by_heart(tmp_path: Path) -> None:
    text = "the cat sat on a warm mat and saw nine small birds"
    path = write_jsonl(tmp_path / "one.jsonl", [{"text": text}])
    data = TextData(train=path, validation=path, tokenizer="bytes", sequence_length=64, batch_size=1)
    module = language_model(
        network=config(d_model=32, num_layers=2),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        sample_prompts=["the cat", "the"],
        sampling=Sampling(temperature=0, max_new_tokens=50),
    )
    run = trainer(tmp_path, max_epochs=160, check_val_every_n_epoch=160)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["val/loss"].item() < 0.05  # from 5.6 nats of 263 equally likely ids
    assert [s["prompt"] + s["completion"] for s in module.samples] == [text, text]


def test_samples_are_the_same_at_every_validation_until_the_weights_move(tmp_path: Path) -> None:
    module = language_model(sample_prompts=["the", "a"], sampling=Sampling(max_new_tokens=12))
    data = text_data(tmp_path)
    trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    first = copy.deepcopy(module.samples)
    torch.manual_seed(99)
    trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert module.samples == first and len(first) == 2
    trainer(tmp_path, max_steps=5).fit(module, datamodule=data)
    trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert module.samples != first


def test_prediction_continues_prompts(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "the"}, {"prompt": "a cat"}])
    module = language_model(sampling=Sampling(max_new_tokens=4))
    rows = trainer(tmp_path).predict(module, datamodule=prompt_data(tmp_path, predict=source, batch_size=2))
    assert rows is not None
    (batch,) = rows
    assert [row["prompt"] for row in batch] == ["the", "a cat"]
    assert [row["completion"] for row in batch] == module.complete(["the", "a cat"])


def test_python_without_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package's docstring shows."""
    from lit_palm import LitLanguageModel, PaLMConfig, TextData

    (tmp_path / "text.txt").write_text("one line\nanother line\n")
    module = LitLanguageModel(PaLMConfig(d_model=16, num_layers=1, num_heads=2, head_dim=8))
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, TextData(train=str(tmp_path / "text.txt"), tokenizer="bytes"))
    assert run.global_step == 1 and module.networks["policy"].config.vocab_size == 263
