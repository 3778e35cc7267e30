"""Classifiers of `transformers` as rewards, against their own forward pass on one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm import RewardBatch, SequenceClassifier, load_network
from lit_palm.cli import main
from tests.families import tokenizer, write_family
from tests.foreign.aligning import arguments, write_data

PROMPTS = ["the cat", "nine small birds", "a"]
COMPLETIONS = [" sat on a warm mat", " fly", " tree and a cat and a mat"]


def write_classifier(folder: Path, **labels: Any) -> Any:
    """An encoder with a tokeniser of its own."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=320, max_position_embeddings=64, pad_token_id=0, **sizes, **labels)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def batch() -> RewardBatch:
    nothing = [torch.zeros(1, dtype=torch.long)] * 3
    tokens = torch.zeros(3, 1, dtype=torch.long)
    return RewardBatch(PROMPTS, COMPLETIONS, nothing, nothing, [True] * 3, tokens, tokens == 0)


def score(**options: Any) -> torch.Tensor:
    reward = SequenceClassifier(**options)
    reward.network = reward.build(load_network)  # type: ignore[arg-type]
    values = reward(batch())
    assert isinstance(values, torch.Tensor)
    return values


@torch.no_grad()
@pytest.mark.parametrize("reads", ["text", "pair", "chat"])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_scores_are_the_models_own(reads: str, batch_size: int, tmp_path: Path) -> None:
    model, tok = write_classifier(tmp_path, num_labels=1), tokenizer()
    for prompt, completion, value in zip(
        PROMPTS, COMPLETIONS, score(model=str(tmp_path), reads=reads, batch_size=batch_size), strict=True
    ):
        if reads == "pair":
            encoded = tok(prompt, completion, return_tensors="pt")
        else:
            text = f"<|user|>{prompt}</s><|assistant|>{completion}</s>" if reads == "chat" else prompt + completion
            encoded = tok(text, return_tensors="pt")
        assert abs(model(**encoded).logits[0, 0] - value) < 1e-5  # rounding of a padded batch in float32


@torch.no_grad()
def test_a_class_among_several(tmp_path: Path) -> None:
    names = {0: "negative", 1: "neutral", 2: "positive"}
    model, tok = write_classifier(tmp_path, id2label=names, label2id={v: k for k, v in names.items()}), tokenizer()
    logits = torch.stack(
        [model(**tok(p + c, return_tensors="pt")).logits[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    )
    for label in ("positive", 2, "2"):
        assert torch.allclose(score(model=str(tmp_path), label=label), logits[:, 2], atol=1e-5)
    given = score(model=str(tmp_path), label="negative", gives="log_probability")
    assert torch.allclose(given, logits.log_softmax(1)[:, 0], atol=1e-5)


@torch.no_grad()
def test_long_texts_lose_their_beginning(tmp_path: Path) -> None:
    model, tok = write_classifier(tmp_path, num_labels=1), tokenizer()
    ends = [tok(p + c)["input_ids"][-2:] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = model(torch.tensor(ends)).logits[:, 0]
    assert torch.allclose(score(model=str(tmp_path), max_length=2), expected, atol=1e-5)


def test_ppo_on_a_classifier(tmp_path: Path) -> None:
    write_classifier(tmp_path / "classifier", num_labels=1)
    network = write_family(tmp_path / "llama", "llama")
    command = [a for a in arguments("ppo", network, write_data(tmp_path / "data")) if "rewards" not in a]
    command += ["--model.rewards+=SequenceClassifier", f"--model.rewards.model={tmp_path / 'classifier'}"]
    assert main(["fit", *command, "--trainer.max_steps=2", f"--trainer.default_root_dir={tmp_path}"]) == 0


def test_what_is_refused(tmp_path: Path) -> None:
    write_classifier(tmp_path / "several", num_labels=3)
    write_classifier(tmp_path / "one", num_labels=1)
    with pytest.raises(ValueError, match="knows LABEL_0, LABEL_1, LABEL_2: say which"):
        score(model=str(tmp_path / "several"))
    with pytest.raises(ValueError, match="label of SequenceClassifier is 'good'"):
        score(model=str(tmp_path / "several"), label="good")
    with pytest.raises(ValueError, match="gives one score"):
        score(model=str(tmp_path / "one"), gives="probability")
    with pytest.raises(ValueError, match="no folder or hub name of a sequence classifier"):
        score(model=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="choose text, pair or chat"):
        SequenceClassifier("x", reads="both")  # type: ignore[arg-type]
