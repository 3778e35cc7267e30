"""A training loop that goes one step at a time, so that two of them can take turns."""

from __future__ import annotations

from collections.abc import Callable

from greenlet import GreenletExit, getcurrent, greenlet

__all__ = ["Steps"]


class Steps:
    """Each call lets a loop go on until its next optimiser step is done; the first one sets it up too.

    The loop has a stack of its own in the thread of its caller. In a thread of its own it would be slower than a
    program's only training is: two threads that compute have a pool of OpenMP's each, whose workers then sleep at once,
    and memory of another kind.

    Args:
        loop: a whole training, called with a function that it must call after each optimiser step. It must have enough
            steps for all calls.
    """

    def __init__(self, loop: Callable[[Callable[[], None]], object]) -> None:
        self._stack = greenlet(lambda: loop(self._pause))

    def _pause(self) -> None:
        assert self._stack.parent is not None
        self._stack.parent.switch()

    def __call__(self) -> None:
        """One step.

        Raises:
            RuntimeError: the loop ended, or failed (the cause).
        """
        if not self._stack.dead:
            self._stack.parent = getcurrent()
            try:
                self._stack.switch()
            except Exception as error:
                raise RuntimeError(f"training failed: {error}") from error
        if self._stack.dead:
            raise RuntimeError("training failed: the loop has fewer steps than were asked for")

    def close(self) -> None:
        """End the loop where it stands."""
        if self._stack:
            self._stack.parent = getcurrent()
            self._stack.throw(GreenletExit)
