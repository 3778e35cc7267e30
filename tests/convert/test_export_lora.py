"""A LoRA checkpoint for other tools: merged into the weights, or the adapter alone over the base in `peft`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, CohereForCausalLM

from lit_palm.callbacks import LastCheckpoint
from lit_palm.cli import main
from lit_palm.modules import LitLanguageModel, LitRewardModel
from lit_palm.modules.weights import load_network
from tests.convert.checkpoints import bpe, palm, save
from tests.convert.test_export_cohere import CohereForSequenceClassification
from tests.convert.test_export_huggingface import folder_of
from tests.support import adamw, ranking_data, text_data, trainer

LORAS: dict[str, dict[str, Any]] = {
    "usual": {"rank": 3, "alpha": 7.0},
    "rslora, all": {"rank": 2, "alpha": 5.0, "rslora": True, "targets": "all-linear"},
    "dora": {"rank": 2, "alpha": 4.0, "dora": True, "targets": "all-linear"},
}


def train(folder: Path, base: Path, reward: bool = False, **lora: Any) -> Path:
    """A few steps of LoRA, large enough for the adapter to matter."""
    from lit_palm.models.lora import LoRA

    (folder / "run").mkdir(parents=True, exist_ok=True)
    module = (LitRewardModel if reward else LitLanguageModel)(network=str(base), optimizer=adamw, lora=LoRA(**lora))
    data = (ranking_data if reward else text_data)(folder / "data", tokenizer=None)
    run = trainer(folder, callbacks=[LastCheckpoint(str(folder / "run"))], max_steps=6, max_epochs=6)
    run.fit(module, datamodule=data)
    path = folder / "run" / "last.ckpt"
    stored = torch.load(path, weights_only=True)
    for name, weight in stored["state_dict"].items():
        if "lora_B" in name:
            weight.normal_(0, 0.2)
    torch.save(stored, path)
    return path


def merged_and_adapted(folder: Path, path: Path, base: Path | str, theirs: Any) -> tuple[Any, Any]:
    """The model of `transformers` from a merged export, and the base with the exported adapter over it."""
    from peft import PeftModel

    assert main(["export", str(path), str(folder / "merged")]) == 0
    flags = ["--lora", "adapter", "--base", str(base)]
    assert main(["export", str(path), str(folder / "adapter"), *flags]) == 0
    assert main(["export", str(path), str(folder / "adapter"), *flags]) == 0  # over its own
    described = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(base)
    options = {"num_labels": 1} if "Classification" in theirs.__name__ else {}
    adapted = PeftModel.from_pretrained(theirs.from_pretrained(base, **options), folder / "adapter")
    return theirs.from_pretrained(folder / "merged").eval(), adapted.eval()


@pytest.mark.parametrize("kind", LORAS)
def test_of_a_palm(tmp_path: Path, kind: str) -> None:
    start = save(tmp_path / "base.ckpt", {"policy": palm(num_kv_heads=2, qk_norm="layer")})
    path = train(tmp_path, start, **LORAS[kind])
    assert main(["export", str(start), str(tmp_path / "base")]) == 0
    merged, adapted = merged_and_adapted(tmp_path, path, tmp_path / "base", CohereForCausalLM)
    tokens = torch.randint(0, 256, (2, 40))
    with torch.no_grad():
        ours, before = load_network(path).eval()(tokens), load_network(start).eval()(tokens)
        assert (ours - before).abs().max() > 0.1
        assert (merged(tokens).logits - ours).abs().max() < 1e-5
        assert (adapted(tokens).logits - ours).abs().max() < 1e-5
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "AutoPeftModelForCausalLM" in card
    assert main(["export", str(path), str(tmp_path / "whole"), "--format", "lit-palm"]) == 0
    assert torch.allclose(load_network(tmp_path / "whole").eval()(tokens), ours, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_of_a_network_of_transformers(tmp_path: Path, kind: str) -> None:
    base = folder_of(kind, tmp_path / "hub")
    path = train(tmp_path, base, **LORAS["usual"])
    merged, adapted = merged_and_adapted(tmp_path, path, base, AutoModelForCausalLM)
    tokens = torch.randint(3, 256, (2, 40))
    with torch.no_grad():
        ours = load_network(path).eval()(tokens)
        assert (merged(tokens).logits - ours).abs().max() < 1e-5
        assert (adapted(tokens).logits - ours).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["palm", "llama"])
def test_of_a_reward_model(tmp_path: Path, kind: str) -> None:
    start: Path = tmp_path / "hub"
    theirs: Any = AutoModelForSequenceClassification
    if kind == "palm":
        start = save(tmp_path / "base.ckpt", {"policy": palm()}, bpe())
        assert main(["export", str(start), str(tmp_path / "hub")]) == 0
        theirs = CohereForSequenceClassification
    else:
        folder_of(kind, start)
    path = train(tmp_path, start, reward=True, **LORAS["usual"])
    merged, adapted = merged_and_adapted(tmp_path, path, tmp_path / "hub", theirs)
    bias = json.loads((tmp_path / "merged" / "config.json").read_text())["lit_palm"]["score_bias"]
    tokens = torch.randint(3, 256, (3, 40))
    with torch.no_grad():
        ours = load_network(path, "reward").eval()(tokens)[:, -1]
        assert (merged(tokens).logits[:, 0] + bias - ours).abs().max() < 1e-5
        assert (adapted(tokens).logits[:, 0] + bias - ours).abs().max() < 1e-5


def test_wrong_requests_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = save(tmp_path / "whole.ckpt", {"policy": palm()})
    for flags, reason in [
        ([], "its policy network has no adapter: leave --lora adapter out"),
        (["--format", "gguf"], "--lora adapter writes a folder of peft, not --format gguf"),
    ]:
        assert main(["export", str(whole), str(tmp_path / "x"), "--lora", "adapter", *flags]) == 2
        assert reason in capsys.readouterr().err
