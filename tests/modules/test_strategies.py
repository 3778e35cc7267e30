"""Every strategy takes the steps that one process takes, and holds its part only.

Losses of each of twenty steps are compared with those of one process on the same rows, clipping at work. The short form
has two strategies; `pytest -m slow` has all of them, four processes, and what networks may be told to do with memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm.testing.processes import Program
from tests.modules.strategies import PROCESSES, saved_weights
from tests.modules.two_processes import train
from tests.support import apart

ROOT = Path(__file__).parents[2]
# float32 sums in another order: 1e-7 a step, which Adam neither damps nor raises. Measured: 2e-6 at most.
TOLERANCE = 1e-5
WEIGHTS = 2e-4  # of single weights whose gradient is itself rounding, Adam's steps differ

JOBS = ("language_model+20", "reward_model+20", "policy+20", "preference+20")
_done: dict[tuple[str, str], Path] = {}


def processes(folder: Path, name: str, *jobs: str, timeout: float = 400) -> Path:
    """Run jobs under a strategy, in one launch; the folder of their results."""
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "LIT_PALM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    # memory that is freed is given back at once, so that what a process takes is what it holds
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    if not any("measured" in job for job in jobs):
        arguments, ranks = [str(folder), name, *jobs], PROCESSES[name]
        program = Program("tests.modules.two_processes", arguments, folder / "log", environment, ROOT, ranks)
        done = program.finish(timeout)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder
    # what is in memory already when a forked process starts would not be counted
    command = [sys.executable, "-m", "tests.modules.two_processes", str(folder), name, *jobs]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    try:
        _, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-3000:]
    return folder


def check(job: str, folder: Path, here: Path) -> None:
    """The losses, gradient norms and weights of a job are those of one process."""
    plain = job.replace("+layers", "").replace("+hybrid", "").replace("+offloaded", "").replace("+whole", "")
    plain = plain.replace("+offload", "").replace("+recomputed", "").replace("+continuous", "")
    plain = plain.replace("+compiled", "").replace("+traced", "").replace("+flex", "")
    _, _, one = train(plain, here)
    many = torch.load(folder / f"{job}.pt")
    assert len(one.losses) == len(many["losses"]) >= 6
    assert max(one.norms) > 0.3, "clipping must be at work"
    for there, own in ((many["losses"], one.losses), (many["norms"], one.norms)):
        assert there == pytest.approx(own, rel=TOLERANCE, abs=TOLERANCE)
    ours, theirs = saved_weights(here / plain / "last.ckpt"), saved_weights(folder / job / "last.ckpt")
    drop = ("head.bias", "offset")  # a reward model's bias has no gradient, and its calibration takes it out again
    ours, theirs = ({k: v for k, v in w.items() if not k.endswith(drop)} for w in (ours, theirs))
    assert apart(ours, theirs) < WEIGHTS


@pytest.mark.parametrize(
    "name, jobs",
    [("sharded", ("policy+20", "language_model+traced+6")), ("tensor", ("language_model+20", "policy+20"))],
)
def test_twenty_steps_are_those_of_one_process(name: str, jobs: tuple[str, ...], tmp_path: Path) -> None:
    folder = processes(tmp_path, name, *jobs)
    for job in jobs:
        check(job, folder, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp1", "sharded", "tensor", "grid"])
def test_twenty_steps_whole(name: str, tmp_path: Path) -> None:
    jobs = (*JOBS, *(("policy+20+layers",) if name not in ("ddp", "tensor") else ()))
    folder = processes(tmp_path, name, *jobs, timeout=900)
    for job in jobs:
        check(job, folder, tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, jobs",
    [
        ("four", ("language_model+20+hybrid",)),
        ("sharded", ("policy+20+offloaded", "policy+20+whole", "language_model+20+offload", "policy+20+recomputed")),
        ("sharded", ("policy+20+continuous",)),
        ("fsdp1", ("policy+20+offloaded", "language_model+20+recomputed")),
        ("tensor", ("policy+20+continuous",)),
        ("sharded", ("language_model+flex+20", "language_model+flex+recomputed+20", "language_model+flex+traced+20")),
        ("fsdp1", ("language_model+flex+20",)),
        ("tensor", ("language_model+flex+20",)),
        ("ddp", ("language_model+flex+20",)),
    ],
)
def test_settings_change_memory_and_nothing_else(name: str, jobs: tuple[str, ...], tmp_path: Path) -> None:
    folder = processes(tmp_path, name, *jobs, timeout=900)
    for job in jobs:
        check(job, folder, tmp_path / "one")


def memory(folder: Path, job: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / job / f"memory{rank}.json").read_text())
    return found


@pytest.mark.parametrize("name", ["sharded", pytest.param("fsdp1", marks=pytest.mark.slow)])
def test_two_ranks_hold_half_each(name: str, tmp_path: Path) -> None:
    """30M parameters, measured: the memory behind tensors, and of the process."""
    job = "policy+large+2+measured"
    one, two = processes(tmp_path, "one", job), processes(tmp_path, name, job)
    whole = memory(one, job)
    for rank in range(PROCESSES[name]):
        part = memory(two, job, rank)
        held = {kind: part[kind] / whole[kind] for kind in ("parameters", "gradients", "optimizer", "frozen")}
        assert all(share <= 0.55 for share in held.values()), held
        assert part["resident"] / whole["resident"] <= 0.55, "of the process, with activations and the collection"
        # a network of 120 MB is gathered to sample, and freed
        network = whole["frozen"]
        assert part["live while sampling"] - part["live before sampling"] > 0.9 * network
        assert part["live after sampling"] - part["live before sampling"] < 0.1 * network
        assert part["peak while building"] < 0.6 * whole["peak while building"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "sharded"])
def test_every_module_resumes_exactly_on_two_processes(name: str, tmp_path: Path) -> None:
    jobs = ("language_model", "reward_model", "policy", "preference")
    folder = processes(tmp_path, name, *jobs, *(f"{job}+resumed" for job in jobs), timeout=900)
    for job in jobs:
        straight, resumed = (torch.load(folder / f"{kind}.pt") for kind in (job, f"{job}+resumed"))
        assert straight["step"] == resumed["step"] >= 6
        for k, v in straight["weights"].items():
            assert torch.equal(v, resumed["weights"][k]), (job, k)
