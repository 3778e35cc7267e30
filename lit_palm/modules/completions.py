"""Completions of prompts: asked of the engine, and scored by the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lit_palm.models.adapted import sampling_from
from lit_palm.models.base import Network
from lit_palm.rollout.collector import assemble
from lit_palm.rollout.engine_base import Generation
from lit_palm.rollout.rewards import RewardBatch, reward_totals
from lit_palm.rollout.sampling import row_seeds
from lit_palm.timing import span
from lit_palm.types import Experience

if TYPE_CHECKING:
    from lit_palm.modules.policy import LitPolicy

__all__ = ["Prompt", "as_samples", "generate", "score"]

Prompt = dict[str, Any]
"""A prompt row: `prompt_ids` [n] long, `prompt` str, `columns` dict."""


@torch.no_grad()
def generate(module: LitPolicy, prompts: Sequence[Prompt], rows: Tensor, stream: int) -> Generation:
    """What the engine samples for prompts; by every process, and where an engine elsewhere fails on one, on all.

    Args:
        module: the policy with its engine.
        prompts: one for each of `rows`; none, where this process has none.
        rows: [B] global row numbers, which with the seed and `stream` determine what is sampled.
        stream: number of the collection, or VALIDATION.

    Raises:
        ValueError: a prompt does not fit.
        RuntimeError: an engine elsewhere does not answer.
    """
    apart = module.engine.apart
    failure: Exception | None = None
    generation = Generation([], [], [], [])
    try:
        if prompts:
            tokenizer, policy = module.ready_tokenizer, cast(Network, module.network_of("policy"))
            with nullcontext() if apart else sampling_from(policy):  # one elsewhere has weights of its own
                generation = module.engine.generate(
                    policy,
                    [p["prompt_ids"] for p in prompts],
                    module.sampling,
                    row_seeds(module.rollout.seed, stream, rows),
                    pad_id=tokenizer.pad_id,
                    eos_id=tokenizer.eos_id,
                    decode=tokenizer.decode,
                )
    except Exception as error:
        if not apart:
            raise
        failure = error
    if apart:
        module.layout.raise_everywhere(failure)
    return generation


@torch.no_grad()
def score(
    module: LitPolicy, prompts: Sequence[Prompt], rows: Tensor, generation: Generation, copies: int = 1
) -> tuple[Experience, RewardBatch]:
    """Put prompts and completions together and score them.

    Args:
        module: the policy with its rewards.
        prompts: one for each of `rows`.
        rows: [B] global row numbers.
        generation: the completions.
        copies: completions a prompt (numbers the prompts).

    Returns:
        The experience so far, with the engine's log-probabilities in `engine_logps`, and what the rewards saw.

    Raises:
        ValueError: a reward misbehaves.
    """
    tokenizer, ids = module.ready_tokenizer, [p["prompt_ids"] for p in prompts]
    experience = assemble(ids, generation, tokenizer.pad_id, rows, rows // copies)
    experience["engine_logps"] = torch.zeros(experience["tokens"].shape, dtype=torch.float32)
    experience["engine_logps"][experience["loss_mask"]] = torch.cat(generation.logps).float()
    names = sorted({k for p in prompts for k in p["columns"]})
    batch = RewardBatch(
        prompts=[p["prompt"] for p in prompts],
        completions=[
            completion_text(tokenizer.decode(c.tolist()), reason, module.sampling.stop)
            for c, reason in zip(generation.completions, generation.finish_reason, strict=True)
        ],
        prompt_ids=ids,
        completion_ids=generation.completions,
        ended=generation.ended,
        columns={k: [p["columns"].get(k) for p in prompts] for k in names},
        tokens=experience["tokens"],
        mask=experience["mask"],
    )
    with span("score"):
        if module.rewards:
            experience["scores"], experience["rewards"], tokens = reward_totals(module.rewards, batch)
            if tokens is not None:
                experience["token_rewards"] = tokens
    return experience, batch


def completion_text(text: str, reason: str, stop: Sequence[str]) -> str:
    """The text of a completion, cut before the stop text that ended it (earlier ones came too soon to count)."""
    if reason != "stop":
        return text
    return text[: max((text.rfind(s) for s in stop if s in text), default=len(text))]


def as_samples(batch: RewardBatch, experience: Experience | None, count: int = 8) -> list[dict[str, Any]]:
    """The first completions with their rewards, for people to read."""
    rewards = experience.get("rewards", {}) if experience is not None else {}
    return [
        {"prompt": p, "completion": c, "rewards": {k: v[i].item() for k, v in rewards.items()}}
        for i, (p, c) in enumerate(zip(batch.prompts[:count], batch.completions[:count], strict=True))
    ]
