"""Programs in processes of their own that need not import the framework again: forked from one that has done so.

A fresh interpreter spends some seconds on importing torch and Lightning, and so does each rank of a run: most of what a
tiny training takes. Here a server imports them once, on first use, and every program starts as a fork of it: in a
session of its own, with arguments, environment, folder and output of its own, and with no module of the program or of
a plugin imported. The server ends with the process that started it.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

__all__ = ["Program", "warm_context"]

PRELOADED = ("lightning.pytorch.cli", "lit_palm.callbacks", "lit_palm.cli", "lit_palm.data", "lit_palm.modules")
SHARED_FATE = 10.0
"""Seconds that the other ranks have left to say what they think of a failed one."""


def warm_context() -> multiprocessing.context.ForkServerContext:
    """The standard library's context `forkserver`, with the framework imported in its server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


class Program:
    """A program under way, as `python -m module` would run it.

    Args:
        module: its dotted name.
        arguments: of its command line.
        output: folder of the files `stdout` and `stderr`.
        environment: all its variables; by default those of this process. `OMP_NUM_THREADS` is obeyed; other variables
            that a library reads while it is loaded are not.
        folder: where it works, which is also where its imports are looked for first; by default here.
        ranks: with more than one, so many processes are started as `torchrun` starts them on one machine, and the first
            that fails ends the others.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        output: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        ranks: int = 1,
    ) -> None:
        context = warm_context()
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        variables = dict(os.environ if environment is None else environment)
        place = str(Path.cwd() if folder is None else folder)
        self._process = context.Process(
            target=_begin, args=(module, [*arguments], str(output.resolve()), variables, place, ranks)
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """Number of the process, and of its session."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def stdout(self) -> str:
        return self._said("stdout")

    @property
    def stderr(self) -> str:
        return self._said("stderr")

    def _said(self, name: str) -> str:
        path = self.output / name  # which the new process makes
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def poll(self) -> int | None:
        """The status, or None while it runs; -N where signal N ended it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; the status.

        Raises:
            subprocess.TimeoutExpired: it still runs after so many seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """End every process of it at once."""
        if self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join()

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the end; if it takes longer than so many seconds, kill it: status -9."""
        try:
            status = self.wait(timeout)
        except subprocess.TimeoutExpired:
            status = -signal.SIGKILL
        finally:
            self.kill()
        return subprocess.CompletedProcess(self._process.name, status, self.stdout, self.stderr)


def _begin(
    module: str, arguments: list[str], output: str, environment: dict[str, str], folder: str, ranks: int
) -> None:
    """In the new process: become the program, or what looks after its ranks."""
    os.setsid()
    for number, name in enumerate((os.devnull, "stdout", "stderr")):
        writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        opened = os.open(os.path.join(output, name), writing if number else os.O_RDONLY, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = list(dict.fromkeys([folder, *paths, *sys.path]))
    if environment.get("OMP_NUM_THREADS", "").isdigit():  # the library has read it long ago
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv[:] = [module, *arguments]
    multiprocessing.set_start_method(None, force=True)  # processes that the program starts are those of a fresh one
    if ranks == 1:
        _become(module)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks), NODE_RANK="0")
    running = {_fork(module, rank) for rank in range(ranks)}
    sys.exit(_first_failure(running))


def _become(module: str) -> None:
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork(module: str, rank: int) -> int:
    """Start one rank; the number of its process."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        _become(module)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _first_failure(running: set[int]) -> int:
    """Wait for all; the status of the first that failed, after which the others have little time left."""
    status, deadline = 0, float("inf")
    while running:
        child, state = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            if time.monotonic() > deadline:
                for other in running:
                    os.kill(other, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.02)
            continue
        running.discard(child)
        if (code := os.waitstatus_to_exitcode(state)) and not status:
            status, deadline = code, time.monotonic() + SHARED_FATE
    return status
