"""The comparison with TRL runs, in its short form; what it measures is read by people, never gated on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_short_form_measures_both_sides(tmp_path: Path) -> None:
    for package in ("trl", "lit_palm_dpo", "lit_palm_grpo"):
        pytest.importorskip(package)
    output = tmp_path / "alignment.json"
    command = [sys.executable, "-m", "tests.benchmarks.alignment", "--short", "--threads", "1", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert list(results) == ["dpo", "grpo"] and all(r["ratio"] > 0 and r["peer_seconds"] for r in results.values())
    assert sum("ours / TRL" in line for line in done.stdout.splitlines()) == 2
