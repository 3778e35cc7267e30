"""Run by test_lora_quantized.py. QLoRA: frozen matrices in 4 and 8 bits, where `bitsandbytes` is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm import load_network
from lit_palm.models.adapted import AdaptedNetwork
from lit_palm.models.lora import LoRA
from lit_palm.models.quantized import quantize
from lit_palm.models.weights import give_memory
from lit_palm.modules.lora_stages import Roles
from lit_palm.modules.weights import blueprint
from tests.families import write_family
from tests.lora.runs import LORA, base, fit, learned, tokens
from tests.models.test_adapted import hugging_face, ids, palm
from tests.modules.strategies import storage_bytes, strategy
from tests.support import config, policy, same

bitsandbytes = pytest.importorskip("bitsandbytes")
WIDE = {"d_model": 64, "head_dim": 32, "d_ffn": 256}
SHARE = {"4bit": 0.2, "8bit": 0.3}  # of float32's bytes, with the scales


class Mesh:
    """Of one process, for a strategy that has not been set up."""

    def size(self) -> int:
        return 1


@pytest.mark.parametrize("bits", SHARE)
def test_matrices_of_the_blocks_take_less_and_give_nearly_the_same(bits: Any) -> None:
    network, plain = palm(**WIDE), palm(**WIDE)
    quantize(network, bits)
    one, other = (sum(storage_bytes(b.parameters()) for b in n.blocks()) for n in (network, plain))
    assert one < SHARE[bits] * other
    with torch.no_grad():
        found, expected = network(ids()), plain(ids())
        assert 0 < (found - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("bits", SHARE)
def test_gradients_are_those_of_the_matrices_as_they_are(bits: Any) -> None:
    """After passes without gradients, in evaluation, as between a collection and its update."""
    trunk = palm(**WIDE)
    quantize(trunk, bits)
    network = AdaptedNetwork(trunk, {"policy": LoRA(rank=4)}, {}, ["policy"])
    for name in give_memory(network, torch.device(torch.get_default_device())):
        torch.nn.init.normal_(network.get_parameter(name), 0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    policy = network.view("policy")
    network.eval()
    with torch.no_grad():
        policy(ids())
    network.train()
    layer: Any = trunk.get_submodule("layers.0.ffn_out")
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = layer.base_layer(x)
    out.sin().sum().backward()
    eye = torch.eye(256)
    with torch.no_grad():
        matrix = layer.base_layer(eye)  # [in, out]
        expected = out.detach().cos() @ matrix.T
    assert x.grad is not None and (x.grad - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("bits", SHARE)
def test_ppo_trains_adapters_on_them_and_resumes(bits: str, tmp_path: Path) -> None:
    start = base(tmp_path, network=config(**WIDE))
    options: dict[str, Any] = {"network": str(start), "lora": {**LORA, "quantize": bits}}
    whole = fit(tmp_path / "whole", "LitPolicy", steps=3, **options)
    again = fit(
        tmp_path / "again", "LitPolicy", f"--ckpt_path={tmp_path / 'whole' / 'step-00000001.ckpt'}", steps=3, **options
    )
    same(learned(whole), learned(again))
    assert all(".lora_" in name or ".heads." in name for name in learned(whole)["weights"])
    assert (load_network(whole)(tokens()) - load_network(start)(tokens())).abs().max() > 1e-4


def test_a_network_of_transformers(tmp_path: Path) -> None:
    network = write_family(tmp_path / "llama", "llama")
    data = {"class_path": "DemonstrationData", "init_args": {"train": str(tmp_path / "words.jsonl"), "batch_size": 2}}
    (tmp_path / "words.jsonl").write_text('{"prompt": "the cat", "completion": " sat on a mat"}\n' * 4)
    path = fit(tmp_path / "run", "LitLanguageModel", network=str(network), data=data, lora={**LORA, "quantize": "4bit"})
    assert all(".lora_" in name for name in learned(path)["weights"])


def test_what_cannot_be_quantised_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"c_attn of a HuggingFaceNetwork keeps its matrix as \[in, out\]"):
        quantize(hugging_face("gpt2"), "4bit")
    module = policy(network=str(base(tmp_path)), lora=LoRA(quantize="4bit"))
    spread = {"strategy": strategy("sharded"), "shards": True}
    spread["strategy"]._device_mesh = {"tensor_parallel": Mesh()}
    module._layout = type("Layout", (), spread)()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="quantised weights cannot be spread by ModelParallelStrategy"):
        Roles(module, blueprint(tmp_path / "base" / "last.ckpt"))
