"""A training loop that goes one step at a time, so that two of them can take turns."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Steps"]


class _Over(Exception):
    """The loop is told to end."""


class Steps:
    """Each call lets a loop go on until its next optimiser step is done; the first one sets it up too.

    Args:
        loop: a whole training, called in a thread with a function that it must call after each optimiser step. It must
            have enough steps for all calls.
    """

    def __init__(self, loop: Callable[[Callable[[], None]], object]) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._over, self._error = False, None
        self._thread = threading.Thread(target=self._run, args=(loop,), daemon=True)

    def _run(self, loop: Callable[[Callable[[], None]], object]) -> None:
        self._go.acquire()
        try:
            loop(self._pause)
            raise RuntimeError("the training loop has fewer steps than were asked for")
        except _Over:
            pass
        except BaseException as error:
            self._error: BaseException | None = error
        self._done.release()

    def _pause(self) -> None:
        self._done.release()
        self._go.acquire()
        if self._over:
            raise _Over

    def __call__(self) -> None:
        """One step.

        Raises:
            RuntimeError: the loop ended, or failed (the cause).
        """
        if not self._thread.is_alive() and self._error is None:
            self._thread.start()
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError(f"training failed: {self._error}") from self._error

    def close(self) -> None:
        """End the loop where it stands."""
        if self._thread.is_alive():
            self._over = True
            self._go.release()
            self._thread.join(30)
