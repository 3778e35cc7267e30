"""Which checkpoints a folder keeps: publishes new ones and removes old ones, in an order that a kill cannot harm.

A new checkpoint is written and named, then `last.ckpt` (and `best.ckpt`) point to it, then the list of what is kept is
replaced, and only then old ones go. Whatever instant the process dies at, each name is a whole checkpoint, and what is
left over is swept when the next run takes the folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from typing import Any, Literal

import torch

from lit_palm.callbacks.writing import Job
from lit_palm.modules.storage import STAGING, STEP, Place, step_of

__all__ = ["Shelf"]

INDEX = ".checkpoints.json"
"""Name of the list of what is kept."""


class Shelf:
    """The checkpoints of one run in one place.

    With `keep_last` 1, a run that writes files keeps the newest as `last.ckpt` alone; all others are called
    `step-00000120.ckpt`.

    Args:
        place: the folder.
        keep_last: how many of the newest are kept.
        keep_best: how many of the best by score are kept.
        mode: whether a small score is good, or a large one.
    """

    def __init__(self, place: Place, keep_last: int, keep_best: int, mode: Literal["min", "max"]) -> None:
        self.place, self.keep_last, self.keep_best = place, keep_last, keep_best
        self._sign = 1.0 if mode == "min" else -1.0
        self._last: list[str] = []
        self._best: list[tuple[float, str]] = []
        self._taken: set[str] = set()
        self._pinned: str | None = None
        """What best.ckpt points to."""

    def open(self) -> None:
        """Read what is kept, and sweep what a killed run left; only the holder of the lock may."""
        names = self.place.names()
        index = self._read_index()
        steps = sorted((name for name in names if STEP.fullmatch(name)), key=step_of)
        steps = [name for name in steps if self.place.is_whole(name)]
        if index is None:
            self._last, self._best = steps, []
        else:
            self._last = [name for name in index["last"] if name in steps]
            self._best = [(float(score), name) for score, name in index["best"] if name in steps]
        self._taken = {name for name in names if STEP.fullmatch(name)}
        self._adopt(names)
        self._pinned = self.place.target("best.ckpt") if "best.ckpt" in names else None
        newest = self.place.target("last.ckpt")
        self._last += [name for name in steps if name == newest and name not in self._last]
        kept = {*self._last, *(name for _, name in self._best), self._pinned}
        for name in names:
            if name.startswith((STAGING, ".lock.")) or (STEP.fullmatch(name) and name not in kept):
                self.place.remove(name)

    def _adopt(self, names: list[str]) -> None:
        """Give a folder of shards that is itself called last.ckpt a name of its own, as it could not be replaced."""
        if not self.place.local or not os.path.isdir(self.place.path("last.ckpt")):
            return
        if os.path.islink(self.place.path("last.ckpt")):
            return
        step = 0
        with contextlib.suppress(OSError):
            step = int(torch.load(self.place.path("last.ckpt/meta.pt"), weights_only=True)["global_step"])
        name = self.free_name(step)
        os.rename(self.place.path("last.ckpt"), self.place.path(name))
        self.place.point("last.ckpt", name)
        self._last.append(name)

    def free_name(self, step: int) -> str:
        """A name for the checkpoint of a step; no name is ever used twice."""
        name, number = f"step-{step:08d}.ckpt", 0
        while name in self._taken:
            number += 1
            name = f"step-{step:08d}-{number}.ckpt"
        self._taken.add(name)
        return name

    def is_best(self, score: float | None) -> bool:
        """Whether a score is among the best."""
        if score is None or not self.keep_best or math.isnan(score):
            return False
        return len(self._best) < self.keep_best or self._sign * score < max(self._sign * s for s, _ in self._best)

    def publish(self, job: Job) -> None:
        """Give a written checkpoint its name, and let go of those that are not to be kept."""
        best = self.is_best(job.score)
        named = best or self.keep_last > 1 or job.shards is not None or not self.place.local
        if named:
            self._name(job)
            # of several of one step (before and after its validation) the newest is enough
            self._last = [name for name in self._last if step_of(name)[0] != job.step]
            self._last.append(job.name)
        if best:
            assert job.score is not None
            self._best = sorted([*self._best, (job.score, job.name)], key=lambda entry: self._sign * entry[0])
            self._best = self._best[: self.keep_best]
        if named:
            self.place.point("last.ckpt", job.name)
        else:
            os.replace(self.place.path(job.staged), self.place.path("last.ckpt"))
            self.place.sync()
            self._last = []
        if best and self._best[0][1] == job.name:
            self.place.point("best.ckpt", job.name)
            self._pinned = job.name
        self._last = self._last[-self.keep_last :]
        self._write_index()
        self._prune()

    def _name(self, job: Job) -> None:
        """The name appears in one step; a URL has the checkpoint in its place already."""
        if not self.place.local:
            return
        os.rename(self.place.path(job.staged), self.place.path(job.name))
        self.place.sync()

    def _prune(self) -> None:
        kept = {*self._last, *(name for _, name in self._best), self._pinned}
        for name in sorted(self._taken - kept):
            if not self.place.local or os.path.lexists(self.place.path(name)):
                self.place.remove(name)
        self._taken &= kept

    def _read_index(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.place.read(INDEX))
            return found if isinstance(found, dict) and {"last", "best"} <= found.keys() else None
        except (FileNotFoundError, ValueError):
            return None

    def _write_index(self) -> None:
        data = {"last": self._last, "best": [[score, name] for score, name in self._best]}
        self.place.write(INDEX, json.dumps(data).encode())
