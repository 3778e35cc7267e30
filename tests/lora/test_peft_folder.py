"""A folder that `peft` saved, as `model.network`: the numbers of `peft`, trained further; or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm import load_network
from lit_palm.cli import main
from tests.families import write_family
from tests.foreign.aligning import arguments, train, weights, write_data

LOGITS = 1e-5  # float32 sums in another order


def ids() -> Tensor:
    return torch.randint(5, 320, (2, 20), generator=torch.Generator().manual_seed(2))


def write_adapter(folder: Path, family: str, **options: Any) -> tuple[Path, Tensor]:
    """A network of a family and, beside it, an adapter as `peft` saves it; and the logits of both together."""
    import peft
    from transformers import AutoModelForCausalLM

    network = write_family(folder / family, family)
    model = AutoModelForCausalLM.from_pretrained(network)
    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        logits: Tensor = adapted(ids()).logits
    adapted.save_pretrained(folder / "adapter")
    return folder / "adapter", logits


@pytest.mark.parametrize(
    "family, options",
    [
        ("llama", {"use_rslora": True, "target_modules": "all-linear"}),
        ("gpt2", {"fan_in_fan_out": True}),
        ("qwen2", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    ],
)
def test_logits_are_those_of_peft_and_training_goes_on(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    folder, expected = write_adapter(tmp_path, family, **options)
    with torch.no_grad():
        assert (load_network(folder).eval()(ids()) - expected).abs().max() < LOGITS
    flags = ["--model.lora.rank=3", "--model.lora.alpha=5"]
    flags += [f"--model.lora.{name[4:]}=true" for name in ("use_rslora", "use_dora") if name in options]
    data = write_data(tmp_path / "data")
    path = train("sft", folder, data, tmp_path / "run", *flags)
    assert sorted(k.partition(".lm.")[2].replace(".policy", "") for k in weights(path)) == sorted(
        k.partition(".lm.")[2].replace(".policy", "") for k in weights(folder)
    )
    moved = [k for k in weights(path) if not torch.equal(weights(path)[k], weights(folder)[k])]
    assert len(moved) == len(weights(path))
    assert (load_network(path)(ids()) - expected).abs().max() > 1e-4


def test_what_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = write_adapter(tmp_path, "llama")
    place, data = folder / "adapter_config.json", write_data(tmp_path / "data")
    good = json.loads(place.read_text())
    for change, reason in (
        ({"peft_type": "IA3"}, "is an adapter of kind 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "is an adapter for SEQ_CLS"),
        ({"bias": "all"}, "has bias: all, which is not supported"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "no/such/place"}, "no/such/place"),
        ({"r": 4}, "is its rank another?"),
    ):
        place.write_text(json.dumps(good | change))
        flags = ["--model.lora.rank=4", "--model.lora.alpha=5"] if "r" in change else []
        command = ["fit", *arguments("sft", folder, data), *flags, f"--trainer.default_root_dir={tmp_path}"]
        assert main(command) != 0
        assert reason in capsys.readouterr().err, change
    place.write_text(json.dumps(good | {"r": 4}))
    with pytest.raises(ValueError, match="has rank 3, not 4 as it says"):
        load_network(folder)
    place.write_text(json.dumps(good))
    (folder / "adapter_model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        load_network(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.bin\) can run any code"):
        load_network(folder)
