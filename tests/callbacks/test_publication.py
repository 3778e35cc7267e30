"""A run may die at any instant of a saving: what is published is whole, and the run goes on from it.

The short form takes some of the instants; `pytest -m slow` takes each system call of a publication, and more kills.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lit_palm.testing.processes import Program

ROOT = Path(__file__).parents[2]


def deaths(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = Program("tests.callbacks.deaths", [str(folder), *arguments], folder / "log", environment, ROOT)
    run = program.finish(1800)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    return run.stdout


@pytest.mark.parametrize("kind, every", [("file", "3"), ("folder", "11")])
def test_a_death_at_a_step_of_the_publication_leaves_whole_checkpoints(kind: str, every: str, tmp_path: Path) -> None:
    assert re.search(r"died at \d+ of \d\d calls", deaths(tmp_path, kind, "steps", every))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_at_a_random_moment_leaves_whole_checkpoints(kind: str, tmp_path: Path) -> None:
    assert "killed 3 times" in deaths(tmp_path, kind, "kills", "3")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_deaths_whole(kind: str, tmp_path: Path) -> None:
    for name, arguments in (("steps", ("steps", "1")), ("kills", ("kills", "20"))):
        (tmp_path / name).mkdir()
        deaths(tmp_path / name, kind, *arguments)
