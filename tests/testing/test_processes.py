"""Programs that are forked from a process with everything imported: as `python -m` would run them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lit_palm.testing.processes import Program

PROGRAM = """
import multiprocessing, os, sys, time
before = [name for name in sys.modules if name.startswith(("lit_palm_", "tests"))]
import torch
print(__name__, sys.argv[1:], os.getcwd(), os.environ.get("COLOUR"), torch.get_num_threads(), before)
assert multiprocessing.get_start_method() == STARTS
print(os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), file=sys.stderr)
what = sys.argv[1]
if what == "fails" and os.environ.get("RANK", "1") == "1":
    sys.exit(7)
if what == "raises":
    raise ValueError("broken")
if what != "ends":
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    starts = multiprocessing.get_start_method()
    (tmp_path / "some_program.py").write_text(PROGRAM.replace("STARTS", repr(starts)), encoding="utf-8")
    return tmp_path


def environment() -> dict[str, str]:
    return {**os.environ, "COLOUR": "green", "OMP_NUM_THREADS": "1"}


def alive(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(path.parent.name))
    return found


def test_it_is_the_program_with_its_own_arguments_folder_and_environment(folder: Path) -> None:
    done = Program("some_program", ["ends", "x y"], folder / "out", environment(), folder).finish()
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"__main__ ['ends', 'x y'] {folder} green 1 []\n"
    assert done.stderr == "None of None\n" and "COLOUR" not in os.environ


@pytest.mark.parametrize("what, status, said", [("fails", 7, ""), ("raises", 1, "ValueError: broken")])
def test_its_status_and_its_error_are_told(what: str, status: int, said: str, folder: Path) -> None:
    done = Program("some_program", [what], folder / "out", environment(), folder).finish()
    assert done.returncode == status and said in done.stderr


def test_ranks_know_of_each_other(folder: Path) -> None:
    done = Program("some_program", ["ends"], folder / "out", environment(), folder, ranks=2).finish()
    assert done.returncode == 0 and sorted(done.stderr.splitlines()) == ["0 of 2", "1 of 2"]


def test_a_rank_that_fails_ends_the_others(folder: Path) -> None:
    """The other would sleep for ten minutes; it is left some seconds to say something."""
    begun = time.monotonic()
    done = Program("some_program", ["fails"], folder / "out", environment(), folder, ranks=2).finish(400)
    assert done.returncode == 7 and time.monotonic() - begun < 300


def test_one_that_takes_too_long_is_killed_with_all_its_ranks(folder: Path) -> None:
    program = Program("some_program", ["sleeps"], folder / "out", environment(), folder, ranks=2)
    while len(program.stderr.splitlines()) < 2:
        assert program.poll() is None
        time.sleep(0.02)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.1)
    program.kill()
    assert program.poll() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while left := alive(program.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
