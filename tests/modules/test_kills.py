"""A PPO run by the command line survives SIGKILL at any moment, and ends with the bits of one that was never killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def killed(folder: Path, kind: str, count: int, how: str, seed: int, timeout: float) -> None:
    command = [sys.executable, "-m", "tests.modules.killed_runs", str(folder), kind, str(count), how, str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, out + err[-4000:]
    assert f"killed {count} times" in out
    print(out)


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
