"""Runs quantized_checks.py where `bitsandbytes` is installed.

In a process of its own, since importing that package makes `AdamW` the name of two optimisers.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'lit-palm[qlora]'")
def test_quantised_adapters(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/lora/quantized_checks.py"]
    run = subprocess.run([*command, f"--basetemp={tmp_path / 'own'}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
