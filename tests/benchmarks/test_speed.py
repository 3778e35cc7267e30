"""The benchmark itself runs, in its short form; what it measures is read by people, never gated on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("peers", [True, False])
def test_the_short_form_measures_every_part_with_and_without_peers(tmp_path: Path, peers: bool) -> None:
    output = tmp_path / "speed.json"
    # an entry of None in sys.modules is Python's way to say that a package is not installed
    hide = "" if peers else "sys.modules['transformers'] = sys.modules['palm_rlhf_pytorch'] = None; "
    arguments = ["speed", "--short", "--threads", "1", "--output", str(output)]
    start = "runpy.run_module('tests.benchmarks.speed', run_name='__main__')"
    program = f"import runpy, sys; {hide}sys.argv = {arguments!r}; {start}"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads(output.read_text(encoding="utf-8"))["results"]
    parts = ["seconds a token", "peak bytes"] + (["training", "generation at batch 1,"] if peers else [])
    for part in parts:
        assert any(name.startswith(part) for name in results), part
    assert len(run.stdout.splitlines()) == len(results) == (6 if peers else 2)
    assert all(result["ratio"] > 0 for name, result in results.items() if not name.startswith("peak"))
