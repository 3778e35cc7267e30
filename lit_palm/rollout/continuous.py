"""Continuous batching: completions start while others are under way, and leave the batch the moment they end.

    scheduler = Scheduler(network, pad_id=0, eos_id=1, max_batch_size=64)
    handle = scheduler.submit(prompt, Sampling(max_new_tokens=40), seed=7, on_token=print)
    while scheduler.step():     # one token for every row; others may submit and cancel in between
        ...
    handle.tokens, handle.logps, handle.finish_reason

Every step feeds one token a row, reads the prompts of those that wait into a cache of their own, joins it to the
batch's, and draws the next token of all rows at once, each by its own `Sampling`. Rows of different lengths share one
left-padded cache; what is padding in every row is dropped. A completion depends on its prompt, its `Sampling` and its
seed alone, never on who else is in the batch, and equals that of `CachedEngine`.

A scheduler belongs to one thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_palm.models.base import Cache, Network
from lit_palm.models.decoding import Decode, Decoding, bytes_read_of, decoding_form
from lit_palm.models.kernels import last_logits
from lit_palm.rollout.endings import NOT_FINITE, Ending
from lit_palm.rollout.engine import check_limits, check_request
from lit_palm.rollout.requests import Handle, QueueFull, Reading, Token
from lit_palm.rollout.row_sampling import Draw, RowSampling
from lit_palm.rollout.sampling import Sampling, uniform
from lit_palm.timing import span
from lit_palm.types import has_float64

__all__ = ["Handle", "QueueFull", "Scheduler", "Token"]


class Scheduler:
    """Keeps a batch of completions going that anyone may join and leave.

    Args:
        network: in evaluation mode; its cache must be able to `join` and `trim`. Its weights change by
            `change_weights` alone: where that is quicker, a copy of them is in use (`lit_palm.models.decoding`).
        pad_id: an id to fill shorter rows with; it is never attended to.
        eos_id: the id that ends a completion; None: there is none.
        decode: ids -> text; needed for stop texts.
        max_batch_size: most rows at once; None: no limit.
        max_queue: most requests that wait; None: no limit.
        max_slots: most slots of the cache over all rows, rows times the longest; None: no limit beside the batch size
            and the network's `max_length`. One request may always run.
        prefill_tokens: most prompt tokens, padding included, that one step reads, since rows that are under way wait
            for it; a longer prompt is read in several steps.
        decoding: how the network decodes; None: as it is quickest without a change of type.

    Raises:
        ValueError: a limit below 1, or what `decoding_form` refuses.
    """

    def __init__(
        self,
        network: Network,
        *,
        pad_id: int,
        eos_id: int | None,
        decode: Callable[[list[int]], str] | None = None,
        max_batch_size: int | None = None,
        max_queue: int | None = None,
        max_slots: int | None = None,
        prefill_tokens: int = 4096,
        decoding: Decoding | None = None,
    ) -> None:
        check_limits(max_batch_size=max_batch_size, max_slots=max_slots)
        self.network, self.pad_id, self.eos_id, self.decode = network, pad_id, eos_id, decode
        self.decoding = decoding or Decoding()
        self._prepare()
        self.max_batch_size = math.inf if max_batch_size is None else max_batch_size
        self.max_queue = math.inf if max_queue is None else max_queue
        self.max_slots = math.inf if max_slots is None else max_slots
        self.prefill_tokens = prefill_tokens
        self.device = next(network.parameters()).device
        self.waiting: deque[Handle] = deque()
        self.rows: list[Handle] = []
        self.joining: list[Handle] = []  # neither waiting nor running: their prompts are being read
        self.reading: Reading | None = None
        self.endings: list[Ending] = []
        self.cache: Cache | None = None
        # tensors over the rows, made anew when rows have joined or left
        self.stale = True
        self.fed = self.positions = torch.zeros(0, dtype=torch.long, device=self.device)
        self.seeds = self.steps = torch.zeros(0, dtype=torch.long)  # on the host: a few numbers
        self.seen: Tensor | None = None
        self.counts: Tensor | None = None
        self.settings: RowSampling

    # ------------------------------------------------------------------------------ from outside

    def submit(
        self,
        prompt: Tensor | Sequence[int],
        sampling: Sampling,
        seed: int,
        *,
        num_top: int = 0,
        on_token: Callable[[Handle, Token], None] | None = None,
        on_end: Callable[[Handle], None] | None = None,
    ) -> Handle:
        """Ask for a completion; it starts at a coming step.

        Args:
            prompt: [n] token ids, n >= 1.
            sampling: how to draw.
            seed: what the randomness comes from.
            num_top: for so many of the likeliest ids every token tells the log-probabilities.
            on_token: called with every token, during `step`; what it raises comes out of `step`.
            on_end: called once, when `finish_reason` is set; neither may call `step`.

        Raises:
            ValueError: what cannot be generated; see `Engine.generate`.
            QueueFull: `max_queue` requests wait already.
        """
        ids = torch.as_tensor(prompt, dtype=torch.long)
        check_request(self.network, [ids], sampling, self.decode)
        if len(self.waiting) >= self.max_queue:
            raise QueueFull(f"{len(self.waiting)} requests wait already")
        handle = Handle(ids.tolist(), sampling, seed, num_top, on_token, on_end)
        self.waiting.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """End a request now; its row is free for another at the next step. Nothing happens to one that has ended."""
        if handle.finish_reason is None:
            if handle in self.waiting:
                self.waiting.remove(handle)
            handle.end("cancelled")

    def abort(self, error: str) -> None:
        """End every row that is under way, as after a failure in the midst of a step; those that wait stay."""
        lost = [*self.rows, *self.joining]
        self.rows, self.joining, self.endings, self.cache, self.stale = [], [], [], None, True
        self.reading = None
        for handle in lost:
            if handle.finish_reason is None:
                handle.end("error", error)

    def change_weights(self, change: Callable[[Network], None]) -> None:
        """Let the network's weights be changed, between two steps and while no row is under way."""
        assert not self.busy, "rows would go on with keys and values of other weights"
        change(self.network)
        self._prepare()

    def _prepare(self) -> None:
        self.quick: Decode = decoding_form(self.network, self.decoding)
        self.bytes_read = bytes_read_of(self.quick)

    @torch.no_grad()
    def step(self) -> bool:
        """Draw one token for every row, those that join now included; False when nothing is left to do."""
        self._retire()
        logits = []
        if self.rows:
            if self.stale:
                self._refresh()
            positions = self.positions[:, None]
            with span("decode", self.bytes_read(len(self.rows))):
                logits.append(self.quick(self.fed[:, None], positions=positions, cache=self.cache, head=last_logits))
        read = self._read()
        if read is not None:
            logits.append(read)
            self._refresh()
        if self.rows:
            steps = [len(handle.tokens) for handle in self.rows]
            uniforms = uniform(self.seeds, self.steps)
            if has_float64(self.device):
                uniforms = uniforms.to(self.device)
            together = logits[0] if len(logits) == 1 else torch.cat(logits)
            draw = self.settings.draw(together, uniforms, steps, self.seen, self.counts)
            self._advance(draw)
            self._report(draw)
            self._retire()
        return self.busy

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.rows or self.joining or self.waiting)

    # ------------------------------------------------------------------------------ rows come

    def _admit(self) -> list[Handle]:
        """Take those from the queue that there is room for, in their order."""
        joining: list[Handle] = []
        distinct: set[tuple[int, ...]] = set()
        widest, longest = max((h.width for h in self.rows), default=0), 0
        while self.waiting and len(self.rows) + len(joining) < self.max_batch_size:
            handle = self.waiting[0]
            widest, longest = max(widest, handle.width), max(longest, len(handle.prompt))
            distinct.add(tuple(handle.prompt))
            count = len(self.rows) + len(joining) + 1
            if count > 1 and widest * count > self.max_slots:
                break
            if joining and longest * len(distinct) > self.prefill_tokens and len(distinct) > 1:
                break
            joining.append(self.waiting.popleft())
        return joining

    def _begin(self, joining: list[Handle]) -> Reading:
        """Lay out the distinct prompts of those that join."""
        distinct: dict[tuple[int, ...], int] = {}
        which = [distinct.setdefault(tuple(handle.prompt), len(distinct)) for handle in joining]
        width = max(len(ids) for ids in distinct)
        tokens = torch.tensor([[self.pad_id] * (width - len(ids)) + list(ids) for ids in distinct], device=self.device)
        mask = positions = None
        if any(len(ids) < width for ids in distinct):
            lengths = torch.tensor([len(ids) for ids in distinct], device=self.device)
            mask = torch.arange(width, device=self.device) >= width - lengths[:, None]
            positions = (mask.cumsum(1) - 1).clamp(min=0)
        ahead = max(handle.sampling.max_new_tokens for handle in joining) if self.cache is None else 0
        return Reading(self.network.new_cache(len(distinct), width + min(ahead, 256)), tokens, mask, positions, which)

    def _read(self) -> Tensor | None:
        """Read on in the prompts of those that join, or of the next who may; the logits after them, [B', V], once they
        have been read and their rows have joined."""
        if all(handle.finish_reason is not None for handle in self.joining):  # cancelled, or there are none
            self.joining, self.reading = self._admit(), None
            if not self.joining:
                return None
        now = self.reading = self.reading or self._begin(self.joining)
        # one prompt alone has no padding, and may come in parts
        end = now.place + self.prefill_tokens if now.mask is None and len(now.tokens) == 1 else now.tokens.shape[1]
        part = now.tokens[:, now.place : end]
        where = {"mask": now.mask, "positions": now.positions, "cache": now.cache}
        with span("prefill"):
            logits: Tensor = self.quick(part, head=last_logits, **where)
        now.place += part.shape[1]
        if now.place < now.tokens.shape[1]:
            return None
        if len(now.tokens) < len(now.which):
            repeated = torch.tensor(now.which, device=self.device)
            now.cache.select(repeated)
            logits = logits[repeated]
        if self.cache is None:
            self.cache = now.cache
        else:
            self.cache.join(now.cache)
        self.rows += self.joining
        self.endings += [Ending(handle.sampling, self.eos_id, self.decode) for handle in self.joining]
        self.joining, self.reading = [], None
        return logits

    def _refresh(self) -> None:
        """Make the tensors over the rows from what the rows are now."""
        rows, device = self.rows, self.device
        self.fed = torch.tensor([h.tokens[-1] if h.tokens else 0 for h in rows], device=device)
        self.positions = torch.tensor([h.cached for h in rows], device=device)
        self.seeds = torch.tensor([h.seed for h in rows], dtype=torch.long)
        self.steps = torch.tensor([len(h.tokens) for h in rows])
        self.settings = RowSampling([h.sampling for h in rows], device, self.eos_id)
        self.seen = self.counts = None
        size = self.network.config.vocab_size
        if any(h.sampling.repetition_penalty != 1 for h in rows):
            assert size is not None
            self.seen = torch.zeros(len(rows), size, dtype=torch.bool, device=device)
            for row, handle in enumerate(rows):
                self.seen[row, [*handle.prompt, *handle.tokens]] = True
        if any(h.sampling.counted for h in rows):
            assert size is not None
            self.counts = torch.zeros(len(rows), size, dtype=torch.float32, device=device)
            for row, handle in enumerate(rows):
                if handle.sampling.counted and handle.tokens:
                    tokens = torch.tensor(handle.tokens, device=device)
                    self.counts[row] += tokens.bincount(minlength=size)
        self.stale = False

    # ------------------------------------------------------------------------------ tokens

    def _advance(self, draw: Draw) -> None:
        """Note what has been drawn, for the next step."""
        self.fed, self.positions, self.steps = draw.tokens, self.positions + 1, self.steps + 1
        if self.seen is not None:
            self.seen.scatter_(1, draw.tokens[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, draw.tokens[:, None], torch.ones_like(self.counts[:, :1]))

    def _report(self, draw: Draw) -> None:
        """Give every row its token, and end those that it ends."""
        tops = self._tops(draw)
        drawn = list(zip(self.rows, self.endings, draw.tokens.tolist(), draw.logps.tolist(), strict=True))
        heard: list[tuple[Handle, Token, str | None]] = []
        for row, (handle, ending, token, logp) in enumerate(drawn):
            if not math.isfinite(logp):
                heard.append((handle, Token(token, logp, []), "error"))
                continue
            step = len(handle.tokens)
            handle.tokens.append(token)
            handle.logps.append(logp)
            reason = ending(token, step)
            if reason is None and step + 1 == handle.sampling.max_new_tokens:
                reason = "length"
            heard.append((handle, Token(token, logp, tops.get(row, [])), reason))
        for handle, told, reason in heard:
            if handle.finish_reason is not None:  # cancelled by one of the others' listeners
                continue
            if handle.on_token is not None and reason != "error":
                handle.on_token(handle, told)
            if reason is not None and handle.finish_reason is None:
                handle.end(reason, NOT_FINITE if reason == "error" else None)

    def _tops(self, draw: Draw) -> dict[int, list[tuple[int, float]]]:
        """The likeliest ids of the rows that want them."""
        wanting = [row for row, handle in enumerate(self.rows) if handle.num_top]
        if not wanting:
            return {}
        rows = torch.tensor(wanting, device=self.device)
        most = min(max(self.rows[row].num_top for row in wanting), draw.scaled.shape[1])
        values, ids = draw.scaled[rows].topk(most)
        pairs = zip(wanting, ids.tolist(), (values - draw.norm[rows]).tolist(), strict=True)
        return {row: list(zip(i, v, strict=True))[: self.rows[row].num_top] for row, i, v in pairs}

    # ------------------------------------------------------------------------------ rows go

    def _retire(self) -> None:
        """Let the rows go that have ended, and drop what is padding in all that are left."""
        stay = [row for row, handle in enumerate(self.rows) if handle.finish_reason is None]
        if len(stay) == len(self.rows):
            return
        self.stale = True
        if not stay:
            self.rows, self.endings, self.cache = [], [], None
            return
        # the last rows move to where rows have gone, so that the others stay where they are
        holes = sorted(set(range(len(stay))) - set(stay))
        tail = [row for row in stay if row >= len(stay)]
        order = list(range(len(stay)))
        for hole, row in zip(holes, tail, strict=True):
            order[hole] = row
        assert self.cache is not None
        self.cache.select(torch.tensor(order, device=self.device))
        self.rows = [self.rows[row] for row in order]
        self.endings = [self.endings[row] for row in order]
        padding = self.cache.length - max(handle.cached for handle in self.rows)
        if padding:
            self.cache.trim(padding)
