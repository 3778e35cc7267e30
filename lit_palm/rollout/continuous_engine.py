"""The continuous-batching scheduler as an engine, for collections whose completions differ much in length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_palm.models.base import Network
from lit_palm.models.decoding import Decoding, Weights
from lit_palm.rollout.continuous import Scheduler
from lit_palm.rollout.engine import Engine, Generation, check_limits, check_request
from lit_palm.rollout.requests import Handle
from lit_palm.rollout.sampling import Sampling

__all__ = ["ContinuousEngine"]


class ContinuousEngine(Engine):
    """An engine over the scheduler: as `CachedEngine`, but a prompt starts as soon as a row is free.

    It pays where completions differ much in length and there are more prompts than `max_batch_size`.

    Args:
        max_batch_size: most rows at once; None: all.
        max_slots: most slots of the cache over all rows; None: no limit.
        weights: type of a PaLM's weights while decoding, bf16 or int8; None: that of the network.
        compile: decode with `torch.compile`.
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        max_slots: int | None = None,
        weights: Weights | None = None,
        compile: bool = False,
    ) -> None:
        check_limits(max_batch_size=max_batch_size, max_slots=max_slots)
        self.max_batch_size, self.max_slots = max_batch_size, max_slots
        self.weights, self.compile = weights, compile

    @property
    def rounds(self) -> bool:
        return self.weights is not None

    def generate(
        self,
        network: Network,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        seeds: Tensor,
        *,
        pad_id: int,
        eos_id: int | None,
        decode: Callable[[list[int]], str] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Sample one completion a prompt; see `Engine.generate`."""
        assert len(seeds) == len(prompts), "one seed a prompt"
        check_request(network, prompts, sampling, decode)
        training = [module for module in network.modules() if module.training]
        network.eval()
        try:
            scheduler = Scheduler(
                network,
                pad_id=pad_id,
                eos_id=eos_id,
                decode=decode,
                max_batch_size=self.max_batch_size,
                max_slots=self.max_slots,
                decoding=Decoding(self.weights, self.compile, sampling.max_new_tokens),
            )
            handles: list[Handle | None] = [None] * len(prompts)
            for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
                told = None if on_token is None else (lambda _, token, row=row: on_token(row, token.id))
                handles[row] = scheduler.submit(prompts[row], sampling, int(seeds[row]), on_token=told)
            while scheduler.step():
                pass
        finally:
            for module in training:
                module.training = True
        done = [handle for handle in handles if handle is not None]
        for handle in done:
            if handle.error is not None:
                raise ValueError(handle.error)
        return Generation(
            completions=[torch.tensor(handle.tokens) for handle in done],
            logps=[torch.tensor(handle.logps, dtype=torch.float32) for handle in done],
            ended=[handle.finish_reason != "length" for handle in done],
            finish_reason=[str(handle.finish_reason) for handle in done],
        )
