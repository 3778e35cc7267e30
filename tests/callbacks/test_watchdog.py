"""A rank that is killed, stopped or stuck is named, and the others end within the configured time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lit_palm.callbacks import Watchdog
from lit_palm.callbacks.heartbeat import Beat, Heartbeats, Trouble
from lit_palm.callbacks.watchdog import STATUS
from tests.callbacks.runs import Run

GUARD = {"timeout": 60, "silence": 4, "interval": 0.5}


@pytest.mark.parametrize(
    "job, where, rank, how",
    [
        pytest.param("policy", "collection 1", 1, signal.SIGKILL, id="killed-collecting"),
        pytest.param("language_model", "step 2", 0, signal.SIGSTOP, id="launcher-stopped-training"),
        pytest.param("language_model", "step 2", 1, signal.SIGKILL, id="killed-training", marks=pytest.mark.slow),
        pytest.param("policy", "step 5", 0, signal.SIGKILL, id="launcher-killed", marks=pytest.mark.slow),
        pytest.param("policy", "collection 1", 1, signal.SIGSTOP, id="stopped-collecting", marks=pytest.mark.slow),
    ],
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


@pytest.mark.slow
def test_a_rank_that_hangs_with_its_threads_alive_is_named_by_what_it_does(tmp_path: Path) -> None:
    guard = {"timeout": 3, "silence": 30, "interval": 0.3}
    settings = {
        "devices": 2,
        "guards": {"Watchdog": guard},
        "sleeps": {"rank": 1, "step": 2},
        "flags": {"max_epochs": 9},
    }
    run = Run(tmp_path / "run", settings)
    run.reaches("step 1", 1)
    assert run.ends(25) == STATUS, run.stderr
    named = run.lines("lit-palm: error: watchdog: ")
    # both reached the forward and backward pass of step 2; rank 0 waits there for gradients
    assert named and all(line.startswith("lit-palm: error: watchdog: rank 1 (") for line in named), run.stderr
    assert "after step 2, made no progress for 3 s" in named[0] and "in on_train_batch_start" not in named[0]
    assert "guarded_run.py" in named[0] and "most recent call first" in run.stderr
    assert run.vanishes()


@pytest.mark.slow
def test_the_error_of_one_rank_is_the_error_of_all(tmp_path: Path) -> None:
    settings = {
        "devices": 2,
        "guards": {"Watchdog": GUARD},
        "breaks": {"rank": 1, "step": 2},
        "flags": {"max_epochs": 9},
    }
    run = Run(tmp_path / "run", settings)
    assert run.ends(60) == STATUS, run.stderr
    line = run.lines("lit-palm: error: watchdog: ")[-1]
    assert "rank 1 (" in line and "failed, in forward and backward" in line
    assert "ValueError: a row of the data is broken" in line and "this is rank 0" in line
    assert run.vanishes()


# ------------------------------------------------------------------------------------------ the judgement, with a clock


class Store(dict[str, bytes]):
    """A store in memory."""

    def set(self, key: str, value: str) -> None:
        if self.get("broken", b""):
            raise RuntimeError("Connection reset by peer\nframe 0")
        self[key] = value.encode()


class World:
    """Some ranks, on hosts of their own, and a clock."""

    def __init__(self, size: int) -> None:
        self.now, self.store = 0.0, Store()
        self.ranks = [
            Heartbeats(self.store, size, Beat(r, f"host{r}", 1, ""), 100, 10, clock=lambda: self.now)
            for r in range(size)
        ]
        for rank in self.ranks:
            rank.announce()
        for rank in self.ranks:
            rank.meet()

    def run(self, seconds: int, moving: set[int], beating: set[int], phase: str = "a collection") -> dict[int, str]:
        """What the ranks say after some seconds."""
        found: dict[int, str] = {}
        for _ in range(seconds):
            self.now += 1
            for number, rank in enumerate(self.ranks):
                if number in moving:
                    rank.move(phase, 7)
                if number in beating:
                    rank.exchange()
                    trouble = rank.judge()
                    if trouble is not None and number not in found:
                        found[number] = trouble.text
        return found


def test_nothing_is_wrong_while_all_beat_and_move() -> None:
    everyone = set(range(4))
    assert World(4).run(500, everyone, everyone) == {}


def test_a_silent_rank_is_found_by_the_one_before_it() -> None:
    world, everyone = World(4), set(range(4))
    world.run(5, everyone, everyone)
    found = world.run(12, everyone, everyone - {2})
    assert list(found) == [1] and found[1].startswith("rank 2 (host2, process 1), last seen in a collection")
    assert "has not answered for 10 s" in found[1]


def test_of_ranks_that_make_no_progress_the_one_behind_is_named() -> None:
    world, everyone = World(4), set(range(4))
    world.run(5, everyone, everyone)
    world.run(1, everyone - {3}, everyone, "forward and backward")
    found = world.run(102, set(), everyone)
    assert found and all(text.startswith("rank 3 (host3") and "100 s" in text for text in found.values())
    assert "and 0 more" not in next(iter(found.values()))


def test_what_comes_before_training_is_not_timed() -> None:
    world, everyone = World(2), set(range(2))
    assert world.run(300, set(), everyone) == {}


def test_a_process_that_was_stopped_itself_looks_afresh() -> None:
    world, everyone = World(2), set(range(2))
    world.run(5, everyone, everyone)
    world.now += 500  # a laptop's lid
    assert world.run(5, everyone, everyone) == {}


def test_a_store_that_is_gone_is_the_first_rank() -> None:
    world, everyone = World(2), set(range(2))
    world.store["broken"] = b"yes"
    assert world.run(1, everyone, {1})[1].startswith("rank 0 (host0, process 1)")


def test_an_error_that_a_rank_reports_ends_the_others_after_a_while() -> None:
    world, everyone = World(3), set(range(3))
    world.ranks[2].report(Trouble("rank 2 failed: ValueError: no"))
    found = world.run(5, everyone, {0, 1})
    assert found == {0: "rank 2 failed: ValueError: no", 1: "rank 2 failed: ValueError: no"}
    assert World(3).run(3, everyone, {0, 1}) == {}


def test_one_process_watches_itself() -> None:
    clock = [0.0]
    alone = Heartbeats(None, 1, Beat(0, "host", 1, ""), 10, 5, clock=lambda: clock[0])
    alone.announce()
    alone.meet()
    alone.move("forward and backward", 3)
    for clock[0] in range(1, 10):
        alone.exchange()
        assert alone.judge() is None
    for clock[0] in range(10, 13):
        alone.exchange()
        trouble = alone.judge()
    assert trouble is not None and "rank 0 (host, process 1)" in trouble.text and "no progress for 10 s" in trouble.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"timeout": 0}, "timeout is 0; it must be a positive number of seconds"),
        ({"silence": float("inf")}, "silence is inf"),
        ({"interval": -1}, "interval is -1"),
        ({"silence": 2, "interval": 1}, "silence 2 must be at least three times interval 1"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Watchdog: {message}"):
        Watchdog(**arguments)
