"""Every stage trains, resumes and exports a network of each Hugging Face family, by the command line.

Each family is trained in the short form, some here, the others in test_aligning_packages.py; `pytest -m slow` has every
stage of each.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families import FAMILIES, write_family
from tests.foreign.aligning import check_export, check_stage, write_data

SHORT = ("llama", "gpt2", "gpt_neox", "falcon", "cohere")


@pytest.mark.parametrize("family", [f if f in SHORT else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_fine_tuning_reward_and_ppo(family: str, tmp_path: Path) -> None:
    data, network = write_data(tmp_path / "data"), write_family(tmp_path / family, family)
    for stage in ("sft", "reward", "ppo"):
        checkpoint = check_stage(stage, network, data, tmp_path / stage)
        check_export(checkpoint, tmp_path / f"{stage}-exported", "reward" if stage == "reward" else "policy")
