"""Drawing the next token of rows that each have settings of their own, for all rows at once.

What `filter_logits` and `sample` do with one `Sampling`, `RowSampling` does with one a row: a setting is a tensor over
the rows, and a filter that no row uses costs nothing. Every row gets what it would get alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_palm.rollout.draw import draw
from lit_palm.rollout.sampling import Sampling, nucleus_floor

__all__ = ["Draw", "RowSampling"]


class Draw(NamedTuple):
    """One token a row."""

    tokens: Tensor
    """[B] long."""
    logps: Tensor
    """[B] float32: log-probability in nats under softmax(logits / temperature), before penalties and filters."""
    scaled: Tensor
    """[B, V] logits / temperature."""
    norm: Tensor
    """[B, 1]: what is subtracted from `scaled` to make it log-probabilities."""


class RowSampling:
    """The settings of several rows as tensors.

    Args:
        samplings: one a row.
        device: of the logits.
        eos_id: what is not drawn before `min_new_tokens`; None: there is no such id.
    """

    def __init__(self, samplings: Sequence[Sampling], device: torch.device, eos_id: int | None) -> None:
        self.device, self.eos_id = device, eos_id

        def column(value: Callable[[Sampling], float], neutral: float) -> Tensor | None:
            """A setting as [B, 1]; None when no row changes anything by it."""
            values = [value(s) for s in samplings]
            if all(v == neutral for v in values):
                return None
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self.temperature = column(lambda s: s.temperature or 1.0, 1.0)
        self.repetition = column(lambda s: s.repetition_penalty, 1.0)
        self.frequency = column(lambda s: s.frequency_penalty, 0.0)
        self.presence = column(lambda s: s.presence_penalty, 0.0)
        self.min_p = column(lambda s: math.log(s.min_p) if s.min_p else -math.inf, -math.inf)
        greedy = [s.greedy for s in samplings]
        self.all_greedy = all(greedy)
        self.greedy = torch.tensor(greedy, device=device) if any(greedy) and not self.all_greedy else None
        self.top_k = [s.top_k for s in samplings] if any(s.top_k is not None for s in samplings) else None
        nucleus = [row for row, s in enumerate(samplings) if s.top_p is not None and s.top_p < 1]
        self.top_p = column(lambda s: s.top_p or 1.0, 1.0)
        self.nucleus = torch.tensor(nucleus, device=device) if 0 < len(nucleus) < len(samplings) else None
        self.minimum = [s.min_new_tokens for s in samplings] if any(s.min_new_tokens for s in samplings) else None

    def draw(
        self, logits: Tensor, uniforms: Tensor, steps: Sequence[int], seen: Tensor | None, counts: Tensor | None
    ) -> Draw:
        """Draw one token a row.

        Args:
            logits: [B, V] float.
            uniforms: [B] float64 in [0, 1).
            steps: how many tokens each row has so far.
            seen: [B, V] bool, tokens of prompt and completion; needed where a row has a repetition penalty.
            counts: [B, V] float, how often the completion has each token; needed where a row has another penalty.
        """
        scaled = logits if self.temperature is None else logits / self.temperature
        allowed = self.filtered(logits, scaled, steps, seen, counts)
        chosen = None if self.greedy is None and not self.all_greedy else allowed.argmax(1)
        if chosen is not None and self.greedy is not None:
            chosen.masked_fill_(~self.greedy, -1)
        tokens, logps, norm = draw(scaled, None if self.all_greedy else uniforms, allowed, chosen)
        return Draw(tokens, logps, scaled, norm)

    def filtered(
        self, logits: Tensor, scaled: Tensor, steps: Sequence[int], seen: Tensor | None, counts: Tensor | None
    ) -> Tensor:
        """Logits to draw from, -inf where a filter excludes a token; `scaled` itself where nothing is changed."""
        changed = logits
        if self.minimum is not None and self.eos_id is not None:
            early = [row for row, step in enumerate(steps) if step < self.minimum[row]]
            if early:
                changed = changed.clone()
                changed[early, self.eos_id] = -math.inf
        if self.repetition is not None and seen is not None:
            penalised = torch.where(changed < 0, changed * self.repetition, changed / self.repetition)
            changed = torch.where(seen, penalised, changed)
        if counts is not None and (self.frequency is not None or self.presence is not None):
            if self.frequency is not None:
                changed = changed - counts * self.frequency
            if self.presence is not None:
                changed = changed - (counts > 0) * self.presence
        if changed is logits:
            changed = scaled
        elif self.temperature is not None:
            changed = changed / self.temperature
        floor = self.floor(changed)
        return changed if floor is None else changed.masked_fill(changed < floor, -math.inf)

    def floor(self, logits: Tensor) -> Tensor | None:
        """The smallest logit that top-k, top-p and min-p keep, [B, 1]; None when there is no such filter."""
        floor: Tensor | None = None
        if self.top_k is not None:
            size = logits.shape[1]
            wanted = [k if k is not None and k < size else 0 for k in self.top_k]
            if any(wanted):
                place = torch.tensor(wanted, device=self.device)[:, None]
                ranked = logits.topk(max(wanted)).values.gather(1, (place - 1).clamp_(min=0))
                floor = ranked.masked_fill(place == 0, -math.inf)
        if self.top_p is not None:
            if self.nucleus is None:
                nucleus = nucleus_floor(logits, self.top_p, floor)
            else:  # rows without this filter would have the whole vocabulary sorted
                rows = self.nucleus
                part = nucleus_floor(logits[rows], self.top_p[rows], None if floor is None else floor[rows])
                nucleus = torch.full_like(logits[:, :1], -math.inf).index_copy_(0, rows, part)
            floor = nucleus if floor is None else torch.maximum(floor, nucleus)
        if self.min_p is not None:
            likely = logits.amax(1, keepdim=True) + self.min_p
            floor = likely if floor is None else torch.maximum(floor, likely)
        return floor
