"""The benchmark of serving runs, in its short form; what it measures is read by people, never gated on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_short_form_measures_every_part(tmp_path: Path) -> None:
    pytest.importorskip("litserve")
    output = tmp_path / "serving.json"
    command = [sys.executable, "-m", "tests.benchmarks.serving", "--short", "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    results = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert len(results) == 4 == len(run.stdout.splitlines())
    assert all(result["ratio"] > 0 and result["tokens_per_second"] > 0 for result in results.values())
