"""Asynchronous rollouts: the completions of the next collection are sampled while this one is learned from.

When a collection begins, a thread starts on the completions of the one after it, with the weights of that moment. So
collection k is sampled from the policy as it was when collection k - 1 began: it is one collection behind, and a
function of the seed and of those weights alone. (What replaces rejected samples, in later rounds, is sampled from the
policy as it is.) Its scores, log-probabilities and values are computed when its turn
comes, by the policy as it is then. What has been sampled ahead is a part of every checkpoint, so that a run that goes
on is the run that never stopped; saving waits for it.

A built-in engine samples from a copy of the policy. Under strategies that spread the policy, only an engine elsewhere
can sample ahead.
"""

from __future__ import annotations

import atexit
import copy
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn

from lit_palm.data.tokenizers import tokenizer_from_dict
from lit_palm.models.adapted import View, sampling_from
from lit_palm.models.base import Network
from lit_palm.parallel.sharded import is_sharded
from lit_palm.rollout.engine_base import Generation
from lit_palm.rollout.sampling import row_seeds

if TYPE_CHECKING:
    from lit_palm.modules.policy import LitPolicy

__all__ = ["Ahead", "Taken", "check_overlap"]


class Abandoned(RuntimeError):
    """Nobody waits for these completions any more."""


@dataclass
class Taken:
    """Completions that were sampled ahead."""

    generation: Generation
    step: int
    """Optimiser steps that had been taken when their sampling began."""
    seconds: float
    """That sampling took; 0 of those from a checkpoint."""


@dataclass
class _Entry:
    step: int
    rows: Tensor
    """[B] global row numbers: this process's, or all of them from a checkpoint."""
    prompts: list[Tensor]
    """The ids that each continues."""
    done: Future[tuple[Generation, float]]


def check_overlap(module: LitPolicy) -> None:
    """Refuse asynchronous rollouts where they cannot be; by every process.

    Raises:
        ValueError: naming the way out.
    """
    shared = module.networks["policy"]
    network = shared.shared if isinstance(shared, View) else shared
    if not module.engine.apart and is_sharded(network):
        raise ValueError(
            "rollout.asynchronous with a built-in engine needs the whole policy on every process, and "
            f"{type(module.trainer.strategy).__name__} spreads it: use ddp, or RemoteEngine, or leave it out"
        )


class Ahead:
    """What has been, and is being, sampled ahead.

    Args:
        module: the policy; its engine and settings are used as they are at the time.
    """

    def __init__(self, module: LitPolicy) -> None:
        self.module = module
        self.entries: dict[int, _Entry] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        atexit.register(_close, weakref.ref(self))  # no thread may still compute when the interpreter goes

    # ------------------------------------------------------------------ in turn

    def start(self, collection: int, rows: Tensor, ids: Sequence[Tensor]) -> None:
        """Begin to sample a collection from the policy as it is now; nothing happens to one that is there.

        Args:
            collection: its number.
            rows: [B] global row numbers of this process.
            ids: the prompt of each.
        """
        if collection in self.entries:
            return
        module = self.module
        self.wait()
        done: Future[tuple[Generation, float]] = Future()
        self.entries[collection] = _Entry(module.trainer.global_step, rows, list(ids), done)
        job = self._job(collection, rows, list(ids))
        self._over.clear()
        self._thread = threading.Thread(target=_run, args=(job, done), name="lit-palm-ahead", daemon=True)
        self._thread.start()

    def take(self, collection: int, rows: Tensor, ids: Sequence[Tensor]) -> Taken | None:
        """The completions of a collection, waited for; None when they were not sampled ahead. They stay until `drop`.

        A run that goes on with another size, seed or other prompts has others than the checkpoint's: also None.

        Args:
            collection: its number.
            rows: [B] global row numbers of this process.
            ids: the prompt of each.

        Raises:
            RuntimeError: sampling failed; on every process.
        """
        entry = self.entries.get(collection)
        places = None if entry is None else _places(entry, rows, ids)
        known = self.module.layout.gather(places is not None)
        if entry is None or places is None or not all(known):  # all processes have them, or none
            self.entries.pop(collection, None)
            return None
        error, found = None, None
        try:
            found = entry.done.result()
        except Exception as failure:
            error = failure
        self.module.layout.raise_everywhere(error)
        assert found is not None
        return Taken(_pick(found[0], places), entry.step, found[1])

    def drop(self, collection: int) -> None:
        """Forget completions that are in a collection now, and those before."""
        self.entries = {number: entry for number, entry in self.entries.items() if number > collection}

    def wait(self) -> None:
        """Until nothing is being sampled."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Raise what sampling ahead failed with, before its collection is asked for; on this process alone."""
        for entry in self.entries.values():
            if entry.done.done() and self.module.layout.size == 1:
                entry.done.result()

    def close(self) -> None:
        """End what is being sampled; it is lost."""
        self._over.set()
        while self._thread is not None and self._thread.is_alive():
            self.module.engine.cancel()
            self._thread.join(timeout=0.1)
        self._thread = None

    # ------------------------------------------------------------------ the thread

    def _job(self, collection: int, rows: Tensor, ids: list[Tensor]) -> Callable[[], tuple[Generation, float]]:
        """What the thread does, with everything that it reads taken from the policy now."""
        module = self.module
        policy = cast(Network, module.network_of("policy"))
        apart = module.engine.apart
        network, over = (policy if apart else _copy(policy)), self._over
        tokenizer = tokenizer_from_dict(module.ready_tokenizer.to_dict())  # not shared with a thread that encodes
        seeds = row_seeds(module.rollout.seed, collection, rows)
        threads, engine, sampling = torch.get_num_threads(), module.engine, module.sampling

        # an engine elsewhere does not run the network, which goes on changing meanwhile
        numerics = nullcontext if apart else partial(_numerics, module.trainer.precision_plugin)
        merged = nullcontext() if apart else sampling_from(network)

        def look(row: int, token: int) -> None:
            if over.is_set():
                raise Abandoned("sampling ahead was given up")

        def job() -> tuple[Generation, float]:
            torch.set_num_threads(threads)  # which is a thread's own setting, and may decide the last bits
            started = time.perf_counter()
            with numerics(), merged:
                generation = engine.generate(
                    network,
                    ids,
                    sampling,
                    seeds,
                    pad_id=tokenizer.pad_id,
                    eos_id=tokenizer.eos_id,
                    decode=tokenizer.decode,
                    on_token=look,
                )
            return generation, time.perf_counter() - started

        return job

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[int, Any]:
        """All that was sampled ahead, of all processes, as tensors and lists; by every process."""
        self.wait()
        found: dict[int, Any] = {}
        for number, entry in sorted(self.entries.items()):
            failed = entry.done.exception() is not None
            part = None if failed else (entry.rows, entry.prompts, entry.done.result()[0])
            parts = self.module.layout.gather(part)
            if any(p is None for p in parts):  # it is sampled when its turn comes
                continue
            found[number] = {"step": entry.step, **_joined(parts)}
        return found

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.close()
        self.entries = {}
        for number, entry in state.items():
            done: Future[tuple[Generation, float]] = Future()
            done.set_result((_split(entry), 0.0))
            self.entries[int(number)] = _Entry(
                int(entry["step"]),
                entry["rows"],
                list(entry["prompt_tokens"].split(entry["prompt_lengths"].tolist())),
                done,
            )


