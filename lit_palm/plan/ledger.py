"""What is alive in a device's memory while a pass goes on, by kind, and the moment at which it is most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["Ledger"]


class Ledger:
    """Bytes by kind; every change is compared with the peak so far.

    Attributes:
        peak: the most bytes alive at once.
        at_peak: what they were, by kind.
        largest: the most bytes of each kind, whenever that was.
    """

    def __init__(self, start: Mapping[str, float] | None = None) -> None:
        self.live: Counter[str] = Counter()
        self.peak = 0.0
        self.at_peak: dict[str, float] = {}
        self.largest: dict[str, float] = {}
        for kind, size in (start or {}).items():
            self.hold(kind, size)

    def hold(self, kind: str, size: float) -> None:
        """Allocate."""
        self.live[kind] += size  # type: ignore[assignment]
        self.largest[kind] = max(self.largest.get(kind, 0.0), float(self.live[kind]))
        total = self.total
        if total > self.peak:
            self.peak, self.at_peak = total, {k: float(v) for k, v in self.live.items() if v > 0}

    def free(self, kind: str, size: float) -> None:
        """Free."""
        self.live[kind] -= size  # type: ignore[assignment]

    @property
    def total(self) -> float:
        """Bytes alive now."""
        return float(sum(self.live.values()))

    @contextmanager
    def during(self, kind: str, size: float) -> Iterator[None]:
        """Hold something for a while."""
        self.hold(kind, size)
        yield
        self.free(kind, size)

    def touch(self, kind: str, size: float) -> None:
        """Hold something for a moment."""
        with self.during(kind, size):
            pass
