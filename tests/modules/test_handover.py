"""What is handed over to an engine elsewhere is what the policy computes: whole, merged, as transformers reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.models.adapted import AdaptedNetwork
from lit_palm.models.base import Network
from lit_palm.models.huggingface_config import HuggingFaceConfig
from lit_palm.models.lora import LoRA
from lit_palm.modules.handover import whole_weights, write_weights
from tests.support import config

TOKENS = torch.tensor([[5, 60, 7, 9], [8, 1, 2, 70]])


def drawn(network: Any) -> Any:
    """With weights that are not those of the initialisation."""
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    return network.eval()


def small_palm() -> Network:
    network: Network = drawn(config(vocab_size=263, qk_norm="layer").build())
    return network


def small_llama() -> Network:
    architecture = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 263, "tie_word_embeddings": True,
                    "max_position_embeddings": 64}  # fmt: skip
    network: Network = drawn(HuggingFaceConfig(architecture=architecture).build())
    return network


@pytest.mark.parametrize("make", [small_palm, small_llama])
@torch.no_grad()
def test_transformers_computes_the_same_from_it(make: Any, tmp_path: Path) -> None:
    """The layout for vLLM and SGLang, read by transformers: logits to 1e-5, rounding of other sums."""
    from transformers import AutoModelForCausalLM

    network, folder = make(), tmp_path / "1-a"
    weights = whole_weights(network)
    write_weights(str(folder), "huggingface", network.config, weights, ByteTokenizer())
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS).logits
    assert torch.allclose(network(TOKENS), theirs, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["1-a"], "it appears whole"


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"merge_to_sample": True}], ids=["lora", "dora", "merged"])
@pytest.mark.parametrize("make", [small_palm, small_llama])
@torch.no_grad()
def test_an_adapter_is_put_into_its_matrices(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """A network with these weights alone computes what the view does, which is left as it was."""
    pytest.importorskip("peft")
    shared = AdaptedNetwork(make(), {"policy": LoRA(rank=2, **options)}, trained=["policy"])
    for module in shared.modules():  # adapters have no place in memory yet
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            module.to_empty(device=torch.device("cpu"), recurse=False)
    for number, (name, parameter) in enumerate(shared.named_parameters()):
        if "lora_" in name:
            generator = torch.Generator().manual_seed(number)
            value = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + value if "magnitude" in name else value)
    view = shared.view("policy").eval()
    before = view(TOKENS)
    write_weights(str(tmp_path / "1"), "lit-palm", view.config, whole_weights(view), ByteTokenizer())  # type: ignore[arg-type]
    alone = make()
    assert not torch.allclose(alone(TOKENS), before, atol=1e-2)
    alone.load_state_dict(load_file(tmp_path / "1" / "model.safetensors"), strict=False)
    assert torch.allclose(alone(TOKENS), before, atol=1e-4)
    assert torch.equal(view(TOKENS), before)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    network: Any = config(vocab_size=263, xpos=True).build()
    with pytest.raises(ValueError, match="xpos"):
        write_weights(str(tmp_path / "1"), "huggingface", network.config, whole_weights(network), ByteTokenizer())
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written there"):
        write_weights(str(tmp_path / "file" / "1"), "lit-palm", network.config, whole_weights(network), ByteTokenizer())
