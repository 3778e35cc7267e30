"""Starts a guarded run in processes of its own, and looks at the processes that are left."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from lit_palm.testing.processes import Program

ROOT = Path(__file__).parents[2]


class Run:
    """A run under way.

    Args:
        folder: where its files are.
        settings: see `guarded_run`.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], **environment: str) -> None:
        self.folder = folder
        surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "LIT_PALM_CACHE": str(folder / "cache"), **environment}
        # Lightning starts the other ranks, as it does for a user: who ends whom is what the guards are tested for
        arguments = [str(folder), json.dumps(settings)]
        self.process = Program("tests.callbacks.guarded_run", arguments, folder, surroundings, ROOT)

    def pid(self, rank: int) -> int:
        return int((self.folder / f"rank{rank}.pid").read_text())

    def marks(self, rank: int) -> list[str]:
        path = self.folder / f"rank{rank}.log"
        return path.read_text().splitlines() if path.exists() else []

    def reaches(self, mark: str, rank: int = 0, seconds: float = 90) -> None:
        """Wait until a rank has been somewhere."""
        deadline = time.monotonic() + seconds
        while mark not in self.marks(rank):
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < deadline, f"{mark} was not reached: {self.marks(rank)}"
            time.sleep(0.02)

    def ends(self, seconds: float) -> int:
        """Wait for the end; the status."""
        return self.process.wait(seconds)

    @property
    def stderr(self) -> str:
        return self.process.stderr

    def left(self) -> list[int]:
        """Processes of the run that still exist."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid and fields[0] not in "ZX":  # its session
                found.append(int(entry.name))
        return found

    def vanishes(self, seconds: float = 10) -> bool:
        """Whether no process is left soon: Lightning's first process does not wait for the others at a good end."""
        deadline = time.monotonic() + seconds
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.left()

    def lines(self, text: str) -> list[str]:
        return [line for line in self.stderr.splitlines() if text in line]
