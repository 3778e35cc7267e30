"""The benchmark itself runs, in its short form; what it measures is read by people, never gated on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = [
    "training, transformers",
    "training, palm-rlhf-pytorch",
    "generation at batch 1,",
    "generation at batch 16,",
    "seconds a token",
    "peak bytes",
]
"""How the names of what is measured begin, in order; all but the last two take a peer."""


@pytest.mark.parametrize("peers", [True, False])
def test_the_short_form_measures_every_part_with_and_without_peers(tmp_path: Path, peers: bool) -> None:
    pytest.importorskip("palm_rlhf_pytorch")
    output = tmp_path / "speed.json"
    # an entry of None in sys.modules is Python's way to say that a package is not installed
    hide = "" if peers else "sys.modules['transformers'] = sys.modules['palm_rlhf_pytorch'] = None; "
    arguments = ["speed", "--short", "--threads", "1", "--output", str(output)]
    if not peers:  # memory starts processes of its own, which nothing hides peers from
        arguments += ["--only", "training", "--only", "generation", "--only", "position"]
    start = "runpy.run_module('tests.benchmarks.speed', run_name='__main__')"
    program = f"import runpy, sys; {hide}sys.argv = {arguments!r}; {start}"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = json.loads(output.read_text(encoding="utf-8"))["results"]
    expected = PARTS if peers else ["seconds a token"]
    assert len(results) == len(expected) == len(run.stdout.splitlines())
    for name, (measured, result) in zip(expected, results.items(), strict=True):
        assert measured.startswith(name) and result["ratio"] > 0
