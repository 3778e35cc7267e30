"""Plans of Hugging Face networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_palm.cli import main
from lit_palm.models.flops import palm_parameters
from lit_palm.modules.checkpoint import read_config
from lit_palm.plan.likeness import palm_like
from tests.families import FAMILIES, write_family
from tests.foreign.aligning import arguments, write_data


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_parameters_as_the_network_has(family: str, tmp_path: Path) -> None:
    config = read_config(write_family(tmp_path / family, family))
    with torch.device("meta"):
        there = sum(weight.numel() for weight in config.build().parameters())
    notes: list[str] = []
    found = palm_like(config, notes)
    assert found.vocab_size is not None and found.d_ffn is not None and f"{there:,}" in notes[0]
    shape = {name: getattr(found, name) for name in ("d_model", "num_layers", "num_heads", "head_dim", "num_kv_heads")}
    counted = palm_parameters(**shape, vocab_size=found.vocab_size, d_ffn=found.d_ffn)
    one_more = palm_parameters(**shape, vocab_size=found.vocab_size, d_ffn=found.d_ffn + 1)
    assert abs(counted - there) <= (one_more - counted) / 2


def test_a_plan_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = arguments("ppo", write_family(tmp_path / "llama", "llama"), write_data(tmp_path / "data"))
    assert main(["plan", "--device=a100-80gb", *command, "--trainer.max_steps=2"]) == 0
    out = capsys.readouterr().out
    assert "It fits" in out and "a llama of 36,000 parameters, counted as a PaLM" in out
