"""How the next token is drawn: filters over logits, and randomness that comes from counters instead of a generator.

One uniform number is drawn for each row and step, by hashing (the row's seed, the step), and turned into a token
through the inverse of the cumulative distribution. A row's sample therefore depends on its own seed alone: not on the
rows beside it, the number of ranks, or what was sampled before; nothing has to be saved to resume.

    sampling = Sampling(temperature=0.7, top_p=0.9)
    seeds_B = row_seeds(seed, collection, rows_B)
    probs_BV = filter_logits(logits_BV, sampling).softmax(-1)
    tokens_B = sample(probs_BV, uniform(seeds_B, step))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.types import has_float64

__all__ = ["Sampling", "filter_logits", "row_seeds", "sample", "uniform"]


@dataclass
class Sampling:
    """How completions are drawn. The penalty applies first, then the fields in their order, as in `transformers`.

    Raises:
        ValueError: a field is out of its range.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens (Fan et al. 2018)."""
    top_p: float | None = None
    """Keep the smallest set of likeliest tokens whose probabilities sum to at least p (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Above 1, makes tokens of the prompt and the completion so far less likely (Keskar et al. 2019)."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time the completion has it so far (as in OpenAI's interface)."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the completion has so far."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a completion; they stay at its end."""
    max_new_tokens: int = 64
    """Longest completion in tokens."""
    min_new_tokens: int = 0
    """EOS and stop texts do not end a completion before it has this many tokens; EOS is not drawn."""

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, way_out: str) -> None:
            if not ok:
                raise ValueError(f"sampling.{name} is {getattr(self, name)!r}: {way_out}")

        need(self.temperature >= 0 and math.isfinite(self.temperature), "temperature", "use 0 (greedy) or more")
        need(self.top_k is None or self.top_k >= 1, "top_k", "use at least 1, or leave it out")
        need(self.top_p is None or 0 < self.top_p <= 1, "top_p", "use a number above 0 and up to 1, or leave it out")
        for name in ("frequency_penalty", "presence_penalty"):
            need(math.isfinite(getattr(self, name)), name, "use a finite number, 0 for none")
        need(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "use a number from 0 to 1, or leave it out")
        need(self.repetition_penalty > 0, "repetition_penalty", "use a number above 0; 1 does nothing")
        need(not isinstance(self.stop, str), "stop", "give a list of texts, even for one")
        need(all(isinstance(s, str) and s for s in self.stop), "stop", "every stop text needs at least one character")
        need(self.max_new_tokens >= 1, "max_new_tokens", "use at least 1")
        need(0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", "use 0 up to max_new_tokens")

    @property
    def greedy(self) -> bool:
        """True when the likeliest token is taken, without chance."""
        return self.temperature == 0

    @property
    def counted(self) -> bool:
        """True when how often the completion has a token changes what is drawn."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def filtered(self) -> bool:
        """True when some tokens may never be drawn, or the penalty changes what is drawn."""
        return (
            self.top_k is not None
            or self.repetition_penalty != 1.0
            or self.counted
            or (self.top_p is not None and self.top_p < 1)
            or (self.min_p is not None and self.min_p > 0)
        )


def filter_logits(
    logits: Tensor, sampling: Sampling, seen: Tensor | None = None, counts: Tensor | None = None
) -> Tensor:
    """Logits to draw from: penalised, divided by the temperature, -inf where top-k, top-p or min-p exclude a token.

    Tokens as likely as the last one kept are kept too. A temperature of 0 divides by 1.

    Args:
        logits: [B, V] float; not changed.
        sampling: the filters.
        seen: [B, V] bool, the tokens of the prompt and completion so far; only the repetition penalty reads it.
        counts: [B, V] float, how often the completion has each token so far; only the other penalties read it.

    Returns:
        [B, V].
    """
    if sampling.repetition_penalty != 1.0 and seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    if sampling.counted and counts is not None:
        logits = logits - counts * sampling.frequency_penalty - (counts > 0) * sampling.presence_penalty
    if sampling.temperature not in (0.0, 1.0):
        logits = logits / sampling.temperature
    floor: Tensor | None = None  # [B, 1], the smallest logit that stays
    if sampling.top_k is not None and sampling.top_k < logits.shape[1]:
        floor = logits.topk(sampling.top_k).values[:, -1:]
    if sampling.top_p is not None and sampling.top_p < 1:
        nucleus = nucleus_floor(logits, sampling.top_p, floor)
        floor = nucleus if floor is None else torch.maximum(floor, nucleus)
    if sampling.min_p is not None and sampling.min_p > 0:
        likely = logits.amax(1, keepdim=True) + math.log(sampling.min_p)
        floor = likely if floor is None else torch.maximum(floor, likely)
    return logits if floor is None else logits.masked_fill(logits < floor, -math.inf)


def nucleus_floor(logits: Tensor, top_p: float | Tensor, floor: Tensor | None) -> Tensor:
    """The logit of the last token that top-p keeps, [B, 1]; probabilities are those of the tokens at or above `floor`.

    Args:
        logits: [B, V].
        top_p: for all rows, or [B, 1].
        floor: [B, 1], the smallest logit that other filters keep; None: all.
    """
    vocab_size = logits.shape[1]
    if floor is None:
        norm = logits.logsumexp(1, keepdim=True)
    else:
        norm = logits.masked_fill(logits < floor, -math.inf).logsumexp(1, keepdim=True)
    # the nucleus is nearly always a sliver of the vocabulary: sort only so many, and more when they were too few
    width = min(64, vocab_size)
    while True:
        ranked = logits.topk(width).values
        probs = (ranked - norm).exp()
        above = probs.cumsum(1) - probs  # probability of the tokens ranked before this one
        kept = above < top_p
        if width == vocab_size or not bool(kept[:, -1].any()):
            # the likeliest token is always kept: nothing ranks above it (save when logits are not numbers)
            return ranked.gather(1, (kept.sum(1, keepdim=True) - 1).clamp_(min=0))
        width = min(width * 8, vocab_size)


def sample(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token a row through the inverse of the cumulative distribution.

    Args:
        weights: [B, V] probabilities, up to a factor a row; a token of weight 0 is never drawn.
        uniforms: [B] float64 in [0, 1).

    Returns:
        [B] long.
    """
    if not has_float64(weights.device):
        return sample(weights.cpu(), uniforms.cpu()).to(weights.device)
    if weights.shape[1] <= 1024:
        return _invert(weights, uniforms)[0].squeeze(1)
    # a running sum over a large vocabulary is slow: find the block that holds the token, then the token in the block
    blocks = F.pad(weights, (0, -weights.shape[1] % 64)).view(len(weights), -1, 64)
    share = blocks.sum(2)
    block, total, goal = _invert(share, uniforms)
    # how far into the block the goal lies, from 0 up to, not including, 1
    inside = 1 - (total.gather(1, block) - goal) / share.gather(1, block)
    members = blocks[torch.arange(len(weights), device=weights.device), block.squeeze(1)]
    return (block * 64 + _invert(members, inside.squeeze(1).clamp_(0.0, 1 - 2.0**-52))[0]).squeeze(1)


def _invert(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First index whose cumulative weight exceeds u times the sum, [B, 1]; the cumulative weights; u times the sum."""
    total = weights.cumsum(1, dtype=torch.float64)
    goal = uniforms[:, None] * total[:, -1:]
    # only weights that are not a number run past the end
    return torch.searchsorted(total, goal, right=True).clamp_(max=weights.shape[1] - 1), total, goal


_GAMMA = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number; int64 arithmetic wraps
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def _mix(state: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014) on int64; shifts are made logical by a mask."""
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * _MIX_1
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return state ^ ((state >> 31) & 0x1FFFFFFFF)


def uniform(seeds: Tensor, step: int | Tensor) -> Tensor:
    """The uniform numbers of a step, a pure function of (seed, step).

    Args:
        seeds: [B] int64.
        step: which number of each row's sequence, from 0; a tensor that broadcasts against `seeds` gives several.

    Returns:
        float64 in [0, 1), in steps of 2^-52.
    """
    counter = torch.as_tensor(step, device=seeds.device) + 1
    bits = _mix(seeds + counter * _GAMMA)
    return ((bits >> 12) & 0xFFFFFFFFFFFFF).double() * 2.0**-52


def row_seeds(seed: int, collection: int, rows: Tensor) -> Tensor:
    """Seeds of rows, a pure function of (seed, collection, row): [B] int64, on the device of `rows`.

    Args:
        seed: the run's seed.
        collection: how often prompts were sampled before.
        rows: [B] long, global row numbers.
    """
    state = torch.tensor(seed, dtype=torch.long, device=rows.device)
    for word in (collection, rows):
        state = _mix(state + _GAMMA) + word
    return _mix(state + _GAMMA)
