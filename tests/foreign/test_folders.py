"""Folders of other tools as a user meets them: what is read, and the one line that says what is wrong."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_palm import load_network, read_checkpoint
from lit_palm.cli import main
from lit_palm.modules.reward_model import last_scores
from tests.families import FAMILIES, architecture, random_model, tokenizer, write_family
from tests.foreign.aligning import arguments, write_data

CLASSIFIERS = tuple(family for family in FAMILIES if family != "cohere")  # transformers has none for it


def ids(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(5, 320, (rows, length), generator=torch.Generator().manual_seed(3))


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The one line that fine-tuning a folder ends with, before any training."""

    def run(folder: Path | str, *more: str) -> str:
        data = write_data(tmp_path / "data")
        command = ["fit", *arguments("sft", Path(folder), data), "--trainer.max_steps=1", *more]
        try:
            status = main(command)
        except SystemExit as ended:
            status = int(ended.code or 0)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-palm: error:")]
        assert status == 2 and len(lines) == 1, lines
        return lines[0]

    return run


# ------------------------------------------------------------------------------------------ what is read


@torch.no_grad()
def test_shards_with_an_index(tmp_path: Path) -> None:
    model = random_model(architecture("llama"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    network = load_network(tmp_path / "sharded").eval()
    assert torch.equal(network(ids()), model(ids()).logits)


@torch.no_grad()
def test_names_of_older_files(tmp_path: Path) -> None:
    """GPT-2's own files lack the prefix, and hold masks; GPT-NeoX called its output weight by another name."""
    for family in ("gpt2", "gpt_neox"):
        folder = write_family(tmp_path / family, family)
        expected = load_network(folder).eval()(ids())
        held = load_file(folder / "model.safetensors")
        if family == "gpt2":
            held = {name.removeprefix("transformer."): weight for name, weight in held.items()}
            held["h.0.attn.bias"] = torch.ones(1, 1, 128, 128).tril()
        else:
            assert "embed_out.weight" in held
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(load_network(folder).eval()(ids()), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_sequence_classifier_is_a_reward_model(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    peer = random_model(architecture(family, num_labels=1), AutoModelForSequenceClassification)
    peer.save_pretrained(tmp_path / "reward")
    tokenizer().save_pretrained(tmp_path / "reward")
    rows = ids(3)
    rows[1, 9:] = 0
    network = load_network(tmp_path / "reward", "reward").eval()
    expected = peer(rows, attention_mask=(rows != 0).long()).logits[:, 0]
    assert (last_scores(network, rows, rows != 0) - expected).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["out_proj", "v_head.summary", "reward_head"])
def test_published_reward_heads(name: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "reward", "gpt_neox", architectures=["GPTNeoXRewardModel"])
    held = load_file(folder / "model.safetensors")
    weight, bias = torch.randn(1, 32), torch.tensor([0.5])
    del held["embed_out.weight"]  # transformers writes the old name
    save_file({**held, f"{name}.weight": weight, f"{name}.bias": bias}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPTNeoXRewardModel"]}))
    network = load_network(folder, "reward").eval()
    hidden = network.trunk.lm.base_model(ids()).last_hidden_state
    assert torch.allclose(network(ids()), (hidden @ weight.T + bias)[..., 0], atol=1e-6)


def test_a_reward_model_of_the_hub_scores_in_ppo(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    network = write_family(tmp_path / "llama", "llama")
    peer = random_model(architecture("llama", num_labels=1), AutoModelForSequenceClassification)
    peer.save_pretrained(tmp_path / "reward")
    tokenizer().save_pretrained(tmp_path / "reward")
    command = arguments("ppo", network, write_data(tmp_path / "data"))
    command = ["--model.rewards+=RewardModel" if a == "--model.rewards+=PythonReward" else a for a in command]
    command = [
        f"--model.rewards.init_args.checkpoint={tmp_path / 'reward'}" if "lower_case" in a else a for a in command
    ]
    assert main(["fit", *command, "--trainer.max_steps=2", f"--trainer.default_root_dir={tmp_path}"]) == 0


def test_the_tokeniser_and_template_come_along(tmp_path: Path) -> None:
    found = read_checkpoint(write_family(tmp_path / "llama", "llama"), header_only=True).tokenizer
    peer = tokenizer()
    assert found is not None
    assert found.encode("the cat sat") == peer("the cat sat")["input_ids"]
    assert found.chat_template == peer.chat_template
    assert (found.eos_id, found.pad_id) == (peer.eos_token_id, peer.pad_token_id)


def test_dropout_is_off_unless_asked_for(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "gpt2", "gpt2", resid_pdrop=0.5, embd_pdrop=0.5)
    network = load_network(folder).train()
    assert torch.equal(network(ids()), network(ids()))
    dropping = load_network(folder, overrides={"dropout": 0.5}).train()
    assert not torch.equal(dropping(ids()), dropping(ids()))


def test_a_network_from_nothing(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    command = [a for a in arguments("sft", tmp_path, data) if not a.startswith("--model.network")]
    small = {"model_type": "qwen2", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 64}
    command += ["--model.network=HuggingFaceConfig", f"--model.network.architecture={json.dumps(small)}"]
    command += ["--data.tokenizer=bytes", "--trainer.max_steps=1", "--trainer.callbacks+=LastCheckpoint"]
    assert main(["fit", *command, f"--trainer.callbacks.dirpath={tmp_path}"]) == 0
    assert load_network(tmp_path / "last.ckpt").config.num_layers == 1


def test_bfloat16_rounds_weights_and_not_rotary_frequencies(tmp_path: Path) -> None:
    network = load_network(write_family(tmp_path / "llama", "llama")).to(torch.bfloat16)
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in network.buffers()} == {torch.float32}


# ------------------------------------------------------------------------------------------ what is refused


def spoil(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_no_weights(tmp_path: Path, refused: Refused) -> None:
    folder = write_family(tmp_path / "llama", "llama")
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refused(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin, a pickle" in refused(folder)


def test_a_truncated_or_missing_shard_is_named(tmp_path: Path, refused: Refused) -> None:
    folder = write_family(tmp_path / "llama", "llama")
    random_model(architecture("llama")).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert f"{shard.name}: is cut short" in refused(folder)
    shard.unlink()
    assert f"{shard.name} is missing" in refused(folder)


def test_a_weight_that_is_not_there_is_named(tmp_path: Path, refused: Refused) -> None:
    folder = write_family(tmp_path / "llama", "llama")
    held = load_file(folder / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack model.layers.1.mlp.up_proj.weight" in refused(folder)


def test_a_weight_of_another_shape_is_named(tmp_path: Path, refused: Refused) -> None:
    folder = write_family(tmp_path / "llama", "llama")
    held = load_file(folder / "model.safetensors")
    held["model.norm.weight"] = torch.ones(31)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lm.model.norm.weight: (31,) there, (32,) here" in refused(folder)


def test_no_tokeniser(tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "llama"
    random_model(architecture("llama")).save_pretrained(folder)
    assert "there is no tokenizer: set data.tokenizer" in refused(folder)
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    command = arguments("sft", folder, write_data(tmp_path / "data"))
    assert main(["fit", *command, f"--data.tokenizer={tmp_path / 'tokenizer'}", "--trainer.max_steps=1"]) == 0


def test_a_vocabulary_smaller_than_the_tokenisers(tmp_path: Path, refused: Refused) -> None:
    folder = write_family(tmp_path / "llama", "llama", vocab_size=300)
    line = refused(folder)
    assert "306 ids" in line and "300" in line


@pytest.mark.parametrize(
    "model_type, missing",
    [
        ("t5", "no causal language model"),
        ("mamba", "a cache whose rows can be chosen"),
        ("gemma2", "softcap"),
        ("no_such_thing", "model type 'no_such_thing'"),
    ],
)
def test_an_architecture_that_is_not_supported(model_type: str, missing: str, tmp_path: Path, refused: Refused) -> None:
    folder = write_family(tmp_path / "llama", "llama")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    line = refused(folder)
    assert missing in line and str(folder) in line


def test_code_of_a_folder_is_not_run(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose architecture is Python files of its own: refused, and run once the user says so."""
    folder = write_family(tmp_path / "own", "llama")
    (folder / "own_model.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
    spoil(folder, lambda config: config.update(model_type="own", auto_map=auto))
    assert "LIT_PALM_REMOTE_CODE=1" in refused(folder)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setenv("LIT_PALM_REMOTE_CODE", "1")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = arguments("sft", folder, write_data(tmp_path / "data"))
    assert main(["fit", *command, "--trainer.max_steps=1", f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert (tmp_path / "ran").exists()


def test_several_scores(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    peer = random_model(architecture("llama", num_labels=3), AutoModelForSequenceClassification)
    peer.save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"score\.weight gives 3 scores"):
        load_network(tmp_path / "reward", "reward")


def test_broken_config(tmp_path: Path, refused: Refused) -> None:
    folder = write_family(tmp_path / "llama", "llama")
    (folder / "config.json").write_text("{")
    assert "config.json: cannot be read as JSON" in refused(folder)


def test_a_name_that_is_not_on_the_hub(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    assert "nobody/nothing: there is no such file or folder here, and no such model" in refused("nobody/nothing")


def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "'runs/nothing' does not exist" in refused("runs/nothing")
