"""Who is alive and who moves on: every rank's heartbeat in the process group's store, and the judgement on it.

A beat is a line of JSON under the rank's key. A thread of each rank writes its own once in `interval` seconds and reads
that of the next rank, so the store sees three small requests a rank, whatever their number. Nothing here is a
collective: a store answers while all ranks are stuck in one. `Watchdog` is the callback around it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

__all__ = ["Beat", "Heartbeats", "Trouble", "connect", "is_gone", "this_process"]


@dataclass
class Beat:
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    born: str
    """When the process started, so that a number that is used again is not taken for it; "" where unknown."""
    phase: str = "set-up"
    step: int = 0
    moves: int = 0
    """Hooks of the training loop that were reached: it stands still where the rank hangs."""
    count: int = 0
    """Beats sent: it stands still where the process is gone or stopped."""
    state: str = "running"
    """`running`, `done`, or `failed: ` and the error."""
    where: str = ""
    """The innermost line of Python that its main thread is in."""
    waits: bool = False
    """That line waits for other ranks: a collective, or the backward pass that holds one."""

    @property
    def name(self) -> str:
        """ "rank 3 (node7, process 4711)"."""
        return f"rank {self.rank} ({self.host.partition('|')[0]}, process {self.pid})"

    @property
    def place(self) -> str:
        """ "in the collection after step 12"."""
        where = f" ({self.where})" if self.where else ""
        return f"in {self.phase}{where}, after step {self.step}"


@dataclass
class Trouble:
    """Why a run cannot go on."""

    text: str
    culprits: Sequence[Beat] = ()


def this_process(rank: int) -> Beat:
    """The first beat of this process; the host tells containers apart, whose process numbers are their own."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return Beat(rank, f"{socket.gethostname()}|{space}", os.getpid(), _stat(os.getpid())[1])


