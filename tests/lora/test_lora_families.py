"""LoRA on Hugging Face networks by the command line: fine-tuning, reward, PPO and DPO on one trunk, each resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm import load_network
from lit_palm.models.base import ScalarNetwork
from lit_palm.modules.checkpoint import read_checkpoint
from tests.families import FAMILIES, write_family
from tests.foreign.aligning import arguments, keep, second, train, weights, write_data
from tests.foreign.test_sharded_families import STRATEGY, WEIGHTS, run

LORA = ["--model.lora.rank=4", "--model.lora.alpha=8", "--model.lora.targets=all-linear"]
# float32: a frozen matrix and its update are two sums, merged they are one
MERGED = 1e-5
QUICK = ("llama", "gpt2")  # linear layers, and those that keep their matrices the other way round


def check(stage: str, network: Path, data: Path, folder: Path, *more: str) -> Path:
    """Three steps of a stage, at once and in two sittings; only adapters and heads are kept."""
    whole = train(stage, network, data, folder / "whole", *LORA, *more)
    again = train(stage, network, data, folder / "again", *LORA, *more, f"--ckpt_path={second(folder / 'whole')}")
    ours, theirs = weights(whole), weights(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert all(".lora_" in k or ".heads." in k for k in ours)
    assert all(w.abs().max() > 0 for k, w in ours.items() if "lora_B" in k), "every adapter learned"
    return whole


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_stages_on_one_trunk(family: str, tmp_path: Path) -> None:
    data, network = write_data(tmp_path / "data"), write_family(tmp_path / family, family)
    sft = check("sft", network, data, tmp_path / "sft")
    reward = check("reward", sft, data, tmp_path / "reward")
    scored: dict[str, Any] = {"class_path": "RewardModel", "init_args": {"checkpoint": str(reward)}}
    ppo = check("ppo", sft, data, tmp_path / "ppo", f"--model.rewards={json.dumps([scored])}")
    for path, role in ((sft, "policy"), (reward, "reward"), (ppo, "policy"), (ppo, "value")):
        base = read_checkpoint(path).header["networks"][role]["lora"]["base"]
        assert base["path"] == str(network), "all on the same frozen weights"
        merged, unmerged = load_network(path, role).eval(), by_hand(network, path, role)  # type: ignore[arg-type]
        assert (merged(ids()) - unmerged).abs().max() < MERGED


def ids() -> Tensor:
    return torch.randint(5, 320, (2, 20), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def by_hand(network: Path, checkpoint: Path, role: str) -> Tensor:
    """What the model of `transformers` computes with the adapter that `peft` loads, and the head on it."""
    import peft
    from transformers import AutoModelForCausalLM

    header, stored = read_checkpoint(checkpoint).header["networks"][role], weights(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(network)
    layers = sorted(
        {k.partition(".trunk.lm.")[2].partition(".lora_")[0] for k in stored if f".{role}.weight" in k} - {""}
    )
    transposed = type(model.get_submodule(layers[0])).__name__ == "Conv1D"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=layers, fan_in_fan_out=transposed)
    model = peft.get_peft_model(model, config).eval()
    own = dict(model.named_parameters())
    for name, value in stored.items():
        if ".trunk.lm." in name and f".{role}.weight" in name:
            inner = name.partition(".trunk.lm.")[2].replace(f".{role}.", ".default.")
            own[f"base_model.model.{inner}"].copy_(value)
    if "pooling" not in header:
        found: Tensor = model(ids()).logits
        return found
    hidden = model.base_model.model.base_model(ids()).last_hidden_state
    head = {k.partition(f".heads.{role}.")[2]: v for k, v in stored.items() if f".heads.{role}." in k}
    raw = hidden @ head["head.weight"].T + head["head.bias"]
    return (raw.squeeze(-1) - head["offset"]) / head["scale"]


@pytest.mark.parametrize("family", QUICK)
def test_a_value_network_of_the_trunk_is_scalar(family: str, tmp_path: Path) -> None:
    """DoRA, rsLoRA and dropout from the command line, with blocks recomputed; DPO against the trunk as it is."""
    pytest.importorskip("lit_palm_dpo")
    data, network = write_data(tmp_path / "data"), write_family(tmp_path / family, family)
    more = ["--model.lora.dora=true", "--model.lora.rslora=true", "--model.lora.dropout=0.1"]
    more += ["--model.overrides={activation_checkpointing: true}"]
    path = check("dpo", network, data, tmp_path / "dpo", *more)
    assert any("lora_magnitude_vector" in name for name in weights(path))
    assert not isinstance(load_network(path), ScalarNetwork)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "cohere"])
def test_two_processes_that_share_the_trunk(family: str, tmp_path: Path) -> None:
    """FSDP2: exact resumption, and the weights of one process."""
    data, network = write_data(tmp_path / "data"), write_family(tmp_path / family, family)
    stages = ("sft", "reward", "ppo")
    commands = []
    for stage in stages:
        given = ["fit", *arguments(stage, network, data, batch=2), *STRATEGY, *LORA]
        whole, again = tmp_path / stage / "whole", tmp_path / stage / "again"
        commands += [[*given, *keep(whole)], [*given, *keep(again), f"--ckpt_path={second(whole)}"]]
    run(commands, tmp_path)
    for stage in stages:
        ours, theirs = (weights(tmp_path / stage / name / "last.ckpt") for name in ("whole", "again"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
        one = weights(train(stage, network, data, tmp_path / stage / "one", *LORA))
        assert one.keys() == ours.keys()
        for k in one:
            if not k.endswith(("reward.head.bias", "reward.offset")):  # moved by nothing but rounding
                assert (one[k] - ours[k]).abs().max() < WEIGHTS, k
