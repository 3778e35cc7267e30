"""A Chrome trace: spans as a JSON file that chrome://tracing and Perfetto (ui.perfetto.dev) open.

The file is replaced as a whole, so that it is valid whenever a run dies. It holds at most so many spans, the latest.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from lit_palm.callbacks.files import replace_text
from lit_palm.timing import Span

__all__ = ["OPERATORS", "TraceFile"]

OPERATORS = 1000
"""Operators of rank r are shown as process OPERATORS + r, its spans as process r."""

SHORTEST = 20_000
"""Nanoseconds of the shortest span that is kept: hooks that do nothing would fill the file."""

SHARE = 0.02
"""Of the time since the last writing, what writing the file again may take."""


class TraceFile:
    """Keeps spans and writes them.

    Args:
        path: of the file.
        rank: whose spans they are.
        max_events: most spans kept, and most events of operators.
    """

    def __init__(self, path: Path, rank: int, max_events: int) -> None:
        self.path, self.rank, self.max_events = path, rank, max_events
        self.origin = time.perf_counter_ns()
        self.started = time.time_ns()
        self._spans: deque[Span] = deque(maxlen=max_events)
        self._operators: list[dict[str, Any]] = []
        self._threads: dict[int, tuple[int, str]] = {}
        self._left_out = 0
        self._written, self._took = self.origin, 0

    def saw(self, span: Span) -> None:
        """Keep a span, unless it is very short."""
        if span.end - span.start < SHORTEST:
            return
        if span.thread not in self._threads:
            self._threads[span.thread] = len(self._threads), threading.current_thread().name
        self._left_out += len(self._spans) == self.max_events
        self._spans.append(span)

    def write_if_due(self) -> None:
        """Write what there is, as often as costs little."""
        if time.perf_counter_ns() - self._written > max(self._took / SHARE, 5e9):
            self.write()

    def write(self) -> None:
        """Replace the file.

        Raises:
            OSError: it cannot be written.
        """
        start = time.perf_counter_ns()
        numbers = dict(self._threads)  # another thread may come in meanwhile
        events = [_named("process_name", self.rank, 0, f"rank {self.rank}")]
        events += [_named("thread_name", self.rank, number, name) for number, name in numbers.values()]
        events += [
            {
                "name": span.name, "cat": "lit_palm", "ph": "X", "pid": self.rank, "tid": numbers[span.thread][0],
                "ts": (span.start - self.origin) / 1e3, "dur": (span.end - span.start) / 1e3,
            }
            for span in self._spans.copy()
        ]  # fmt: skip
        facts = {"started_unix_ns": self.started, "rank": self.rank, "spans_left_out": self._left_out}
        trace = {"traceEvents": [*events, *self._operators], "displayTimeUnit": "ms", "otherData": facts}
        replace_text(self.path, json.dumps(trace))
        self._written = time.perf_counter_ns()
        self._took = self._written - start

    def add_operators(self, profiler: Any) -> None:
        """Take in what a `torch.profiler.profile` that has stopped saw, moved to the clock of the spans."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "operators.json")
            profiler.export_chrome_trace(path)
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        moved = (int(found.get("baseTimeNanoseconds", 0)) - self.started) / 1e3
        events = [e for e in found["traceEvents"] if e.get("ph") == "X" and e.get("cat") != "Trace"]
        pid = OPERATORS + self.rank
        self._operators = [_named("process_name", pid, 0, f"rank {self.rank}: operators")]
        self._operators += [
            {**event, "pid": pid, "ts": event["ts"] + moved}
            for event in sorted(events, key=lambda e: e["ts"])[: self.max_events]
        ]


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
