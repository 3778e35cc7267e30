"""What a checkpoint is on disk, what later stages take from it, and every file that is not one."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_palm.data.tokenizers import BPETokenizer, ByteTokenizer
from lit_palm.models.base import Network, ScalarNetwork
from lit_palm.modules.checkpoint import (
    FORMAT,
    export_folder,
    load_checkpoint_tokenizer,
    read_checkpoint,
    read_config,
)
from lit_palm.modules.weights import load_network
from lit_palm.rollout.rewards import RewardModel
from lit_palm.version import __version__
from tests.support import (
    config,
    language_model,
    policy,
    prompt_data,
    ranking_data,
    reward_model,
    same,
    text_data,
    trainer,
    write_jsonl,
)

TOKENS = torch.tensor([[258, 97, 98, 99, 32, 100], [258, 120, 121, 256, 256, 256]])


def raw(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def changed(path: Path, target: Path, **header: Any) -> str:
    """A copy of a checkpoint with fields of its header changed."""
    checkpoint = raw(path)
    checkpoint["lit_palm"].update(header)
    torch.save(checkpoint, target)
    return str(target)


# ------------------------------------------------------------------------------------------ what is in it


@pytest.mark.parametrize(
    "stage, kind, roles",
    [("language_model", "language_model", {"policy"}), ("reward_model", "reward", {"reward"}),
     ("policy", "policy", {"policy", "value"})],
)  # fmt: skip
def test_a_checkpoint_loads_safely_and_says_what_it_is(
    stage: str, kind: str, roles: set[str], stages: dict[str, Path]
) -> None:
    checkpoint = raw(stages[stage])  # weights_only
    header = checkpoint["lit_palm"]
    assert (header["format"], header["version"], header["kind"]) == (FORMAT, __version__, kind)
    assert header["networks"].keys() == roles
    assert {key.split(".")[1] for key in checkpoint["state_dict"]} == roles, "no frozen network in it"
    for network in header["networks"].values():
        assert network["class_path"] == "lit_palm.models.palm.PaLMConfig" and network["init_args"]["vocab_size"] == 263
    assert header["tokenizer"]["class_path"].endswith("ByteTokenizer")
    assert header["num_tokens"] > 0
    assert json.loads(json.dumps({k: v for k, v in header.items() if k != "objective"})), "plain data"
    # optimiser and position in the data, beside what Lightning keeps
    assert checkpoint["optimizer_states"][0]["state"] and checkpoint["loops"]["fit_loop"]
    data = {"language_model": "TextData", "reward_model": "PreferenceData", "policy": "PromptData"}[stage]
    assert data in checkpoint


def test_networks_come_back_as_they_were(stages: dict[str, Path]) -> None:
    network, reward = load_network(stages["policy"]), load_network(stages["reward_model"], "reward")
    value = load_network(stages["policy"], "value")
    assert isinstance(network, Network) and isinstance(reward, ScalarNetwork) and isinstance(value, ScalarNetwork)
    same(
        {f"networks.policy.{k}": v for k, v in network.state_dict().items()},
        {k: v for k, v in raw(stages["policy"])["state_dict"].items() if k.startswith("networks.policy.")},
    )
    assert reward.scale != 1 and reward.offset != 0, "the calibration is part of it"
    # a language model's trunk with a fresh head; of a reward model all of it
    fresh = load_network(stages["language_model"], "value")
    assert isinstance(fresh, ScalarNetwork)
    same(fresh.trunk.state_dict(), load_network(stages["language_model"]).state_dict())
    same(load_network(stages["reward_model"], "value").state_dict(), reward.state_dict())
    assert read_config(stages["policy"]) == network.config


def test_the_next_stage_gets_tokeniser_and_template(stages: dict[str, Path]) -> None:
    for stage in stages.values():
        tokenizer = load_checkpoint_tokenizer(stage)
        assert tokenizer.chat_template and tokenizer.chat_template.startswith("{% for m in messages %}[{{ m.role }}]")


@pytest.mark.parametrize("stage", ["language_model", "reward_model", "policy"])
def test_an_exported_folder_is_as_good(stage: str, stages: dict[str, Path], tmp_path: Path) -> None:
    export_folder(stages[stage], tmp_path / "folder")
    there, here = read_checkpoint(tmp_path / "folder"), read_checkpoint(stages[stage])
    same(there.state_dict, here.state_dict)
    assert there.header["networks"] == here.header["networks"]
    assert load_checkpoint_tokenizer(tmp_path / "folder").same_as(here.tokenizer)
    role: Any = next(iter(here.header["networks"]))
    one, other = load_network(stages[stage], role), load_network(tmp_path / "folder", role)
    assert torch.equal(one.eval()(TOKENS), other.eval()(TOKENS))
    # plain safetensors with the network's own names
    weights = load_file(tmp_path / "folder" / f"{role}.safetensors")
    assert weights.keys() == one.state_dict().keys()


def test_a_url_is_as_good_as_a_path(stages: dict[str, Path]) -> None:
    url = f"file://{stages['language_model']}"
    same(load_network(url).state_dict(), load_network(stages["language_model"]).state_dict())
    with pytest.raises(ValueError, match="does not exist"):
        read_checkpoint("memory://nowhere/last.ckpt")


# ------------------------------------------------------------------------------------------ what is not one


class Bomb:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "lit_palm": Bomb(mark)}, path)
    with pytest.raises(ValueError, match=r"model\.ckpt: not a safe checkpoint.*safetensors"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ValueError, match=r"model\.ckpt: not a safe checkpoint"):
        read_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(share: float, stages: dict[str, Path], tmp_path: Path) -> None:
    whole = stages["language_model"].read_bytes()
    path = tmp_path / "cut.ckpt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"cut\.ckpt: not a safe checkpoint"):
        read_checkpoint(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, content in (("text.ckpt", b"hello\n"), ("json.ckpt", b'{"a": 1}'), ("zip.ckpt", b"PK\x03\x04")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not a safe checkpoint"):
            read_checkpoint(tmp_path / name)
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match=r"weights\.ckpt: has no `lit_palm` entry"):
        read_checkpoint(tmp_path / "weights.ckpt")
    torch.save([torch.ones(1)], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match=r"list\.ckpt: holds a list"):
        read_checkpoint(tmp_path / "list.ckpt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder: a directory with neither"):
        read_checkpoint(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="folder: has no weights"):
        read_checkpoint(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        read_checkpoint(tmp_path / "folder")


def test_a_broken_export_is_refused(stages: dict[str, Path], tmp_path: Path) -> None:
    export_folder(stages["language_model"], tmp_path / "folder")
    weights = tmp_path / "folder" / "policy.safetensors"
    # a pickle under the name of a safetensors file
    torch.save({"w": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match=r"policy\.safetensors"):
        read_checkpoint(tmp_path / "folder")
    weights.unlink()
    with pytest.raises(ValueError, match=r"policy\.safetensors"):
        read_checkpoint(tmp_path / "folder")


def test_a_missing_file_is_named_with_what_is_near(stages: dict[str, Path]) -> None:
    folder = stages["policy"].parent
    with pytest.raises(ValueError, match=r"first\.ckpt' does not exist; near it are: .*last\.ckpt"):
        read_checkpoint(folder / "first.ckpt")


def test_another_format_is_refused(stages: dict[str, Path], tmp_path: Path) -> None:
    path = changed(stages["language_model"], tmp_path / "new.ckpt", format=99, version="9.9")
    with pytest.raises(ValueError, match=r"new\.ckpt: checkpoint format 99, written by lit_palm 9\.9.*reads format 1"):
        read_checkpoint(path)


def test_a_header_that_does_not_fit_is_refused(stages: dict[str, Path], tmp_path: Path) -> None:
    networks = raw(stages["language_model"])["lit_palm"]["networks"]

    def with_network(**fields: Any) -> str:
        policy = {**networks["policy"], **fields}
        return changed(stages["language_model"], tmp_path / "odd.ckpt", networks={"policy": policy})

    arguments = networks["policy"]["init_args"]
    with pytest.raises(ValueError, match=r"odd\.ckpt: does not fit the network: .*\(263, 16\) there, \(263, 24\) here"):
        load_network(with_network(init_args={**arguments, "d_model": 24}))
    with pytest.raises(ValueError, match=r"odd\.ckpt: does not fit the network: lacks layers\.1"):
        load_network(with_network(init_args={**arguments, "num_layers": 2}))
    with pytest.raises(ValueError, match=r"odd\.ckpt: written by another version of .*PaLMConfig.*colour"):
        load_network(with_network(init_args={**arguments, "colour": "red"}))
    with pytest.raises(ValueError, match=r"'nowhere\.Network' is not installed here"):
        load_network(with_network(class_path="nowhere.Network"))
    with pytest.raises(ValueError, match=r"pathlib\.Path is not a NetworkConfig"):
        load_network(with_network(class_path="pathlib.Path"))


def test_a_role_that_a_checkpoint_cannot_play_is_refused(stages: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="holds reward, none of which can be used as policy"):
        load_network(stages["reward_model"])
    with pytest.raises(ValueError, match="holds policy, none of which can be used as reward"):
        load_network(stages["language_model"], "reward")


# ------------------------------------------------------------------------------------------ in a run


def refused(folder: Path, match: str, module: Any, data: Any, path: Any = None) -> None:
    with pytest.raises(ValueError, match=match):
        trainer(folder, max_epochs=2).fit(module, datamodule=data, ckpt_path=path)


def test_resuming_refuses_what_differs(stages: dict[str, Path], tmp_path: Path) -> None:
    path = stages["language_model"]
    refused(
        tmp_path,
        "written by a language_model module, this is a reward one.*--model.network",
        reward_model(),
        ranking_data(tmp_path),
        path,
    )
    refused(
        tmp_path,
        "has d_model 16 in its policy, the configuration 32",
        language_model(network=config(d_model=32)),
        text_data(tmp_path, tokenizer=load_checkpoint_tokenizer(path)),
        path,
    )
    tokenizer = BPETokenizer(vocab_size=263)
    refused(tmp_path, "another tokeniser", language_model(), text_data(tmp_path, tokenizer=tokenizer), path)
    refused(
        tmp_path,
        "format 99",
        language_model(),
        text_data(tmp_path, tokenizer=load_checkpoint_tokenizer(path)),
        changed(path, tmp_path / "new.ckpt", format=99),
    )
    torch.save({k: v for k, v in raw(path).items() if k != "lit_palm"}, tmp_path / "foreign.ckpt")
    refused(tmp_path, "not written by lit_palm", language_model(), text_data(tmp_path), tmp_path / "foreign.ckpt")


def test_a_changed_reference_is_refused(stages: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "start.ckpt"
    shutil.copy(stages["language_model"], source)
    rewards = [RewardModel(str(stages["reward_model"]))]
    checkpoint = raw(source)
    for value in checkpoint["state_dict"].values():
        value *= 1.01
    torch.save(checkpoint, source)
    refused(
        tmp_path,
        "the frozen reference is not the one this run started with",
        policy(network=str(source), rewards=rewards),
        prompt_data(tmp_path, tokenizer=None),
        stages["policy"],
    )


def test_another_tokeniser_than_the_network_was_trained_with_is_refused(
    stages: dict[str, Path], tmp_path: Path
) -> None:
    refused(
        tmp_path,
        "another tokenizer than the one the network was trained with",
        language_model(network=str(stages["language_model"])),
        text_data(tmp_path, tokenizer=BPETokenizer(vocab_size=263)),
    )


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    refused(
        tmp_path,
        "vocab_size is 100: a token id would be outside",
        language_model(network=config(vocab_size=100)),
        text_data(tmp_path),
    )
    source = write_jsonl(tmp_path / "ids.jsonl", [{"tokens": [1, 2, 3]}, {"tokens": [5, 999]}])
    refused(
        tmp_path,
        r"ids\.jsonl:2: the token id 999 is outside the vocabulary of 263",
        language_model(),
        text_data(tmp_path, train=source, tokenizer=ByteTokenizer()),
    )
