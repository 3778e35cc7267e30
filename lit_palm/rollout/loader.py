"""The training dataloader of objectives that sample: one epoch is one collection, served as shuffled minibatches.

Collecting is lazy: it happens when the first minibatch of an epoch is asked for, by which time the last step of the
epoch before has been taken. Order and shuffling come from counters, so the state is the number of the collection, the
position in it and the collection itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lit_palm.rollout.collector import RolloutConfig
from lit_palm.types import Experience

__all__ = ["RolloutLoader"]


class RolloutLoader:
    """Serves minibatches of collections.

    Args:
        collect: collect(k) gives the k-th collection of all ranks, prepared, on the CPU.
        config: sizes and seed.
        num_rows: most rows that a collection has after `prepare`; with fewer, its epoch is shorter and the last
            minibatch of a pass may be smaller.
        grouped: rows of a group stay in one minibatch; `prepare` keeps equally many of each.
        rank: this process's number.
        world_size: number of processes; each gets its share of every minibatch.

    Raises:
        ValueError: the sizes do not divide; while iterating: a collection is larger than was promised.
    """

    def __init__(
        self,
        collect: Callable[[int], Experience],
        config: RolloutConfig,
        num_rows: int,
        grouped: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        size = config.minibatch_size
        if num_rows < 1 or num_rows % size:
            raise ValueError(
                f"a collection has {num_rows} rows to learn from ({config.num_prompts} prompts with "
                f"{config.completions_per_prompt} completions, of which the objective may drop some), which "
                f"rollout.minibatch_size {size} does not divide: choose one that does"
            )
        if grouped and num_rows % config.num_prompts:
            raise ValueError(
                f"the objective keeps {num_rows} rows of {config.num_prompts} prompts; one whose rows travel in groups "
                "must keep equally many of each prompt"
            )
        # of `completions_per_prompt`, `prepare` may keep fewer
        self.unit = num_rows // config.num_prompts if grouped else 1
        if size % (world_size * self.unit):
            raise ValueError(
                f"rollout.minibatch_size {size} must be a multiple of {world_size} processes"
                + (f" times {self.unit} completions a prompt" if grouped else "")
            )
        self.collect, self.config, self.num_rows, self.grouped = collect, config, num_rows, grouped
        self.rank, self.world_size = rank, world_size
        self.collection = 0
        self.position = 0
        self.buffer: Experience | None = None
        self.stopped = False
        self.ahead: Any = None
        """What has been sampled of coming collections; it goes into the snapshot."""
        self._ended: int | None = None  # minibatches of a collection that was over when it was saved

    def __len__(self) -> int:
        return self.config.passes * (self.num_rows // self.config.minibatch_size)

    @property
    def num_batches(self) -> int:
        """Minibatches of the collection under way; `len()` of one that is not made yet."""
        if self.buffer is None:
            return self._ended or len(self)
        return self.config.passes * self._batches_a_pass(self.buffer)

    def _batches_a_pass(self, buffer: Experience) -> int:
        # a collection of which nothing was kept is served as one minibatch without weight
        return max(1, -(-buffer.num_rows // self.config.minibatch_size))

    def __iter__(self) -> Iterator[Experience]:
        # A generator: nothing happens before the first minibatch is asked for. Lightning calls iter() twice at set-up.
        if self.stopped:  # restored right after an early stop: this epoch is over
            self.finish()
            return
        if self.position >= self.num_batches:  # Lightning counts to the length and never asks for one more
            self.finish()
        if self.buffer is None:
            self.buffer = self._checked(self.collect(self.collection))
        while self.position < self.num_batches and not self.stopped:
            batch = self.minibatch(self.position)
            self.position += 1
            yield batch
        self.finish()

    def _checked(self, experience: Experience) -> Experience:
        """The collection, if `prepare` kept what `num_kept` said."""
        if experience.num_rows > self.num_rows:
            raise ValueError(
                f"a collection has {experience.num_rows} rows after the objective's prepare(), where its num_kept() "
                f"promises at most {self.num_rows}: the two must agree"
            )
        if self.grouped and experience.num_rows:
            _, sizes = experience["group"].unique(return_counts=True)
            if bool((sizes != self.unit).any()):
                raise ValueError(
                    f"after the objective's prepare() groups have {sizes.min()} to {sizes.max()} rows: it must keep "
                    f"equally many of each, here {self.unit}"
                )
        return experience

    def minibatch(self, position: int) -> Experience:
        """This rank's rows of the minibatch at a position."""
        assert self.buffer is not None
        number, index = divmod(position, self._batches_a_pass(self.buffer))
        mixed = (self.config.seed * 1_000_003 + self.collection) * 1_000_003 + number
        generator = torch.Generator().manual_seed(mixed % (2**63))
        units = self._units()
        order = units[torch.randperm(len(units), generator=generator)]
        count = self.config.minibatch_size // units.shape[1]
        rows = order[index * count : (index + 1) * count][self.rank :: self.world_size].flatten()
        return self.buffer.select(rows) if len(rows) else _blank(self.buffer)

    def upcoming(self, count: int) -> list[Experience]:
        """The next minibatches of this collection, at most `count`, without taking them."""
        return [self.minibatch(p) for p in range(self.position, min(self.position + count, self.num_batches))]

    def _units(self) -> Tensor:
        """Row numbers [U, n] that travel together."""
        assert self.buffer is not None
        rows = torch.arange(self.buffer.num_rows)
        if not self.grouped:
            return rows[:, None]
        order = self.buffer["group"].argsort(stable=True)
        return rows[order].view(-1, self.unit)

    def stop(self) -> None:
        """Leave the rest of this collection unused."""
        self.stopped = True

    def finish(self) -> None:
        """Drop the collection under way, if any, and count it."""
        if self.buffer is not None or self.stopped:
            self.collection += 1
        self.buffer, self.position, self.stopped, self._ended = None, 0, False, None

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Lightning would restore it too late. The data module keeps `snapshot` instead."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""

    def snapshot(self, in_flight: int = 0, over: bool = False) -> dict[str, Any]:
        """Collection, position and contents, as plain numbers, tensors and lists; all that `select` serves.

        Args:
            in_flight: minibatches served but not yet trained on (an exception may be saving).
            over: the epoch under way gets nothing more, although Lightning has not counted it yet.
        """
        position = self.position - in_flight
        state: dict[str, Any] = {} if self.ahead is None else {"ahead": self.ahead.state_dict()}
        state |= {
            "collection": self.collection,
            "position": position,
            "minibatch_size": self.config.minibatch_size,
            "num_rows": self.num_rows,
            "num_batches": self.num_batches,
            "buffer": None,
            "stopped": self.stopped or over,
        }
        if state["stopped"]:
            return state
        if self.buffer is None or position >= self.num_batches:
            return state | {"collection": self.collection + (self.buffer is not None), "position": 0}
        return state | {"buffer": {k: v for k, v in self.buffer.items() if isinstance(v, Tensor | list)}}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a snapshot.

        Raises:
            ValueError: in the middle of a collection that was cut into minibatches of another size, or is of another.
        """
        if state["buffer"] is not None:
            there = int(state.get("num_rows", len(state["buffer"]["tokens"]))), int(state["minibatch_size"])
            if there != (self.num_rows, self.config.minibatch_size):
                raise ValueError(
                    f"the checkpoint to resume is in the middle of a collection of {there[0]} rows in minibatches of "
                    f"{there[1]}; the configuration has {self.num_rows} rows and rollout.minibatch_size "
                    f"{self.config.minibatch_size}: these can only change between collections"
                )
        self.collection, self.position = int(state["collection"]), int(state["position"])
        self.buffer = Experience(state["buffer"]) if state["buffer"] is not None else None
        self.stopped = bool(state["stopped"])
        self._ended = state.get("num_batches") if self.stopped else None
        if self.ahead is not None:
            self.ahead.load_state_dict(state.get("ahead", {}))

    def close(self) -> None:
        """End what is being sampled for coming collections."""
        if self.ahead is not None:
            self.ahead.close()


def _blank(experience: Experience) -> Experience:
    """One row of zeros without weight: what a process serves that got nothing of a minibatch."""
    width = experience["tokens"].shape[1]
    blank = Experience()
    for name, value in experience.items():
        if isinstance(value, Tensor):
            shape = (1, 1, *value.shape[2:]) if value.dim() > 1 and value.shape[1] == width else (1, *value.shape[1:])
            blank[name] = value.new_zeros(shape)
    blank["mask"] = torch.ones_like(blank["mask"])
    return blank
