"""DPO and GRPO train, resume and export a network of each Hugging Face family; see test_aligning.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import FAMILIES, write_family
from tests.foreign.aligning import check_export, check_stage, write_data

pytest.importorskip("lit_palm_dpo")
pytest.importorskip("lit_palm_grpo")


SHORT = ("qwen2", "mistral", "bloom", "opt")


@pytest.mark.parametrize("family", [f if f in SHORT else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_dpo_and_grpo(family: str, tmp_path: Path) -> None:
    data, network = write_data(tmp_path / "data"), write_family(tmp_path / family, family)
    for stage in ("dpo", "grpo"):
        checkpoint = check_stage(stage, network, data, tmp_path / stage)
        check_export(checkpoint, tmp_path / f"{stage}-exported", "policy")
