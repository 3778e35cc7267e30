"""Passes of sharded networks whose number differs from process to process, in step.

A sharded network gathers its weights during a pass, and all processes must take part. Where they sample completions of
different lengths, or one has no row at all, their numbers of passes differ. In here every pass begins with a vote on
which networks somebody wants to run. Whoever does not want one of them runs it all the same, on a single token, so that
the weights get gathered; and whoever is done goes on voting until all are.

    with LockStep([policy, reference]):
        ...     # any number of passes of either, in any order, without gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

__all__ = ["LockStep"]


class LockStep:
    """A context in which the passes of some networks are made by all processes of a group.

    Args:
        networks: sharded, in the same order on every process.
        device: that the votes travel on.
        group: of processes; None: all of them.
    """

    def __init__(self, networks: Sequence[nn.Module], device: torch.device, group: Any = None) -> None:
        self.networks, self.device, self.group = networks, device, group
        self.rounds = 0
        """Votes so far."""
        self._filling = False
        self._after: list[int] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> LockStep:
        for number, network in enumerate(self.networks):
            # before FSDP's own hook, which gathers; and after the one that frees
            self._hooks.append(network.register_forward_pre_hook(partial(self._before, number), prepend=True))
            self._hooks.append(network.register_forward_hook(self._behind))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            # an error on one process ends the run on all of them; waiting for the others would hide it
            if kind is None:
                self.settle()
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []

    def settle(self) -> None:
        """Wait until no process wants a pass; call it on all of them before they do something else together."""
        while self.networks and self._vote(None):
            pass

    def _vote(self, wanted: int | None) -> bool:
        """One round: run what others want and come before `wanted`; False when nobody wants anything."""
        votes = torch.zeros(len(self.networks), device=self.device)
        if wanted is not None:
            votes[wanted] = 1
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.group)
        self.rounds += 1
        turn = votes.nonzero().flatten().tolist()
        place = turn.index(wanted) if wanted is not None else len(turn)
        self._fill(turn[:place])
        self._after = turn[place + 1 :]
        return bool(turn)

    def _before(self, number: int, network: nn.Module, args: Any) -> None:
        if not self._filling:
            self._vote(number)

    def _behind(self, network: nn.Module, args: Any, output: Any) -> None:
        if not self._filling:
            after, self._after = self._after, []
            self._fill(after)

    def _fill(self, numbers: Sequence[int]) -> None:
        """Passes for the sake of others."""
        self._filling = True
        try:
            for number in numbers:
                with torch.no_grad():
                    self.networks[number](torch.zeros(1, 1, dtype=torch.long, device=self.device))
        finally:
            self._filling = False
