"""Where the seconds go: spans with names, which nest, and those who listen to them.

    with span("rollout"):
        ...

    with Stopwatch() as watch:
        collect()
    watch.seconds("rollout")

A span costs about a microsecond and keeps nothing; who wants to know listens. `Stopwatch` adds up seconds for metrics,
`lit_palm.callbacks.Timeline` draws a trace. Names are plain words for what is done, such as "rollout" or "validation".
Work that a device does later is counted where it is waited for.
"""

from __future__ import annotations

import threading
import time
from typing import NamedTuple, Protocol

__all__ = ["Listener", "Span", "Stopwatch", "listen", "span", "unlisten"]


class Span(NamedTuple):
    """Something that was done; times are of `time.perf_counter_ns`."""

    name: str
    start: int
    """Nanoseconds."""
    end: int
    """Nanoseconds."""
    inner: int
    """Nanoseconds of it that lie in spans directly within it."""
    thread: int
    """`threading.get_ident` of who did it; spans of one thread nest."""
    amount: int = 0
    """How much was done, in whatever is counted for spans of its name."""


class Listener(Protocol):
    """Who is told of every span when it ends, on the thread that did it: those within it come before it."""

    def saw(self, span: Span) -> None:
        """Take in a span."""


_listeners: tuple[Listener, ...] = ()


class _Open(threading.local):
    def __init__(self) -> None:
        self.spans: list[span] = []


_open = _Open()


class span:
    """A context in which something is done.

    Args:
        name: what.
        amount: how much of it, such as bytes.
    """

    __slots__ = ("amount", "inner", "name", "start")

    def __init__(self, name: str, amount: int = 0) -> None:
        self.name, self.amount = name, amount

    def __enter__(self) -> None:
        self.inner = 0
        _open.spans.append(self)
        self.start = time.perf_counter_ns()

    def __exit__(self, *error: object) -> None:
        end, spans = time.perf_counter_ns(), _open.spans
        if self not in spans:
            return  # left open by an exception, it ended with what it was in
        while spans.pop() is not self:
            pass
        if spans:
            spans[-1].inner += end - self.start
        if _listeners:
            done = Span(self.name, self.start, end, self.inner, threading.get_ident(), self.amount)
            for listener in _listeners:
                listener.saw(done)


def listen(listener: Listener) -> None:
    """Tell a listener of all spans from now on."""
    global _listeners
    _listeners = (*_listeners, listener)


def unlisten(listener: Listener) -> None:
    """Stop telling it; one that does not listen may be named too."""
    global _listeners
    _listeners = tuple(other for other in _listeners if other is not listener)


class Stopwatch:
    """Adds up the seconds of spans by name, of the thread that made it, from `start` (or `with`) to `stop`."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._whole: dict[str, int] = {}
        self._own: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._amounts: dict[str, int] = {}

    def __enter__(self) -> Stopwatch:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to listen."""
        listen(self)

    def stop(self) -> None:
        """Listen no more; what was added up stays."""
        unlisten(self)

    def saw(self, span: Span) -> None:
        """Add a span."""
        if span.thread != self._thread:
            return
        took = span.end - span.start
        self._whole[span.name] = self._whole.get(span.name, 0) + took
        self._own[span.name] = self._own.get(span.name, 0) + took - span.inner
        self._counts[span.name] = self._counts.get(span.name, 0) + 1
        self._amounts[span.name] = self._amounts.get(span.name, 0) + span.amount

    def seconds(self, name: str, own: bool = False) -> float:
        """Seconds of all spans of a name; `own`: without the spans within them."""
        return (self._own if own else self._whole).get(name, 0) / 1e9

    def count(self, name: str) -> int:
        """Number of spans of a name."""
        return self._counts.get(name, 0)

    def amount(self, name: str) -> int:
        """Amounts of all spans of a name, added up."""
        return self._amounts.get(name, 0)

    def reset(self) -> None:
        """Begin at zero again."""
        self._whole.clear()
        self._own.clear()
        self._counts.clear()
        self._amounts.clear()
