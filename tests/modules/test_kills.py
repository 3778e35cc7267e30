"""A PPO run by the command line survives SIGKILL at any moment, and ends with the bits of one that was never killed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lit_palm.testing.processes import Program

ROOT = Path(__file__).parents[2]


def killed(folder: Path, kind: str, count: int, how: str, seed: int, timeout: float) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [str(folder), kind, str(count), how, str(seed)]
    done = Program("tests.modules.killed_runs", arguments, folder / "out", environment, ROOT).finish(timeout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert f"killed {count} times" in done.stdout
    print(done.stdout)


@pytest.mark.parametrize("how", ["synchronous", "asynchronous"])
def test_three_kills(how: str, tmp_path: Path) -> None:
    killed(tmp_path, "file", 3, how, 1, 240)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["synchronous", "asynchronous"])
def test_twenty_kills(how: str, tmp_path: Path) -> None:
    killed(tmp_path, "file", 20, how, 0, 900)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["synchronous", "asynchronous"])
def test_five_kills_of_two_processes(how: str, tmp_path: Path) -> None:
    killed(tmp_path, "folder", 5, how, 0, 900)