def _stat(pid: int) -> tuple[str, str]:
    """State letter and start time of a process; ("", "") where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def main_thread() -> tuple[str, bool]:
    """Where the main thread of this process is, and whether it waits for other ranks there."""
    main = threading.main_thread().ident
    frame = sys._current_frames().get(main) if main is not None else None
    if frame is None:
        return "", False
    code = frame.f_code
    name = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{frame.f_lineno} {code.co_name}"
    return name, "torch/distributed" in code.co_filename or code.co_name == "_engine_run_backward"


def is_gone(beat: Beat, host: str) -> bool:
    """Whether a process of this host has ended, or waits for its parent to notice; False of another host's."""
    if beat.host != host:
        return False
    try:
        os.kill(beat.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    state, born = _stat(beat.pid)
    return state in ("Z", "X") or (beat.born != "" and born not in ("", beat.born))


def connect(timeout: float) -> Any:
    """A connection of our own to the process group's store: what others ask of theirs may block for minutes."""
    import torch.distributed as dist

    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return dist.TCPStore(
            store.host, store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )
    return store


class Heartbeats:
    """Sends this rank's beat, follows the others', and says when something is wrong.

    Args:
        store: has `set(key, text)` and `get(key)`; None for one rank, which then watches itself.
        world_size: number of ranks.
        own: this rank's first beat; `move` changes it.
        timeout: seconds without progress after which a rank hangs.
        silence: seconds without a beat after which a process is gone or stopped.
        grace: seconds in which a rank may end by itself after another has reported an error.
        clock: seconds that never go back.
    """

    ALARM = "alarm"

    def __init__(
        self,
        store: Any,
        world_size: int,
        own: Beat,
        timeout: float,
        silence: float,
        grace: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.world_size, self.own = store, world_size, own
        self.timeout, self.silence, self.grace, self.clock = timeout, silence, grace, clock
        self.beats: dict[int, Beat] = {own.rank: own}
        self._since: dict[int, tuple[float, float]] = {}  # when a rank's count, and its moves, were last seen to change
        self._alarm, self._alarm_since = "", 0.0
        self._exchanged = self._judged = clock()
        self._moves: dict[int, int] = {}
        self._lost = ""
        self._suspected: dict[str, float] = {}
        self._lock = threading.Lock()

    def move(self, phase: str, step: int) -> None:
        """This rank's training has reached a hook; costs no request."""
        self.own.phase, self.own.step, self.own.moves = phase, step, self.own.moves + 1

    def announce(self) -> None:
        """Make this rank known; once all have, `meet` reads who they are."""
        if self.store is not None:
            self.store.set(self.ALARM, "") if self.own.rank == 0 else None
            self._send()

    def meet(self) -> None:
        """Read who all ranks are, after each has announced itself."""
        for rank in range(self.world_size):
            self._read(rank)
        self._exchanged = self._judged = self.clock()

    def _send(self) -> None:
        with self._lock:
            self.own.count += 1
            if threading.current_thread() is not threading.main_thread():
                self.own.where, self.own.waits = main_thread()
            self.store.set(str(self.own.rank), json.dumps(dataclasses.asdict(self.own)))

    def _read(self, rank: int) -> Beat:
        if rank == self.own.rank:
            beat = dataclasses.replace(self.own, count=self.own.count + (self.store is None))
        else:
            beat = Beat(**json.loads(bytes(self.store.get(str(rank)))))
        before, now = self.beats.get(rank), self.clock()
        counted, moved = self._since.get(rank, (now, now))
        changed = before is None or rank == self.own.rank or beat.count != before.count
        advanced = rank not in self._since or self._moves.get(rank) != beat.moves
        self._moves[rank] = beat.moves
        self._since[rank] = (now if changed else counted, now if advanced else moved)
        self.beats[rank] = self.own if rank == self.own.rank else beat
        return beat

    @property
    def next_rank(self) -> int:
        """The rank that this one watches; itself where there is no other."""
        return (self.own.rank + 1) % self.world_size

    def exchange(self) -> None:
        """Send this rank's beat and read the next rank's; may block as long as the store does not answer."""
        if self.store is not None:
            try:
                self._send()
                alarm = bytes(self.store.get(self.ALARM)).decode()
            except Exception as error:  # whatever a store raises whose process is gone
                self._lost = (str(error).splitlines() or [type(error).__name__])[0]
                return
            if alarm and not self._alarm:
                self._alarm, self._alarm_since = alarm, self.clock()
        try:
            self._read(self.next_rank)
        except Exception as error:
            self._lost = (str(error).splitlines() or [type(error).__name__])[0]
            return
        self._exchanged = self.clock()

    def finished(self) -> bool:
        """Whether all ranks are done, have failed, or cannot be asked; asks the store."""
        if self.store is None or self._lost:
            return True
        return all(self._read(r).state != "running" for r in range(self.world_size))

    def report(self, trouble: Trouble) -> None:
        """Tell the other ranks, which then end too."""
        if self.store is not None:
            self.store.set(self.ALARM, f"{self.own.rank}:{trouble.text}")

    # ------------------------------------------------------------------ judgement

    def judge(self) -> Trouble | None:
        """What is wrong, if anything; never asks the store, which may not answer."""
        now, slept = self.clock(), self.clock() - self._judged
        self._judged = now
        if slept > self.silence / 2:  # this process was itself stopped for a while: look afresh
            self._since = dict.fromkeys(self._since, (now, now))
            self._exchanged = now
            return None
        for beat in self._local():
            if is_gone(beat, self.own.host) and self._certain(f"gone {beat.rank}", now):
                return self._alarmed() or self._trouble([beat], "is gone")
        if now - self._alarm_since > self.grace and (alarmed := self._alarmed()):
            return alarmed
        if self._lost and self._certain("store", now):
            return self._trouble([self.beats[0]], "is gone, or cannot be reached", f" ({self._lost})")
        if now - self._exchanged > self.silence:
            return self._trouble([self.beats[0]], f"has not answered for {self.silence:g} s")
        beat = self.beats[self.next_rank]
        counted, moved = self._since[self.next_rank]
        if beat.state != "running":
            return None  # what failed has raised the alarm
        if now - counted > self.silence:
            return self._trouble([beat], f"has not answered for {self.silence:g} s")
        if beat.phase != "set-up" and now - moved > self.timeout:
            return self._hang()
        return None

    def _alarmed(self) -> Trouble | None:
        """What another rank has reported, of itself or of a third."""
        rank, _, text = self._alarm.partition(":")
        return Trouble(text, [self.beats[int(rank)]] if "failed" in text else []) if text else None

    def _local(self) -> list[Beat]:
        others = [b for r, b in self.beats.items() if r != self.own.rank and b.host == self.own.host]
        return [b for b in others if b.state != "done"]

    def _certain(self, what: str, now: float) -> bool:
        """At the end of a run, where processes leave one after the other, only what lasts is wrong."""
        first = self._suspected.setdefault(what, now)
        return self.own.state != "done" or now - first > self.grace

    def _hang(self) -> Trouble:
        """Which rank fell behind: those that wait for it in a collective have come further."""
        beats = self.beats if self.world_size == 1 else {r: self._freshest(r) for r in range(self.world_size)}
        running = [b for b in beats.values() if b.state == "running"]
        least = min(b.moves for b in running)
        behind = [b for b in running if b.moves == least]
        behind = [b for b in behind if not b.waits] or behind
        return self._trouble(behind, f"made no progress for {self.timeout:g} s")

    def _freshest(self, rank: int) -> Beat:
        try:
            return self._read(rank)
        except Exception:
            return self.beats[rank]

    def _trouble(self, culprits: list[Beat], what: str, why: str = "") -> Trouble:
        shown = culprits[:4]
        more = f" and {len(culprits) - len(shown)} more" if len(culprits) > len(shown) else ""
        who = "; ".join(f"{beat.name}, last seen {beat.place}," for beat in shown)
        return Trouble(f"{who}{more} {what}{why}", culprits)
