"""The order of the data: a loader whose position is two numbers, the epoch and the batch.

Shuffling comes from a counter-based hash of (seed, epoch, element), so nothing but these numbers has to be saved to
resume in the middle of an epoch, and the number of processes changes nothing: batch b of W processes with `batch_size`
elements each is batch b of one process with W * `batch_size`, cut into W consecutive parts.

No element is lost and none is used twice. The last batch of an epoch is simply smaller, and divided as evenly as it
goes; a process that gets nothing of it serves a *blank* row instead, so that every process has the same number of
batches. A blank row is a copy of a real one with an all-False `loss_mask` (prompts: `row` -1): it has no weight in any
loss or metric. Losses are sums divided by the weight of all processes, so uneven parts change nothing.

Lightning replaces the sampler of a torch DataLoader by one of its own; it leaves this loader alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["CountedLoader", "permutation"]

# collate(elements [n] int64, blank) -> a batch
Collate = Callable[[NDArray[np.int64], bool], Any]


def permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of range(size) that depends on nothing but its arguments: elements sorted by their hash.

    The hash is the finaliser of SplitMix64 (Steele et al. 2014), applied to the counter of each element.
    """
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed % 2**64) * _GOLDEN + _GOLDEN) + np.uint64(epoch) * _GOLDEN)
        hashes = _mix(key + np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN)
    return np.argsort(hashes, kind="stable")


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: Any) -> Any:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class CountedLoader:
    """Batches of `collate`d elements for one process.

    `len()` is the length of a whole epoch, also after resuming: Lightning counts from where it resumed. `set_epoch` is
    called by Lightning at each epoch's start; iterating without Lightning advances the epoch by itself.

    Args:
        num_elements: elements of the data (rows, windows, groups of rows).
        batch_size: elements in a batch of one process.
        collate: called as collate(elements, blank) -> batch; blank asks for a batch without weight.
        shuffle: a new order each epoch; otherwise the order of the data.
        seed: chooses the orders.
        ranks: returns (rank, number of processes), asked when an epoch is iterated.
        epoch: the epoch to begin with.
        batch: batches of that epoch that were already used.
        lengths: [elements] length of each; with `length_window` above 1, a batch then holds elements of similar length.
        length_window: batches whose shuffled elements are sorted by length together; their batches keep a random order.
    """

    def __init__(
        self,
        num_elements: int,
        batch_size: int,
        collate: Collate,
        *,
        shuffle: bool = False,
        seed: int = 0,
        ranks: Callable[[], tuple[int, int]] = lambda: (0, 1),
        epoch: int = 0,
        batch: int = 0,
        lengths: NDArray[np.integer] | None = None,
        length_window: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.num_elements = num_elements
        self.batch_size = batch_size
        self.collate = collate
        self.shuffle = shuffle
        self.seed = seed
        self.ranks = ranks
        self.epoch = epoch
        self.lengths, self.length_window = lengths, length_window
        self._resume = (epoch, batch)
        self._current: NDArray[np.int64] = np.arange(0)
        self._next = 0

    @property
    def batch_sampler(self) -> Any:
        """Where Lightning looks for `set_epoch` (`dataloader.batch_sampler.sampler`)."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Nothing, but Lightning shall know that this loader resumes: the data module keeps the position, because
        Lightning restores a loader's own state in the middle of an epoch only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""

    def __len__(self) -> int:
        return -(-self.num_elements // (self.batch_size * self.ranks()[1]))

    def __iter__(self) -> Iterator[Any]:
        # a generator: the epoch is read when the first batch is asked for, since Lightning makes the iterator before
        # it announces the epoch
        epoch, start = self.epoch, 0
        if epoch == self._resume[0]:
            start = self._resume[1]
        self._current = self._order(epoch, self.batch_size * self.ranks()[1])
        for batch in range(start, len(self)):
            self._next = batch + 1
            yield self._batch(batch)
        self._resume = (-1, 0)
        self.epoch = epoch + 1

    def _batch(self, batch: int) -> Any:
        rank, world = self.ranks()
        together = self._current[batch * self.batch_size * world :][: self.batch_size * world]
        mine = np.array_split(together, world)[rank]
        return self.collate(mine, False) if len(mine) else self.collate(together[:1], True)

    def upcoming(self, count: int) -> list[Any]:
        """The next batches of this epoch, at most `count`, without taking them: what a step with several weights
        needs to know of the rest of its accumulation window."""
        return [self._batch(batch) for batch in range(self._next, min(self._next + count, len(self)))]

    def _order(self, epoch: int, together: int) -> NDArray[np.int64]:
        """The elements of an epoch in the order in which batches of `together` elements are cut from them."""
        if not self.shuffle:
            return np.arange(self.num_elements)
        order = permutation(self.num_elements, self.seed, epoch)
        if self.lengths is None or self.length_window <= 1:
            return order
        windows = []
        for start in range(0, len(order), together * self.length_window):
            window = order[start : start + together * self.length_window]
            window = window[np.argsort(self.lengths[window], kind="stable")]
            full = len(window) // together
            # the batches of a window come in a random order, so that the length does not rise and fall with time
            shuffled = permutation(full, self.seed + start + 1, epoch)
            windows += [window[: full * together].reshape(full, together)[shuffled].ravel(), window[full * together :]]
        return np.concatenate(windows)
