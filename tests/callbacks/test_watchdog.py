"""A rank that is killed, stopped or stuck is named, and the others end within the configured time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from lit_palm.callbacks.watchdog import STATUS
from tests.callbacks.runs import Run

GUARD = {"timeout": 60, "silence": 4, "interval": 0.5}


@pytest.mark.parametrize(
    "job, where, rank, how",
    [
        ("language_model", "step 2", 1, signal.SIGKILL),
        ("policy", "collection 1", 0, signal.SIGKILL),
        ("policy", "collection 1", 1, signal.SIGSTOP),
        ("language_model", "step 2", 0, signal.SIGSTOP),
    ],
    ids=["killed-training", "launcher-killed-collecting", "stopped-collecting", "launcher-stopped-training"],
)
def test_two_processes_of_which_one_is_lost(job: str, where: str, rank: int, how: int, tmp_path: Path) -> None:
    settings = {"job": job, "devices": 2, "guards": {"Watchdog": GUARD}, "slow": 0.3, "flags": {"max_epochs": 50}}
    run = Run(tmp_path / "run", settings)
    run.reaches(where, rank)
    lost, other = run.pid(rank), run.pid(1 - rank)
    os.kill(lost, how)
    started = time.monotonic()
    bound = 5 if how == signal.SIGKILL else GUARD["silence"] + 5
    while run.left() and time.monotonic() < started + bound:
        time.sleep(0.05)
    assert run.left() == [], f"processes are left: {lost=} {other=} {run.left()}\n{run.stderr}"
    status = run.ends(5)
    assert status == (STATUS if rank == 1 else -signal.SIGKILL)
    what = "is gone" if how == signal.SIGKILL else "has not answered for 4 s"
    named = run.lines(f"watchdog: rank {rank} (")
    assert len(named) == 1, run.stderr
    assert what in named[0] and f"process {lost})" in named[0] and f"this is rank {1 - rank}" in named[0]
    assert "Traceback" not in run.stderr
