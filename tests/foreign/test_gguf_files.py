"""GGUF files as networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_palm import load_network, read_checkpoint
from lit_palm.cli import main
from tests.families import architecture, random_model, tokenizer
from tests.foreign.aligning import check_stage, write_data
from tests.foreign.gguf_writer import write_gguf

pytest.importorskip("gguf")


def ids() -> torch.Tensor:
    return torch.randint(5, 320, (2, 20), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("quantisation, tolerance", [("F32", 1e-5), ("F16", 2e-3), ("Q8_0", 0.1)])
def test_a_gguf_file_is_a_network(quantisation: str, tolerance: float, tmp_path: Path) -> None:
    """16 bits keep three digits and blocks of 8 bits two, of logits of size 1."""
    model = random_model(architecture("llama", intermediate_size=64))
    path = write_gguf(tmp_path / "model.gguf", model, quantisation)
    expected = model(ids()).logits
    for place in (path, tmp_path):  # the file, and the folder it is in
        network = load_network(place).eval()
        assert (network(ids()) - expected).abs().max() < tolerance
    found = read_checkpoint(path, header_only=True).tokenizer
    assert found is not None and found.encode("the cat sat") == tokenizer()("the cat sat")["input_ids"]
    assert found.chat_template == tokenizer().chat_template and found.eos_id == 1


def test_it_is_fine_tuned_and_resumed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model(architecture("llama", intermediate_size=64)), "Q8_0")
    check_stage("sft", path, write_data(tmp_path / "data"), tmp_path / "sft")


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["generate", "--checkpoint", str(path), "--prompt", "the"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-palm: error:")]
    return line


def test_bad_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(architecture("llama", intermediate_size=64))
    unknown = write_gguf(tmp_path / "unknown.gguf", model, architecture="no-such-thing")
    line = refused(unknown, capsys)
    assert str(unknown) in line and "no-such-thing" in line

    whole = write_gguf(tmp_path / "whole.gguf", model)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:3000])
    assert f"{cut}: is cut short" in refused(cut, capsys)

    (tmp_path / "text.gguf").write_text("not a model")
    assert "no GGUF file that can be read" in refused(tmp_path / "text.gguf", capsys)
    assert "has 4 GGUF files: name one of them" in refused(tmp_path, capsys)


def test_an_unknown_tensor_type_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model(architecture("llama", intermediate_size=64)))
    raw = path.read_bytes()
    name = b"output_norm.weight"
    # after the name: the number of dimensions (4 bytes), each dimension (8), then the type (4)
    place = raw.index(name) + len(name) + 4 + 8
    path.write_bytes(raw[:place] + (99).to_bytes(4, "little") + raw[place + 4 :])
    line = refused(path, capsys)
    assert str(path) in line and "99" in line
