"""From prompts to completions: the built-in KV-cached engine.

    generation = CachedEngine().generate(network, prompts, Sampling(max_new_tokens=40), seeds, pad_id=0, eos_id=1)
    generation.completions[0], generation.logps[0], generation.finish_reason[0]

The interface that it implements is in `engine_base`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_palm.models.base import Network
from lit_palm.models.decoding import Decode, Decoding, Weights, bytes_read_of, decoding_form
from lit_palm.models.kernels import last_logits
from lit_palm.rollout.draw import draw
from lit_palm.rollout.endings import NOT_FINITE, Ending
from lit_palm.rollout.engine_base import Engine, Generation, check_limits, check_request
from lit_palm.rollout.sampling import Sampling, filter_logits, uniform
from lit_palm.timing import span
from lit_palm.types import has_float64

__all__ = ["CachedEngine", "Engine", "Generation", "check_limits", "check_request"]


class CachedEngine(Engine):
    """Batched decoding with a key/value cache: a prompt is read once, then each step feeds one token a row.

    Rows of similar prompt length run together, equal prompts are read once, and finished rows leave the batch when
    they are half of it.

    Args:
        max_batch_size: most rows at once; None: all.
        weights: type of a PaLM's weights while decoding, bf16 or int8; None: that of the network.
        compile: decode with `torch.compile`.
    """

    def __init__(
        self, max_batch_size: int | None = None, weights: Weights | None = None, compile: bool = False
    ) -> None:
        check_limits(max_batch_size=max_batch_size)
        self.max_batch_size, self.weights, self.compile = max_batch_size, weights, compile

    @property
    def rounds(self) -> bool:
        return self.weights is not None

    @torch.no_grad()
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
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        size = self.max_batch_size or max(1, len(order))
        training = [module for module in network.modules() if module.training]
        network.eval()
        rows: dict[int, _Row] = {}
        try:
            decoded = decoding_form(network, Decoding(self.weights, self.compile, sampling.max_new_tokens))
            for start in range(0, len(order), size):
                part = order[start : start + size]
                chosen = [prompts[i] for i in part]
                batch = _Batch(network, decoded, chosen, seeds[part], part, sampling, pad_id, eos_id, decode, on_token)
                batch.run()
                rows.update(zip(part, batch.results(), strict=True))
        finally:
            for module in training:
                module.training = True
        ordered = [rows[i] for i in range(len(prompts))]
        return Generation(
            completions=[row[0] for row in ordered],
            logps=[row[1] for row in ordered],
            ended=[row[2] != "length" for row in ordered],
            finish_reason=[row[2] for row in ordered],
        )


_Row = tuple[Tensor, Tensor, str]


class _Batch:
    """One batch of rows on its way. Tensors over `alive` rows shrink as rows finish; results stay in full size."""

    def __init__(
        self,
        network: Network,
        quick: Decode,
        prompts: list[Tensor],
        seeds: Tensor,
        names: list[int],
        sampling: Sampling,
        pad_id: int,
        eos_id: int | None,
        decode: Callable[[list[int]], str] | None,
        on_token: Callable[[int, int], None] | None,
    ) -> None:
        self.on_token = on_token
        self.endings = [Ending(sampling, eos_id, decode) for _ in prompts]
        self.network, self.quick, self.sampling = network, quick, sampling
        self.bytes_read = bytes_read_of(quick)
        self.pad_id, self.eos_id, self.names = pad_id, eos_id, names
        self.prompts = prompts
        self.device = next(network.parameters()).device
        num_rows, steps = len(prompts), sampling.max_new_tokens
        self.uniforms = uniform(seeds[:, None], torch.arange(steps, device=seeds.device))
        if has_float64(self.device):
            self.uniforms = self.uniforms.to(self.device)
        self.tokens = torch.full((steps, num_rows), pad_id, dtype=torch.long, device=self.device)
        self.logps = torch.zeros(steps, num_rows, dtype=torch.float32, device=self.device)
        self.lengths = [steps] * num_rows
        self.reasons = ["length"] * num_rows
        self.alive = list(range(num_rows))
        self.done = [False] * num_rows

    def run(self) -> None:
        """Read the prompts, then sample until every row has ended."""
        logits = self.prefill()
        for step in range(self.sampling.max_new_tokens):
            tokens, logps = self.draw(logits, step)
            if len(self.alive) == len(self.names):
                self.tokens[step], self.logps[step] = tokens, logps
            else:
                self.tokens[step, self.index], self.logps[step, self.index] = tokens, logps
            if self.finish(tokens, step):
                return
            tokens = self.compact(tokens)
            if step + 1 < self.sampling.max_new_tokens:
                with span("decode", self.bytes_read(len(tokens))):
                    logits = self.quick(
                        tokens[:, None], positions=self.next_positions(), cache=self.cache, head=last_logits
                    )

    def prefill(self) -> Tensor:
        """Run the distinct prompts, left-padded, into a new cache and repeat its rows; logits [B, V]."""
        distinct: dict[tuple[int, ...], int] = {}
        which = [distinct.setdefault(tuple(p.tolist()), len(distinct)) for p in self.prompts]
        width = max(len(ids) for ids in distinct)
        lengths = torch.tensor([len(ids) for ids in distinct], device=self.device)
        tokens = torch.tensor([[self.pad_id] * (width - len(ids)) + list(ids) for ids in distinct], device=self.device)
        mask = positions = None
        self.positions: Tensor | None = None
        if int(lengths.min()) < width:
            mask = torch.arange(width, device=self.device) >= width - lengths[:, None]
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            self.positions = lengths[:, None]
        self.cache = self.network.new_cache(len(distinct), width + self.sampling.max_new_tokens)
        with span("prefill"):
            logits = self.quick(tokens, mask=mask, positions=positions, cache=self.cache, head=last_logits)
        self.index = torch.arange(len(which), device=self.device)
        self.seen: Tensor | None = None
        if self.sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(distinct), logits.shape[1], dtype=torch.bool, device=self.device)
            for row, ids in enumerate(distinct):
                self.seen[row, list(ids)] = True
        if len(distinct) < len(which):
            rows = torch.tensor(which, device=self.device)
            self.cache.select(rows)
            logits = logits[rows]
            self.positions = None if self.positions is None else self.positions[rows]
            self.seen = None if self.seen is None else self.seen[rows]
        self.counts = torch.zeros_like(logits) if self.sampling.counted else None
        return logits

    def next_positions(self) -> Tensor | None:
        """Position of the token to be fed, [B, 1], and count it; None when no row is padded."""
        current = self.positions
        if current is not None:
            self.positions = current + 1
        return current

    def draw(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One token a row and its log-probability: [B] long and [B] float."""
        sampling = self.sampling
        scaled = logits if sampling.temperature in (0.0, 1.0) else logits / sampling.temperature
        allowed = filter_logits(logits, sampling, self.seen, self.counts) if sampling.filtered else scaled
        if step < sampling.min_new_tokens and self.eos_id is not None:
            allowed = filter_logits(self.without_eos(logits), sampling, self.seen, self.counts)
        if sampling.greedy:
            tokens, logps, _ = draw(scaled, None, chosen=allowed.argmax(1))
        else:
            tokens, logps, _ = draw(scaled, self.uniforms[:, step], allowed)
        if self.seen is not None:
            self.seen[torch.arange(len(tokens), device=self.device), tokens] = True
        if self.counts is not None:
            self.counts.scatter_add_(1, tokens[:, None], torch.ones_like(self.counts[:, :1]))
        return tokens, logps

    def without_eos(self, logits: Tensor) -> Tensor:
        """The logits with EOS excluded."""
        logits = logits.clone()
        logits[:, self.eos_id] = -torch.inf
        return logits

    def finish(self, tokens: Tensor, step: int) -> bool:
        """Note which rows end with this token, and report tokens; True when no row is left."""
        if self.eos_id is None and not self.sampling.stop and self.on_token is None:
            return False
        ids = tokens.tolist()
        if not self.sampling.stop and self.on_token is None and self.eos_id not in ids:
            return False
        for row, token in zip(self.alive, ids, strict=True):
            if self.done[row]:
                continue
            if self.on_token is not None:
                self.on_token(self.names[row], token)
            reason = self.endings[row](token, step)
            if reason:
                self.done[row], self.reasons[row], self.lengths[row] = True, reason, step + 1
        return all(self.done)

    def compact(self, tokens: Tensor) -> Tensor:
        """Drop finished rows once they are half of the batch; the others' tokens."""
        finished = sum(self.done[row] for row in self.alive)
        if finished * 2 < len(self.alive) or not finished:
            return tokens
        kept = [place for place, row in enumerate(self.alive) if not self.done[row]]
        self.alive = [self.alive[place] for place in kept]
        rows = torch.tensor(kept, device=self.device)
        self.cache.select(rows)
        self.index, self.uniforms = self.index[rows], self.uniforms[kept]
        self.positions = None if self.positions is None else self.positions[rows]
        self.seen = None if self.seen is None else self.seen[rows]
        self.counts = None if self.counts is None else self.counts[rows]
        return tokens[rows]

    def results(self) -> list[_Row]:
        """Completion, log-probabilities and finish reason of each row."""
        tokens, logps = self.tokens.t().cpu(), self.logps.t().cpu()
        if not bool(logps.isfinite().all()):
            raise ValueError(NOT_FINITE)
        return [
            (tokens[row, :n].clone(), logps[row, :n].clone(), reason)
            for row, (n, reason) in enumerate(zip(self.lengths, self.reasons, strict=True))
        ]