def _close(ahead: weakref.ref[Ahead]) -> None:
    there = ahead()
    if there is not None:
        there.close()


def _run(job: Callable[[], tuple[Generation, float]], done: Future[tuple[Generation, float]]) -> None:
    try:
        done.set_result(job())
    except BaseException as error:
        done.set_exception(error)


def _numerics(plugin: Precision) -> AbstractContextManager[Any]:
    """The precision of training for a thread beside it: autocast is a thread's own, the default dtype is everyone's."""
    return plugin.forward_context() if isinstance(plugin, MixedPrecision) else nullcontext()


def _copy(network: Network) -> Network:
    """The network as it is, for a thread to run while the original changes."""
    if isinstance(network, View):
        copied: nn.Module = copy.deepcopy(network.adapted)
        taken: Any = copied.view(network.role)  # type: ignore[operator]
    else:
        copied = taken = copy.deepcopy(network)
    copied.requires_grad_(False).eval()
    return cast(Network, taken)


def _places(entry: _Entry, rows: Tensor, ids: Sequence[Tensor]) -> list[int] | None:
    """Where rows with these prompts stand in an entry; None unless all of them do."""
    held = {row: place for place, row in enumerate(entry.rows.tolist())}
    places = [held.get(row, -1) for row in rows.tolist()]
    same = all(place >= 0 and torch.equal(entry.prompts[place], i) for place, i in zip(places, ids, strict=True))
    return places if same else None


def _pick(generation: Generation, places: list[int]) -> Generation:
    return Generation(
        completions=[generation.completions[i] for i in places],
        logps=[generation.logps[i] for i in places],
        ended=[generation.ended[i] for i in places],
        finish_reason=[generation.finish_reason[i] for i in places],
    )


def _joined(parts: Sequence[tuple[Tensor, list[Tensor], Generation]]) -> dict[str, Any]:
    """Generations of several processes as flat tensors, in the order of their rows, each once."""
    first: dict[int, int] = {}  # what came from a checkpoint every process has whole
    for place, row in enumerate(torch.cat([rows for rows, _, _ in parts]).tolist()):
        first.setdefault(row, place)
    order = [first[row] for row in sorted(first)]
    prompts = [p for _, prompts, _ in parts for p in prompts]
    completions = [c for *_, generation in parts for c in generation.completions]
    logps = [c for *_, generation in parts for c in generation.logps]
    reasons = [reason for *_, generation in parts for reason in generation.finish_reason]
    return {
        "rows": torch.tensor(sorted(first)),
        "prompt_lengths": torch.tensor([len(prompts[i]) for i in order]),
        "prompt_tokens": torch.cat([prompts[i] for i in order]),
        "lengths": torch.tensor([len(completions[i]) for i in order]),
        "tokens": torch.cat([completions[i] for i in order]),
        "logps": torch.cat([logps[i] for i in order]),
        "reasons": [reasons[i] for i in order],
    }


def _split(entry: dict[str, Any]) -> Generation:
    lengths = entry["lengths"].tolist()
    return Generation(
        completions=list(entry["tokens"].split(lengths)),
        logps=list(entry["logps"].split(lengths)),
        ended=[reason != "length" for reason in entry["reasons"]],
        finish_reason=list(entry["reasons"]),
    )
