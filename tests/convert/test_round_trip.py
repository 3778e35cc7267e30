"""The whole way by the command line: somebody else's weights in, a stage trained, the result to other tools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from gguf import GGUFReader
from transformers import AutoTokenizer, CohereForCausalLM

from lit_palm.cli import main
from lit_palm.models.palm import PaLM
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.weights import load_network
from tests.convert.checkpoints import palm, save
from tests.foreign.aligning import train, write_data


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_cohere_in_and_out(tmp_path: Path, stage: str) -> None:
    # a folder in Cohere's layout, as the hub has them
    assert main(["export", str(save(tmp_path / "x.ckpt", {"policy": palm()})), str(tmp_path / "command-r")]) == 0
    assert main(["import", str(tmp_path / "command-r"), str(tmp_path / "imported")]) == 0
    start = load_network(tmp_path / "imported")
    assert isinstance(start, PaLM)
    trained = train(stage, tmp_path / "imported", write_data(tmp_path / "data"), tmp_path / stage)
    network = load_network(trained).eval()
    assert not torch.equal(network.embedding.weight, start.embedding.weight)
    assert main(["export", str(trained), str(tmp_path / "aligned")]) == 0
    theirs = CohereForCausalLM.from_pretrained(tmp_path / "aligned").eval()
    tokens = torch.randint(0, 263, (2, 60))
    with torch.no_grad():
        assert (theirs(tokens).logits - network(tokens)).abs().max() < 1e-5
    tokenizer = read_checkpoint(trained, header_only=True).tokenizer
    assert tokenizer is not None
    ids = AutoTokenizer.from_pretrained(tmp_path / "aligned")("two birds")["input_ids"]
    assert ids == tokenizer.prefix + tokenizer.encode("two birds")
    card = (tmp_path / "aligned" / "README.md").read_text()
    config = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert config["trainer"]["max_steps"] == 3 and config["model"]["class_path"].endswith(("LanguageModel", "Policy"))
    assert "- objective: `lit_palm.objectives." in card and "- strategy: SingleDeviceStrategy, 1 process" in card
    assert main(["export", str(trained), str(tmp_path / "aligned.gguf"), "--gguf"]) == 0
    assert len(GGUFReader(tmp_path / "aligned.gguf").tensors) == 2 + 2 * 8
