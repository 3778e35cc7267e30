"""A PaLM in Cohere's layout against transformers: logits, greedy text, tokeniser, rewards, and the way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereForCausalLM
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.cohere.modeling_cohere import CoherePreTrainedModel

from lit_palm.cli import main
from lit_palm.data.templates import encode_chat
from lit_palm.data.tokenizers import ByteTokenizer, load_tokenizer
from lit_palm.models.base import ScalarNetwork
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.weights import load_network
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.sampling import Sampling
from tests.convert.checkpoints import SHAPES, palm, save, texts, tokenizers
from tests.support import same

# float32 on both sides; transformers takes the rotary tables' cosines of float32 angles, we of float64 ones
TOLERANCE = 1e-5


class CohereForSequenceClassification(GenericForSequenceClassification, CoherePreTrainedModel):
    """As the model card has it."""


def export(folder: Path, networks: dict[str, nn.Module], *flags: str, **options: Any) -> Path:
    path = save(folder / "last.ckpt", networks, **options)
    assert main(["export", str(path), str(folder / "exported"), *flags]) == 0
    return folder / "exported"


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_transformers_gives_the_same_logits_and_text(tmp_path: Path, shape: str) -> None:
    network = palm(**SHAPES[shape])
    folder = export(tmp_path, {"policy": network})
    theirs, report = CohereForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.randint(0, 263, (2, 100))
    assert (theirs.eval()(tokens).logits - network(tokens)).abs().max() < TOLERANCE
    prompts = torch.randint(0, 256, (3, 9), generator=torch.Generator().manual_seed(4))
    ours = CachedEngine().generate(
        network, list(prompts), Sampling(temperature=0, max_new_tokens=64), torch.arange(3), pad_id=256, eos_id=9999
    )
    made = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=64, do_sample=False, eos_token_id=9999
    )
    assert torch.equal(torch.stack(ours.completions), made[:, 9:])
    assert len({tuple(row.tolist()) for row in made[:, 9:]}) == 3


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_there_and_back_is_the_same(tmp_path: Path, shape: str) -> None:
    network = palm(**SHAPES[shape])
    folder = export(tmp_path, {"policy": network}, "--max_shard_size", "10KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 5
    stored = {k: v for shard in sorted(set(index["weight_map"].values())) for k, v in load_file(folder / shard).items()}
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in stored.values())
    same(CohereForCausalLM.from_pretrained(folder).model.layers[1].mlp.up_proj.weight.data,
         stored["model.layers.1.mlp.up_proj.weight"])  # fmt: skip
    assert main(["import", str(folder), str(tmp_path / "imported")]) == 0
    back = load_network(tmp_path / "imported")
    same(dict(back.state_dict()), dict(network.state_dict()))
    tokens = torch.randint(0, 263, (2, 100))
    assert torch.equal(back.eval()(tokens), network(tokens))
    assert load_tokenizer(str(folder)).same_as(ByteTokenizer())


@torch.no_grad()
def test_a_folder_of_coheres_own_is_imported(tmp_path: Path) -> None:
    from transformers import CohereConfig

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=300, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_qk_norm=True, logit_scale=0.25, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 75000.0},
    )  # fmt: skip
    theirs = CohereForCausalLM(config).eval()
    for name, weight in theirs.named_parameters():
        weight.normal_(1.0 * name.endswith("norm.weight"), 0.3)
    theirs.save_pretrained(tmp_path / "command-r", max_shard_size="30KB")
    assert main(["import", str(tmp_path / "command-r"), str(tmp_path / "imported"), "--tokenizer", "bytes"]) == 0
    network = load_network(tmp_path / "imported").eval()
    tokens = torch.randint(0, 300, (3, 64))
    assert (theirs(tokens).logits - network(tokens)).abs().max() < TOLERANCE
    assert network.config.head_dim == 12 and network.config.qk_norm == "layer"


@pytest.mark.parametrize("kind", ["bytes", "bpe", "hf", "hf, begins"])
def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, kind: str) -> None:
    tokenizer = tokenizers()[kind]
    folder = export(tmp_path, {"policy": palm()}, tokenizer=tokenizer)
    brought = read_checkpoint(folder, header_only=True).tokenizer
    assert brought is not None and brought.same_as(tokenizer)
    (folder / "lit_palm_tokenizer.json").unlink()  # theirs alone
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in [*texts(), "", " ", "naïve 中文 ½ x²", "a\tb\r\n\n  c"]:
        expected = tokenizer.prefix + tokenizer.encode(text)
        assert theirs(text)["input_ids"] == expected
        assert theirs.decode(expected, skip_special_tokens=True) == tokenizer.decode(expected)
    assert theirs.eos_token_id == tokenizer.eos_id and theirs.padding_side == "left"
    if tokenizer.bos_id is not None:
        assert theirs.bos_token_id == tokenizer.bos_id
    messages = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "well"}]
    expected = encode_chat(tokenizer, messages[:1], add_generation_prompt=True)[0]
    options = {"tokenize": True, "return_dict": False, "add_generation_prompt": True}
    assert theirs.apply_chat_template(messages[:1], **options) == expected
    again = load_tokenizer(str(folder))  # and so it comes back to our stages
    assert again.prefix + again.encode(texts()[3]) == tokenizer.prefix + tokenizer.encode(texts()[3])
    assert again.eos_id == tokenizer.eos_id and encode_chat(again, messages)[0] == encode_chat(tokenizer, messages)[0]


@torch.no_grad()
def test_a_reward_model_is_a_sequence_classifier(tmp_path: Path) -> None:
    network = palm(scalar=True, num_kv_heads=2)
    assert isinstance(network, ScalarNetwork)
    folder = export(tmp_path, {"reward": network})
    theirs, report = CohereForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    tokens = torch.randint(0, 256, (4, 30))
    lengths = torch.tensor([30, 17, 5, 1])
    ours = network(tokens).gather(1, lengths[:, None] - 1)
    padded = tokens.masked_fill(torch.arange(30) >= lengths[:, None], 256)
    bias = json.loads((folder / "config.json").read_text())["lit_palm"]["score_bias"]
    assert bias == pytest.approx((0.4 - 0.7) / 1.9)
    assert (theirs.eval()(padded).logits + bias - ours).abs().max() < TOLERANCE
    card = (folder / "README.md").read_text()
    assert "class CohereForSequenceClassification(GenericForSequenceClassification, CoherePreTrainedModel)" in card
    assert f"less the constant {bias:.6g}" in card
    assert main(["import", str(folder), str(tmp_path / "imported")]) == 0
    back = load_network(tmp_path / "imported", "reward").eval()
    assert (back(tokens) - network(tokens)).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_folder_of_shards(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as distributed_checkpoint

    # as a sharded strategy leaves it: the weights by torch.distributed.checkpoint, the header in meta.pt
    network = palm(num_kv_heads=2)
    whole = torch.load(save(tmp_path / "last.ckpt", {"policy": network}), weights_only=True)
    folder = tmp_path / "sharded.ckpt"
    distributed_checkpoint.save({"state_dict": whole.pop("state_dict")}, checkpoint_id=folder, no_dist=True)
    torch.save(whole, folder / "meta.pt")
    for target in ("exported", "memory://exported"):
        assert main(["export", str(folder), target if "://" in target else str(tmp_path / target)]) == 0
    theirs = CohereForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokens = torch.randint(0, 263, (2, 50))
    assert (theirs(tokens).logits - network(tokens)).abs().max() < TOLERANCE
    import fsspec

    there = fsspec.filesystem("memory").find("/exported")
    assert sorted(there) == sorted(f"/exported/{path.name}" for path in (tmp_path / "exported").iterdir())


def test_what_comes_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(tmp_path, {"policy": palm(), "value": palm(scalar=True)}, "--dtype", "bfloat16")
    assert "that is its policy; --network takes its value instead" in capsys.readouterr().err
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "lit_palm_tokenizer.json",
    }  # fmt: skip
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 258, "eos_token_id": 257, "pad_token_id": 256}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == 257
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "tokens trained on in the last stage: 12,345" in card and "lr: 0.003" in card
    value = tmp_path / "value"
    assert main(["export", str(tmp_path / "last.ckpt"), str(value), "--network", "value"]) == 0
    assert json.loads((value / "config.json").read_text())["num_labels"] == 1


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"qk_norm": "l2", "xpos": True}, 'has xpos: true (attention that decays with distance) and qk_norm: "l2"'),
        ({"xpos": True}, "has xpos: true (attention that decays with distance), which no architecture"),
        ({"qk_norm": "l2"}, 'has qk_norm: "l2", which no architecture'),
    ],
)
def test_what_has_no_counterpart_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "last.ckpt", {"policy": palm(**changes)})
    assert main(["export", str(path), str(tmp_path / "exported")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()
    assert main(["export", str(path), str(tmp_path / "exported"), "--format", "lit-palm"]) == 0
    same(dict(load_network(tmp_path / "exported").state_dict()), dict(palm(**changes).state_dict()))


def test_wrong_requests_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pooled = palm(scalar=True)
    pooled.pooling = "mean"  # type: ignore[assignment]
    policy, reward = save(tmp_path / "p.ckpt", {"policy": palm()}), save(tmp_path / "r.ckpt", {"reward": pooled})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "file").write_text("x")
    for arguments, reason in [
        ((policy, "x", "--network", "reward"), "has no reward; it holds policy"),
        ((reward, "x"), "pools the mean over positions"),
        ((policy, "full"), "is not empty (it holds config.json) and was not written by lit-palm"),
        ((policy, "file"), "is a file; name a folder"),
        ((policy, "file/below"), "file/below: cannot be written ("),
        ((policy, "x", "--max_shard_size", "big"), "--max_shard_size big: is no size"),
        ((policy, "x", "--format", "gguf", "--push", "me/x"), "--push me/x: uploads a folder of transformers"),
        ((policy, "x", "--format", "onnx"), "'huggingface', 'gguf', 'lit-palm'"),
    ]:
        place = tmp_path / str(arguments[1])
        assert main(["export", str(arguments[0]), str(place), *map(str, arguments[2:])]) == 2
        error = capsys.readouterr().err.strip()
        assert reason in error and "\n" not in error, error
    assert not (tmp_path / "x").exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_export_replaces_a_former_one_whole(tmp_path: Path) -> None:
    folder = export(tmp_path, {"policy": palm()}, "--max_shard_size", "20KB")
    assert (folder / "model.safetensors.index.json").exists()
    other = save(tmp_path / "other.ckpt", {"policy": palm(seed=1)})
    assert main(["export", str(other), str(folder)]) == 0
    assert not (folder / "model.safetensors.index.json").exists()  # transformers would have read the old shards
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    tokens = torch.arange(20)[None]
    assert torch.allclose(
        CohereForCausalLM.from_pretrained(folder)(tokens).logits, palm(seed=1)(tokens), atol=TOLERANCE
    )


def test_a_failed_export_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_palm.modules import shards

    folder = export(tmp_path, {"policy": palm()})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        main(["export", str(tmp_path / "last.ckpt"), str(folder)])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "exported"}
