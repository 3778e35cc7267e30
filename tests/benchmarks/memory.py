"""How much memory a process takes at most."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

__all__ = ["Peak"]

STATUS = Path("/proc/self/status")


def _field(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


class Peak:
    """The most bytes that this process holds, above what it holds now.

    Where Linux does not say, above the most that it has held so far.
    """

    def __init__(self) -> None:
        gc.collect()
        self._linux = STATUS.exists()
        if self._linux:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # glibc: what is free is given back
            try:
                Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            except OSError:
                self._linux = False
        self.before = _field("VmRSS") if self._linux else self._most()

    def _most(self) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def bytes(self) -> int:
        """At least 1: a tiny network drowns in rounding to pages."""
        return max(1, (_field("VmHWM") if self._linux else self._most()) - self.before)
