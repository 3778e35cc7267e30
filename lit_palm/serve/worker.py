"""The thread that owns the network, and the streams through which the server's event loop hears of tokens.

The event loop opens a `Stream` with one or several rows and reads its events; the thread keeps one `Scheduler` going.
All that one step has drawn for all streams crosses over in one call, so that a token costs the loop no wake-up of its
own. Whatever goes wrong with one row ends that row alone; a failure of a whole step ends the rows that took part.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lit_palm.models.base import Network
from lit_palm.rollout.continuous import Scheduler
from lit_palm.rollout.requests import Handle, Token
from lit_palm.rollout.sampling import Sampling
from lit_palm.serve.protocol import APIError

__all__ = ["Event", "Row", "Stream", "Worker"]

log = logging.getLogger(__name__)


class Row(NamedTuple):
    """What one row of a stream is to be."""

    prompt: list[int]
    sampling: Sampling
    seed: int
    num_top: int = 0


class Event(NamedTuple):
    """What happened to one row: a token, or its end."""

    row: int
    token: Token | None
    reason: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Stream:
    """Rows that one request waits for; its events belong to the event loop, its handles to the thread."""

    rows: list[Row]
    events: deque[Event] = field(default_factory=deque)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    left: int = 0
    handles: list[Handle] = field(default_factory=list)
    version: str | None = None
    """Names the weights that its rows come from, once they were begun; None: those the server was started with."""

    async def next(self) -> list[Event]:
        """All events that have come in since the last call; waits for at least one."""
        await self.ready.wait()
        self.ready.clear()
        events = list(self.events)
        self.events.clear()
        return events


@dataclass(eq=False)
class Update:
    """New weights that somebody waits for; see `Worker.update`."""

    version: str | None
    change: Callable[[Network], None]
    done: asyncio.Future[None]


def _settle(done: asyncio.Future[None], error: BaseException | None) -> None:
    if done.done():  # nobody waits any more
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)


class Worker:
    """Runs a scheduler in a thread of its own.

    Args:
        load: makes the scheduler; called in the thread, so that the server answers meanwhile.
        max_rows: most rows at once, running and waiting together.
    """

    def __init__(self, load: Callable[[], Scheduler], max_rows: int) -> None:
        self.load, self.max_rows = load, max_rows
        self.state: Literal["loading", "ready", "draining", "failed"] = "loading"
        self.failure: BaseException | None = None
        self.num_rows = 0
        """Rows that have not ended."""
        self.version: str | None = None
        """Names the weights that rows begin with now."""
        self.streams: set[Stream] = set()
        self._inbox: queue.SimpleQueue[tuple[str, Stream | Update | None]] = queue.SimpleQueue()
        # an update waits for the rows that were begun before it, and what was asked for after it waits for the update
        self._behind: deque[Stream | Update] = deque()
        self._outbox: list[tuple[Stream, Event]] = []
        self._thread = threading.Thread(target=self._run, name="lit-palm-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    # ------------------------------------------------------------------------------ on the event loop

    def start(self) -> None:
        """Load the network and begin; call it on the event loop that opens streams."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def open(self, rows: list[Row]) -> Stream:
        """Ask for rows. The caller has checked that there is room for them."""
        stream = Stream(rows, left=len(rows))
        self.num_rows += len(rows)
        self.streams.add(stream)
        self._inbox.put(("open", stream))
        return stream

    def close(self, stream: Stream) -> None:
        """Nobody listens any more: free the rows that have not ended."""
        if stream.left:
            self._inbox.put(("close", stream))

    def update(self, version: str | None, change: Callable[[Network], None]) -> asyncio.Future[None]:
        """Have the weights changed between two steps, when the rows that were asked for before have ended.

        Args:
            version: names the new weights.
            change: does it, in the thread; what it raises as `APIError` has left the network as it was.

        Returns:
            Done when new rows begin with the new weights, or with the error.
        """
        asked = Update(version, change, asyncio.get_running_loop().create_future())
        self._inbox.put(("update", asked))
        return asked.done

    def stop(self) -> None:
        """End all rows and the thread; waits for the step that is under way."""
        self._inbox.put(("stop", None))
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def _deliver(self, events: list[tuple[Stream, Event]]) -> None:
        for stream, event in events:
            stream.events.append(event)
            stream.ready.set()
            if event.token is None:
                stream.left -= 1
                self.num_rows -= 1
                if not stream.left:
                    self.streams.discard(stream)

    def _settle(self, failure: BaseException | None) -> None:
        self.failure = failure
        if failure is not None:
            self.state = "failed"
        elif self.state == "loading":
            self.state = "ready"

    # ------------------------------------------------------------------------------ in the thread

    def _run(self) -> None:
        try:
            scheduler = self.load()
        except BaseException as error:  # reported by whoever waits for the server
            self._call(self._settle, error)
            return
        self._call(self._settle, None)
        try:
            self._work(scheduler)
        except BaseException as error:  # nobody would answer any more: the server ends with it
            self._call(self._settle, error)

    def _work(self, scheduler: Scheduler) -> None:
        going = True
        while going:
            going = self._listen(scheduler)
            try:
                scheduler.step()
            except Exception as error:  # out of memory, say: those that took part are lost, the server is not
                log.exception("a step failed")
                scheduler.abort(f"the network failed ({type(error).__name__})")
            self._flush()
        for handle in [*scheduler.rows, *scheduler.joining, *scheduler.waiting]:
            scheduler.cancel(handle)
        for asked in self._behind:
            if isinstance(asked, Update):
                self._call(_settle, asked.done, APIError(503, "the server is shutting down", code="draining"))
            else:
                self._drop(asked)
        self._flush()

    def _listen(self, scheduler: Scheduler) -> bool:
        """Do what has been asked, waiting for it when there is nothing else to do; False: the thread is to end."""
        self._proceed(scheduler)
        idle = not scheduler.busy and not self._outbox
        while True:
            try:
                kind, asked = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if asked is None:
                return False
            if kind == "close":
                assert isinstance(asked, Stream)
                if asked in self._behind:
                    self._behind.remove(asked)
                    self._drop(asked)
                for handle in asked.handles:
                    scheduler.cancel(handle)
            else:
                self._behind.append(asked)
                self._proceed(scheduler)

    def _proceed(self, scheduler: Scheduler) -> None:
        """Begin what has been asked for, in its order, up to an update that must wait for rows under way."""
        while self._behind:
            asked = self._behind[0]
            if isinstance(asked, Update):
                if scheduler.busy:
                    return
                self._change(scheduler, asked)
            else:
                asked.version = self.version
                self._submit(scheduler, asked)
            self._behind.popleft()

    def _change(self, scheduler: Scheduler, update: Update) -> None:
        error: BaseException | None = None
        try:
            scheduler.change_weights(update.change)
        except APIError as refusal:
            error = refusal
        except BaseException:  # the weights may be of two versions: nobody may be answered from them
            self._call(_settle, update.done, APIError(500, "the weights could not be replaced", code="internal_error"))
            raise
        else:
            self.version = update.version
        self._call(_settle, update.done, error)

    def _drop(self, stream: Stream) -> None:
        """End rows that were never begun."""
        self._outbox += [(stream, Event(number, None, "cancelled")) for number in range(len(stream.rows))]

    def _submit(self, scheduler: Scheduler, stream: Stream) -> None:
        for number, row in enumerate(stream.rows):

            def tell(handle: Handle, token: Token, number: int = number) -> None:
                self._outbox.append((stream, Event(number, token)))

            def end(handle: Handle, number: int = number) -> None:
                self._outbox.append((stream, Event(number, None, handle.finish_reason, handle.error)))

            try:
                handle = scheduler.submit(
                    row.prompt, row.sampling, row.seed, num_top=row.num_top, on_token=tell, on_end=end
                )
            except Exception as error:
                if not isinstance(error, ValueError):
                    log.exception("a request could not be submitted")
                self._outbox.append((stream, Event(number, None, "error", str(error))))
            else:
                stream.handles.append(handle)

    def _flush(self) -> None:
        if self._outbox:
            events, self._outbox = self._outbox, []
            self._call(self._deliver, events)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(function, *args)
