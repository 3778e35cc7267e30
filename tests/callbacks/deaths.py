"""Run by test_publication.py as a program: runs that die while they save, each in a process of its own.

    python -m tests.callbacks.deaths FOLDER file|folder steps EVERY  at each (second, ...) system call of a publication
    python -m tests.callbacks.deaths FOLDER file|folder kills COUNT  by SIGKILL at random moments

After each death every published name must load, and a run must be able to go on; what it ends with must be what a run
that never died ends with. The processes are forked, so that what takes seconds is imported once.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_palm.callbacks import LastCheckpoint
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.storage import STAGING
from tests.support import everything, language_model, same, text_data, trainer

CALLS = [(os, "replace"), (os, "rename"), (os, "link"), (os, "symlink"), (os, "fsync"), (os, "unlink"), (os, "rmdir")]
"""What a publication is made of, as far as others can see it; the rest is writing into hidden files."""


class Arm(Callback):
    """From the third step on, die before the call of this number."""

    def __init__(self, number: int) -> None:
        self.number, self.made = number, 0
        self.armed = False
        for module, name in CALLS:
            setattr(module, name, self.counting(getattr(module, name)))

    def counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            self.made += self.armed
            if self.made == self.number:
                os._exit(9)
            return original(*args, **options)

        return call

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.armed = trainer.global_step >= 2


def fit(folder: Path, kind: str, steps: int, callbacks: Any = (), asynchronous: bool = False) -> dict[str, Any]:
    """Go on from last.ckpt, or begin; saved after each step and each validation."""
    place = folder / "run"
    strategy: Any = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1) if kind == "folder" else "auto"
    options = {"every_n_steps": 1, "keep_last": 2, "monitor": "val/loss", "asynchronous": asynchronous}
    run = trainer(folder, callbacks=[*callbacks, LastCheckpoint(str(place), **options)], strategy=strategy,
                  max_steps=steps, val_check_interval=2, check_val_every_n_epoch=None)  # fmt: skip
    path = place / "last.ckpt"
    run.fit(language_model(), datamodule=text_data(folder), ckpt_path=path if os.path.lexists(path) else None)
    state = everything(run)
    state["weights"] = {k: getattr(v, "full_tensor", lambda v=v: v)() for k, v in state["weights"].items()}
    return {"weights": state["weights"], "step": state["step"]}


def forked(action: Callable[[], Any]) -> int:
    """Start an action in a process of its own."""
    child = os.fork()
    if child:
        return child
    try:
        warnings.simplefilter("ignore")
        os.environ.update(MASTER_PORT=str(random.SystemRandom().randint(20000, 60000)))
        torch.manual_seed(0)
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(place: Path) -> int:
    """Every published name loads; returns the step that the newest is of."""
    names = [p.name for p in place.iterdir() if not p.name.startswith(".")]
    assert "last.ckpt" in names
    for name in names:
        assert read_checkpoint(place / name).state_dict, name
    newest = (place / "last.ckpt").resolve()
    loaded = torch.load(newest / "meta.pt" if newest.is_dir() else newest, weights_only=True)
    return int(loaded["global_step"])


def finish(folder: Path, kind: str, steps: int, expected: dict[str, Any]) -> None:
    """Go on to the end in a process of its own, and compare."""
    result = folder / "result.pt"
    assert status_of(forked(lambda: torch.save(fit(folder, kind, steps), result))) == 0
    same(expected, torch.load(result, weights_only=True))
    left = [p.name for p in (folder / "run").iterdir() if p.name.startswith((STAGING, ".lock"))]
    assert not left, f"not swept: {left}"


def straight(folder: Path, kind: str, steps: int) -> dict[str, Any]:
    finished: Path = folder / "straight.pt"
    assert status_of(forked(lambda: torch.save(fit(folder, kind, steps), finished))) == 0
    shutil.rmtree(folder / "run")
    return dict(torch.load(finished, weights_only=True))


def _die(folder: Path, kind: str, number: int) -> None:
    fit(folder, kind, 4, [Arm(number)])


def die_at_each_step(folder: Path, kind: str, every: int) -> None:
    expected = straight(folder, kind, 5)
    for number in itertools.count(1, every):
        shutil.rmtree(folder / "run", ignore_errors=True)
        status = status_of(forked(partial(_die, folder, kind, number)))
        assert status in (0, 9), status
        if status == 0:
            break
        assert check(folder / "run") >= 2
        if (number // every) % 5 == 0:  # what a death leaves is much the same after the next call
            finish(folder, kind, 5, expected)
    print(f"died at {number // every} of {number - 1} calls")
    assert number > 20


def die_at_random(folder: Path, kind: str, count: int) -> None:
    chance = random.Random(0)
    reached = 0
    for number in range(count):
        child = forked(lambda number=number: fit(folder, kind, 100_000, asynchronous=number % 2 == 1))
        while not os.path.lexists(folder / "run" / "last.ckpt") or not (folder / "run" / ".lock").exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
            time.sleep(0.01)
        time.sleep(0.2 + chance.random() * 0.6)
        os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL
        step = check(folder / "run")
        assert step >= reached
        reached = step
    shutil.move(folder / "run", folder / "survivor")
    expected = straight(folder, kind, reached + 2)
    shutil.move(folder / "survivor", folder / "run")
    finish(folder, kind, reached + 2, expected)
    print(f"killed {count} times, up to step {reached}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, what = Path(sys.argv[1]), sys.argv[2]
    if sys.argv[3] == "steps":
        die_at_each_step(where, what, int(sys.argv[4]))
    else:
        die_at_random(where, what, int(sys.argv[4]))
