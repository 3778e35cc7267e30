"""What of Cohere's folders is refused, by name, and that a sharded one is converted in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_palm.cli import main
from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.modules.weights import load_network
from tests.convert.checkpoints import palm, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded folder in Cohere's layout, with a tokeniser."""
    path = save(tmp_path / "last.ckpt", {"policy": palm()})
    assert main(["export", str(path), str(tmp_path / "command-r"), "--max_shard_size", "20KB"]) == 0
    return tmp_path / "command-r"


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert main(["import", str(folder), str(folder.parent / "imported"), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("lit-palm: error: ")
    assert not (folder.parent / "imported").exists()
    return error


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_type": "cohere2"}, "cohere2 attends through a sliding window in most blocks"),
        ({"model_type": "llama"}, "llama is another architecture than PaLM's"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type is linear"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is dynamic"),
        ({"quantization_config": {"bits": 4}}, "it is quantised (quantization_config)"),
        ({"hidden_size": None}, "lacks or misstates"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "which a PaLM has no place for"),
        ({"use_qk_norm": True}, "lacks model.layers.0.self_attn.q_norm.weight"),
        ({"intermediate_size": 100}, "has shape (128, 32), (100, 32) by its config"),
        ({"vocab_size": 262}, "model.embed_tokens.weight has shape (280, 32)"),
    ],
)
def test_an_architecture_that_is_no_palm(
    folder: Path, changes: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder, **changes)
    assert reason in refused(folder, capsys)


def test_what_is_missing_or_broken_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = sorted(folder.glob("model-*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-100])
    error = refused(folder, capsys)
    assert f"{shards[1]}: is truncated, {len(whole) - 100} bytes instead of {len(whole)}" in error
    shards[1].write_bytes(whole[:5])
    assert f"{shards[1]}: cannot be read as safetensors" in refused(folder, capsys)
    shards[1].unlink()
    assert f"lacks {shards[1].name}, 1 of the {len(shards)} shards" in refused(folder, capsys)
    shards[1].write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    kept = index.read_text()
    index.write_text("{}")
    assert "is no index of shards" in refused(folder, capsys)
    index.write_text(kept.replace(shards[1].name, "../elsewhere.safetensors"))
    assert "names '../elsewhere.safetensors', which is not a file of this folder" in refused(folder, capsys)
    index.write_text(kept.replace("model.norm.weight", "model.norm.wait"))
    assert "lacks model.norm.wait, which the index says it holds" in refused(folder, capsys)
    index.unlink()
    assert "the folder holds no weights; one of model.safetensors" in refused(folder, capsys)
    (folder / "config.json").write_text("{]")
    assert "config.json: not JSON" in refused(folder, capsys)
    (folder / "config.json").unlink()
    assert "the folder holds no weights" in refused(folder, capsys)


def test_a_tokenizer_is_needed_and_must_fit(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for path in [*folder.glob("tokenizer*"), folder / "lit_palm_tokenizer.json"]:
        path.unlink()
    assert "the folder has no tokeniser (tokenizer.json): name one by --tokenizer" in refused(folder, capsys)
    small = save(tmp_path / "small.ckpt", {"policy": palm(vocab_size=200)})
    assert main(["export", str(small), str(tmp_path / "small")]) == 0
    ByteTokenizer().save(str(folder))
    assert "has 200 token ids and its tokeniser 263" in refused(tmp_path / "small", capsys)
    assert "is for checkpoints of palm-rlhf-pytorch" in refused(folder, capsys, "--gamma", "plain")
    assert "nowhere: does not exist" in refused(tmp_path / "nowhere", capsys)


def test_quantised_and_untied_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = next(p for p in folder.glob("model-*") if "model.norm.weight" in load_file(p))
    kept = load_file(place)
    save_file({**kept, "model.norm.weight": kept["model.norm.weight"].to(torch.int8)}, place)
    assert "model.norm.weight is of type int8: quantised weights" in refused(folder, capsys)
    save_file(kept, place)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    embedding = load_file(folder / index["weight_map"]["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    index["weight_map"]["lm_head.weight"] = place.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({**kept, "lm_head.weight": embedding + 1}, place)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refused(folder, capsys)
    save_file({**kept, "lm_head.weight": embedding.clone()}, place)
    assert main(["import", str(folder), str(folder.parent / "imported")]) == 0


MEASURE = """
import os, sys, threading
from lit_palm.cli import main
import lit_palm.convert.importing, torch, safetensors.torch, transformers

def kilobytes(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))

peak, before, done = [0, 0], [kilobytes("RssAnon"), kilobytes("VmRSS")], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], kilobytes("RssAnon")); peak[1] = max(peak[1], kilobytes("VmRSS"))
watcher = threading.Thread(target=watch); watcher.start()
status = main(["import", *sys.argv[1:]])
done.set(); watcher.join()
print(status, peak[0] - before[0], peak[1] - before[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sharded_folder_is_converted_in_little_memory(tmp_path: Path) -> None:
    shape = {"vocab_size": 2000, "d_model": 512, "num_layers": 16, "num_heads": 8, "head_dim": 64, "num_kv_heads": 2}
    network = palm(**shape)
    path = save(tmp_path / "last.ckpt", {"policy": network})
    size = sum(weight.nbytes for weight in network.parameters())
    assert main(["export", str(path), str(tmp_path / "folder"), "--max_shard_size", "30MB"]) == 0
    shards = [p.stat().st_size for p in (tmp_path / "folder").glob("*.safetensors")]
    assert len(shards) >= 8 and size > 240e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "folder"), str(tmp_path / "imported")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    status, own, resident = map(int, done.stdout.split())
    assert status == 0
    print(f"{size / 1e6:.0f} MB in {len(shards)} shards: {own / 1e3:.0f} MB taken, {resident / 1e3:.0f} MB resident")
    # one fused weight and what it is made of; pages of the file that is mapped count as resident until it is let go
    assert own * 1024 < 0.25 * size
    assert resident * 1024 < 0.5 * size
    back = load_network(tmp_path / "imported")
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), network.parameters(), strict=True))
