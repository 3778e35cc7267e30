"""Networks of transformers, trained here, go back to the layout that they came from, with equal logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_palm.cli import main
from lit_palm.models.base import ScalarNetwork
from lit_palm.models.huggingface_config import HuggingFaceConfig
from lit_palm.modules.weights import load_network
from tests.convert.checkpoints import bpe, save
from tests.convert.test_export_cohere import CohereForSequenceClassification
from tests.support import same

SMALL: dict[str, Any] = {"vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "llama": ROTARY | {"tie_word_embeddings": False},
    "qwen2": ROTARY | {"tie_word_embeddings": True},
    "mistral": ROTARY,
    "gpt2": {"vocab_size": 280, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": SMALL | {"intermediate_size": 48, "max_position_embeddings": 64},
    "bloom": {"vocab_size": 280, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": SMALL | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "falcon": SMALL | {"new_decoder_architecture": False},
    "cohere": ROTARY | {"use_qk_norm": True},
}


def folder_of(kind: str, place: Path) -> Path:
    """A folder as the hub serves it, with weights that are not what they start with."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind])
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 2, 1
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(place)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe().backend, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    ).save_pretrained(place)
    return place


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_back_in_its_own_layout(kind: str, tmp_path: Path) -> None:
    network = load_network(folder_of(kind, tmp_path / "hub")).eval()
    path = save(tmp_path / "last.ckpt", {"policy": network}, bpe())
    assert main(["export", str(path), str(tmp_path / "exported"), "--max_shard_size", "40KB"]) == 0
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.randint(3, 280, (2, 40))
    assert (theirs.eval()(tokens).logits - network(tokens)).abs().max() < 1e-5
    # the file names and the names in them are those that came
    before, after = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("hub", "exported"))
    assert after["architectures"] == before["architectures"] and "lit_palm" in after
    stored = [set(AutoModelForCausalLM.from_pretrained(tmp_path / f).state_dict()) for f in ("hub", "exported")]
    assert stored[0] == stored[1]
    assert AutoTokenizer.from_pretrained(tmp_path / "exported")("hi")["input_ids"] == [2, *bpe().encode("hi")]
    again = load_network(tmp_path / "exported")  # and our stages read it as they read the first
    same(dict(again.state_dict()), dict(network.state_dict()))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_a_reward_model_is_the_architectures_classifier(kind: str, tmp_path: Path) -> None:
    trunk: Any = load_network(folder_of(kind, tmp_path / "hub"))
    network = ScalarNetwork(trunk).eval()
    network.calibrate(torch.tensor(0.3), torch.tensor(2.0))
    path = save(tmp_path / "last.ckpt", {"reward": network}, bpe())
    assert main(["export", str(path), str(tmp_path / "exported")]) == 0
    theirs, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.randint(3, 280, (3, 20))
    bias = json.loads((tmp_path / "exported" / "config.json").read_text())["lit_palm"]["score_bias"]
    assert bias == pytest.approx(-0.15)
    assert (theirs.eval()(tokens).logits[:, 0] + bias - network(tokens)[:, -1]).abs().max() < 1e-5
    again = load_network(tmp_path / "exported", "reward").eval()  # and here with the constant
    assert (again(tokens) - network(tokens)).abs().max() < 1e-5


@torch.no_grad()
def test_an_architecture_without_classifier_gets_the_generic_one(tmp_path: Path) -> None:
    trunk: Any = load_network(folder_of("cohere", tmp_path / "hub"))
    network = ScalarNetwork(trunk).eval()
    path = save(tmp_path / "last.ckpt", {"reward": network}, bpe())
    assert main(["export", str(path), str(tmp_path / "exported")]) == 0
    theirs, report = CohereForSequenceClassification.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.randint(3, 280, (3, 20))
    assert (theirs.eval()(tokens).logits[:, 0] - network(tokens)[:, -1]).abs().max() < 1e-5
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "class CohereForSequenceClassification(GenericForSequenceClassification, CoherePreTrainedModel)" in card


def test_an_architecture_that_even_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk: Any = HuggingFaceConfig(architecture={"model_type": "gpt_neox_japanese", **SMALL}).build()
    path = save(tmp_path / "last.ckpt", {"reward": ScalarNetwork(trunk)}, bpe())
    assert main(["export", str(path), str(tmp_path / "exported")]) == 2
    assert "transformers has no sequence classifier for the architecture 'gpt_neox_japanese'" in capsys.readouterr().err
