"""From sampled completions to one `Experience`: assembling rows, annotating them by length, merging ranks.

Rows are prompt and completion without a gap, right-padded: a causal network then needs no mask, and no padding sits
between what is conditioned on and what is learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_palm.rollout.engine import Generation
from lit_palm.rollout.lengths import cost_of_a_pass, parts_of_similar_length
from lit_palm.types import Experience

__all__ = ["RolloutConfig", "annotate", "assemble", "merge", "prompt_order", "take"]


OldLogps = Literal["auto", "trainer", "engine"]


@dataclass
class RolloutConfig:
    """How much is collected, and how it is served to the optimiser."""

    num_prompts: int = 128
    """Prompts a collection, over all ranks; one collection is one Lightning epoch."""
    completions_per_prompt: int = 1
    """Completions sampled for each prompt."""
    passes: int = 2
    """How often a collection is gone through."""
    minibatch_size: int = 32
    """Completions a training batch, over all ranks; `trainer.accumulate_grad_batches` makes a step of several."""
    batch_size: int = 64
    """Most rows a forward pass without gradients, on each rank (log-probabilities, values); fewer where rows differ in
    length, so that little is computed on padding."""
    max_rounds: int = 1
    """Most rounds of `num_prompts` prompts until a collection is full, where an objective rejects samples."""
    old_logps: OldLogps = "auto"
    """Log-probabilities of the policy that sampled: a forward pass (`trainer`), as the engine reported them (`engine`),
    or the engine's when they agreed with the forward pass to 1e-5 in the first collection (`auto`; never those of an
    engine elsewhere, nor of asynchronous rollouts). With one step a collection they are that step's own, where the
    objective can do with that (`auto`)."""
    seed: int = 0
    """Seed of prompts' order, samples and minibatches."""
    asynchronous: bool = False
    """Sample the next collection while this one is learned from: each is sampled from the policy as it was one
    collection earlier. For an engine elsewhere, or idle cores."""
    max_staleness: int | None = None
    """Most optimiser steps by which the policy that sampled may be behind, with `asynchronous`: what is further behind
    is sampled anew, with nothing to overlap; null: as many as a collection has."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "completions_per_prompt", "passes", "minibatch_size", "batch_size", "max_rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {getattr(self, name)}")
        if self.max_staleness is not None and (self.max_staleness < 1 or not self.asynchronous):
            raise ValueError(
                f"rollout.max_staleness is {self.max_staleness}: use at least 1 optimiser step, together with "
                "rollout.asynchronous: true"
            )
        if self.asynchronous and self.old_logps == "engine":
            raise ValueError(
                "rollout.old_logps: engine takes the policy that sampled for the one that learns, and with "
                "rollout.asynchronous they differ: use auto"
            )
        if self.old_logps not in get_args(OldLogps):
            raise ValueError(f"rollout.old_logps is {self.old_logps!r}: choose {', '.join(get_args(OldLogps))}")

    @property
    def num_rows(self) -> int:
        """Completions a collection."""
        return self.num_prompts * self.completions_per_prompt


def prompt_order(num_prompts: int, seed: int, start: int, count: int, stream: int = 0) -> list[int]:
    """The prompts at places start .. start + count of an endless shuffled sequence: each pass its own permutation.

    A function of its arguments alone, so that nothing has to be saved and the number of ranks changes nothing. Other
    streams are other sequences.
    """
    order: list[int] = []
    seed += stream * 2**40
    while len(order) < count:
        epoch, offset = divmod(start + len(order), num_prompts)
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        permutation = torch.randperm(num_prompts, generator=generator).tolist()
        order += permutation[offset : offset + count - len(order)]
    return order


def assemble(
    prompts: Sequence[Tensor], generation: Generation, pad_id: int, rows: Tensor, groups: Tensor
) -> Experience:
    """Rows of prompt and completion, right-padded.

    Args:
        prompts: one [n] long tensor a row.
        generation: what the engine sampled for them.
        pad_id: fills the rest of a row.
        rows: [B] global row numbers.
        groups: [B] global prompt numbers.
    """
    tokens = [torch.cat([p, c]) for p, c in zip(prompts, generation.completions, strict=True)]
    length = torch.tensor([len(t) for t in tokens])
    start = torch.tensor([len(p) for p in prompts])
    place = torch.arange(int(length.max()))
    mask = place[None] < length[:, None]
    return Experience(
        tokens=pad_sequence(tokens, batch_first=True, padding_value=pad_id),
        mask=mask,
        loss_mask=mask & (place[None] >= start[:, None]),
        ended=torch.tensor(generation.ended, dtype=torch.bool),
        row=rows,
        group=groups,
    )


def annotate(
    experience: Experience, compute: Callable[[Experience], dict[str, Tensor]], batch_size: int, device: torch.device
) -> None:
    """Add per-token fields [B, T] in place, computed on `device` in parts of similar length, kept on the CPU.

    Args:
        experience: on the CPU.
        compute: gives [b, t] tensors by name for a part of the rows.
        batch_size: most rows at a time.
        device: where `compute` runs.
    """
    length, group = experience["mask"].sum(1), experience["group"]
    for part in parts_of_similar_length(length, cost_of_a_pass(device), group, batch_size):
        rows = experience.select(part)
        for name, values in compute(rows.to(device)).items():
            if name not in experience:
                experience[name] = torch.zeros(experience["tokens"].shape, dtype=torch.float32)
            experience[name][part, : values.shape[1]] = values.float().cpu()


def take(experience: Experience, rows: Tensor) -> Experience:
    """Some rows of a collection, with their rewards."""
    taken = experience.select(rows)
    if "rewards" in experience:
        taken["rewards"] = {name: values[rows] for name, values in experience["rewards"].items()}
    return taken


def merge(parts: Sequence[Experience], pad_id: int) -> Experience:
    """The rows of all ranks (or rounds) as one experience, in the order of `row`."""
    if len(parts) == 1:
        return parts[0]
    width = max(p["tokens"].shape[1] for p in parts)
    merged = Experience()
    for name, first in parts[0].items():
        if isinstance(first, Tensor):
            fill = pad_id if name == "tokens" else 0
            columns = [p[name] for p in parts]
            if first.dim() > 1:
                columns = [F.pad(c, (0, width - c.shape[1]), value=fill) for c in columns]
            merged[name] = torch.cat(columns)
        elif isinstance(first, list):
            merged[name] = [value for p in parts for value in p[name]]
    if "rewards" in parts[0]:
        merged["rewards"] = {k: torch.cat([p["rewards"][k] for p in parts]) for k in parts[0]["rewards"]}
    return take(merged, merged["row"].argsort())
