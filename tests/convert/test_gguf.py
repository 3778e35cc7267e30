"""What a GGUF file of ours holds, read back with the gguf package. That llama.cpp runs it is a slow proof."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize

from lit_palm.cli import main
from lit_palm.convert.gguf_file import pre_tokenizer_of
from tests.convert.checkpoints import bpe, hf, palm, save, tokenizers


def export(folder: Path, *flags: str, tokenizer: Any = None, **shape: Any) -> GGUFReader:
    path = save(folder / "last.ckpt", {"policy": palm(**shape)}, tokenizer)
    assert main(["export", str(path), str(folder / "model.gguf"), "--gguf", *flags]) == 0
    assert {p.name for p in folder.iterdir()} == {"last.ckpt", "model.gguf"}
    return GGUFReader(folder / "model.gguf")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_and_metadata(tmp_path: Path, dtype: str) -> None:
    shape = {"num_kv_heads": 2, "rope_theta": 500.0, "logit_scale": 0.3, "d_ffn": 40}
    reader = export(tmp_path, "--dtype", dtype, **shape)
    field = {name: value.contents() for name, value in reader.fields.items()}
    expected = {
        "general.architecture": "command-r", "command-r.context_length": 128, "command-r.embedding_length": 32,
        "command-r.block_count": 2, "command-r.feed_forward_length": 40, "command-r.attention.head_count": 4,
        "command-r.attention.head_count_kv": 2, "command-r.rope.freq_base": 500.0, "command-r.vocab_size": 280,
        "command-r.logit_scale": pytest.approx(0.3), "command-r.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "command-r.rope.scaling.type": "none",
        "general.file_type": {"float32": 0, "float16": 1, "bfloat16": 32}[dtype],
    }  # fmt: skip
    assert {name: field[name] for name in expected} == expected
    network = palm(**shape)
    weights = dict(network.state_dict())
    fused = weights["layers.1.attn_ffn_in.weight"]
    # Cohere's pairs of a head lie side by side, ours half a head (4 of 8) apart
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    there = {
        "token_embd.weight": weights["embedding.weight"],
        "output_norm.weight": weights["norm.weight"],
        "blk.0.attn_norm.weight": weights["layers.0.norm.weight"],
        "blk.1.attn_q.weight": fused[:32].view(4, 8, 32)[:, order].reshape(32, 32),
        "blk.1.attn_k.weight": fused[32:48].view(2, 8, 32)[:, order].reshape(16, 32),
        "blk.1.attn_v.weight": fused[48:64],
        "blk.1.attn_output.weight": weights["layers.1.attn_out.weight"],
        "blk.1.ffn_gate.weight": fused[64:104],
        "blk.1.ffn_up.weight": fused[104:],
        "blk.1.ffn_down.weight": weights["layers.1.ffn_out.weight"],
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 + 2 * 8
    for name, weight in there.items():
        wanted = weight.to(getattr(torch, dtype)).float() if weight.dim() == 2 else weight
        kind = tensors[name].tensor_type
        assert kind.name == (
            {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype] if weight.dim() == 2 else "F32"
        )
        read = dequantize(tensors[name].data, kind).reshape(tuple(weight.shape))
        assert np.array_equal(read, wanted.numpy()), name
        assert tuple(reversed(tensors[name].shape.tolist())) == tuple(weight.shape)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "hf", "hf, begins"])
def test_the_tokenizer_is_included(tmp_path: Path, kind: str) -> None:
    tokenizer = tokenizers()[kind]
    reader = export(tmp_path, tokenizer=tokenizer)
    field = {name: value.contents() for name, value in reader.fields.items()}
    texts, types = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    assert len(texts) == len(types) == 280 and len(set(texts)) == 280
    assert field["tokenizer.ggml.pre"] == ("command-r" if kind == "bpe" else "gpt-2")
    control = {index for index, kind in enumerate(types) if kind == TokenType.CONTROL}
    assert control == set(tokenizer.special_tokens.values())
    unused = {index for index, kind in enumerate(types) if kind == TokenType.UNUSED}
    assert unused == set(range(tokenizer.vocab_size, 280))
    assert field["tokenizer.ggml.eos_token_id"] == tokenizer.eos_id
    assert field["tokenizer.ggml.add_bos_token"] is (tokenizer.bos_id is not None)
    assert field.get("tokenizer.ggml.bos_token_id") == tokenizer.bos_id
    assert texts[tokenizer.eos_id] == tokenizer.token(tokenizer.eos_id)
    if kind == "bytes":
        assert texts[ord("a")] == "a" and texts[ord(" ")] == "Ġ"
    template = field["tokenizer.chat_template"]
    assert "generation %}" not in template.replace("add_generation_prompt", "")


def test_pre_tokenizers_are_told_apart() -> None:
    from tokenizers import Regex, pre_tokenizers

    backend = hf(False).backend
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = r"\p{N}{1,3}"
    llama = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert pre_tokenizer_of(backend, "x") == "gpt-2"
    assert pre_tokenizer_of(bpe().backend, "x") == "command-r"
    qwen = pre_tokenizers.Split(Regex(llama.replace(digits, r"\p{N}")), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([qwen, byte_level])
    assert pre_tokenizer_of(backend, "x") == "qwen2"
    for stages in (byte_level, pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True)):
        backend.pre_tokenizer = stages
        with pytest.raises(ValueError, match=r"cuts texts into words .* as no pre-tokeniser of llama.cpp"):
            pre_tokenizer_of(backend, "x")


def test_what_llama_cpp_does_not_run_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*flags: str, network: Any = None, role: str = "policy", target: str = "m.gguf", **shape: Any) -> str:
        path = save(tmp_path / "last.ckpt", {role: network or palm(**shape)})
        assert main(["export", str(path), str(tmp_path / target), "--format", "gguf", *flags]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error and {p.name for p in tmp_path.iterdir()} <= {"last.ckpt", "mine.gguf"}
        return error

    assert "4 heads of 12 are 48 wide, and llama.cpp's command-r asks for d_model (32)" in refused(head_dim=12)
    norms = {"qk_norm": "layer", "d_model": 8, "num_heads": 1}
    assert "63 blocks with qk_norm" in refused(num_layers=63, **norms)
    assert "64 blocks without qk_norm" in refused(num_layers=64, d_model=8, num_heads=1)
    assert 'qk_norm: "l2"' in refused(qk_norm="l2") and "xpos: true" in refused(xpos=True)
    assert "has no scalar head" in refused(network=palm(scalar=True), role="reward")
    assert "give it a name that ends in .gguf" in refused(target="m.bin")
    (tmp_path / "mine.gguf").write_text("notes of mine")
    assert "is there, and no GGUF file" in refused(target="mine.gguf")

    def missing(name: str, *rest: Any, **options: Any) -> Any:
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return imported(name, *rest, **options)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    assert "pip install 'lit-palm[gguf]'" in refused()
