"""Runs a job: a process for ours, one for the peers, the sides in turn."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.job import Job, Side

__all__ = ["Crew", "Result", "measure"]

ROOT = Path(__file__).parents[2]
PATIENCE = 1800.0
"""Seconds that one request may take before its process is given up."""

# memory that is freed is given back at once, so that what a process takes is what it holds
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}


class Failed(Exception):
    """A side could not be prepared or run."""


class Missing(Failed):
    """A side's package is not installed."""


class Worker:
    """A process that runs sides, and what it printed."""

    def __init__(self, python: str, threads: int, cache: Path, extra: dict[str, str] | None = None) -> None:
        paths = [str(ROOT), *(str(p) for p in sorted(ROOT.glob("plugins/*/")))]
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "LIT_PALM_CACHE": str(cache), "TMPDIR": str(cache),
            "PYTHONPATH": os.pathsep.join(paths),
            **(extra or {}),
        }  # fmt: skip
        self.log = tempfile.TemporaryFile(  # noqa: SIM115  # closed with the process
            "w+", encoding="utf-8", errors="replace"
        )
        self.process = subprocess.Popen(
            [python, "-m", "tests.benchmarks.worker"], cwd=ROOT, env=environment, text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        """Answers as they come, then an empty line for good."""
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # closed while it was read
            for line in self.process.stdout:
                self.lines.put(line)
        self.lines.put("")

    def send(self, **request: Any) -> None:
        """A request, answered in its turn."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise Failed(f"the process ended: {self.last_words()}") from None

    def answer(self) -> dict[str, Any]:
        """What the oldest request without an answer came to.

        Raises:
            Missing: a package is not installed.
            Failed: the side raised an error, or the process is gone or silent.
        """
        try:
            line = self.lines.get(timeout=PATIENCE)
        except queue.Empty:
            self.process.kill()
            raise Failed(f"no answer in {PATIENCE:.0f} s") from None
        if not line:
            self.process.wait()
            raise Failed(f"the process ended: {self.last_words()}")
        reply: dict[str, Any] = json.loads(line)
        if "missing" in reply:
            raise Missing(reply["missing"])
        if "error" in reply:
            raise Failed(reply["error"])
        return reply

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        """The last line on its stderr."""
        self.log.seek(0)
        return ([line.strip() for line in self.log if line.strip()] or ["it printed nothing"])[-1]

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class Crew:
    """The processes, by environment: started when needed, kept from job to job.

    Args:
        pythons: the interpreter of `ours` and of `peers`; an environment without one is left out.
        threads: CPU threads of every process.
        cache: a folder for what data modules keep, and for temporary files.
    """

    def __init__(self, pythons: dict[str, str], threads: int, cache: Path) -> None:
        self.pythons, self.threads, self.cache = pythons, threads, cache
        self._workers: dict[tuple[str, str], Worker] = {}

    def worker(self, side: Side, job: Job) -> Worker:
        """The process that a side of a job runs in.

        Raises:
            Missing: there is no such environment.
        """
        key = (side.environment, f"{job.name} {side.name}" if job.process == "fresh" else job.process)
        found = self._workers.get(key)
        if found is None or not found.alive:
            found = self._workers[key] = self.start(side.environment, GIVE_BACK if job.unit == "bytes" else None)
        return found

    def start(self, environment: str, extra: dict[str, str] | None = None) -> Worker:
        """A new process."""
        if environment not in self.pythons:
            raise Missing(f"no environment for {environment}")
        return Worker(self.pythons[environment], self.threads, self.cache, {"SIDE": environment, **(extra or {})})

    def done(self, job: Job) -> None:
        """Free what a job held; end processes of its own."""
        for key, worker in list(self._workers.items()):
            if key[1].startswith(f"{job.name} "):
                self._workers.pop(key).close()
            elif key[1] == job.process and worker.alive:
                try:
                    worker.send(drop=True)
                    worker.answer()
                except Failed:
                    self._workers.pop(key).close()

    def close(self) -> None:
        """End all."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


@dataclass
class Result:
    """What a job gave: every run's cost, facts of the last run, and what became of sides without one."""

    job: Job
    costs: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """How long all of it took."""

    def differs(self) -> str:
        """What says that two sides did not do the same; empty where they did."""
        values = {name: facts[self.job.same] for name, facts in self.facts.items() if self.job.same in facts}
        if not values or max(values.values()) - min(values.values()) <= self.job.tolerance:
            return ""
        return f"{self.job.same} differs: " + ", ".join(f"{name} {value:.5g}" for name, value in values.items())


class _Round:
    """The sides of a job that still run."""

    def __init__(self, job: Job, crew: Crew) -> None:
        self.result, self.workers = Result(job), {}
        for side in job.sides:
            with self.watching(side):
                self.workers[side.name] = crew.worker(side, job)

    @contextlib.contextmanager
    def watching(self, side: Side) -> Iterator[None]:
        """A side that fails is out of the job, with what it has measured."""
        try:
            yield
        except Failed as error:
            reasons = self.result.left_out if isinstance(error, Missing) else self.result.failed
            reasons[side.name] = str(error)
            self.workers.pop(side.name, None)
            self.result.costs.pop(side.name, None)

    def sides(self) -> list[Side]:
        """Those that are left."""
        return [side for side in self.result.job.sides if side.name in self.workers]

    def prepare(self) -> None:
        """All at once: sides in different processes prepare beside each other."""
        asked = self.sides()
        for side in asked:
            with self.watching(side):
                self.workers[side.name].send(prepare=side.name, call=side.call, options=dict(side.options))
        for side in [side for side in asked if side.name in self.workers]:
            with self.watching(side):
                self.workers[side.name].answer()

    def run(self, keep: bool) -> None:
        """One after another."""
        for side in self.sides():
            with self.watching(side):
                worker = self.workers[side.name]
                worker.send(run=side.name)
                reply = worker.answer()
                if keep:
                    self.result.costs.setdefault(side.name, []).append(reply["cost"])
                    self.result.facts[side.name] = reply["facts"]


def measure(job: Job, crew: Crew, told: Callable[[str], None] = lambda _: None) -> Result:
    """Prepare all sides, run each once to warm up, then in turn.

    A side that cannot be prepared or run is left out of what follows.
    """
    begun, rounds = time.perf_counter(), _Round(job, crew)
    try:
        told("preparing")
        rounds.prepare()
        if not job.once:
            told("warming up")
            rounds.run(keep=False)
        for number in range(job.repeats):
            told(f"round {number + 1} of {job.repeats}")
            rounds.run(keep=True)
    finally:
        crew.done(job)
    rounds.result.seconds = time.perf_counter() - begun
    return rounds.result
