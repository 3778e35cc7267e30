"""The benchmark of savings runs, in its short form; what it measures is read by people, never gated on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_short_form_measures_both_ways(tmp_path: Path) -> None:
    output = tmp_path / "saving.json"
    command = [sys.executable, "-m", "tests.benchmarks.saving", "--short", "--output", str(output)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "ratio of the medians" in run.stdout
    results = json.loads(output.read_text(encoding="utf-8"))
    assert all(len(results[name]["held"]) == 3 for name in ("between", "beside"))
    assert results["beside"]["bytes"] > 1000 and results["ratio"] > 0
