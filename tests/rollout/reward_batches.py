"""Batches of completions for the rewards' tests, from texts alone."""

from __future__ import annotations

from typing import Any

import torch

from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.rollout.rewards import Reward, RewardBatch, total_reward

TOKENIZER = ByteTokenizer()


def texts(completions: list[str], prompts: list[str] | None = None, **columns: list[Any]) -> RewardBatch:
    """A batch of these completions; a token is a byte, and every completion ends with EOS."""
    prompts = prompts or [""] * len(completions)
    ids = [
        [torch.tensor(TOKENIZER.encode(text), dtype=torch.long) for text in prompts],
        [torch.tensor([*TOKENIZER.encode(text), TOKENIZER.eos_id]) for text in completions],
    ]
    rows = [torch.cat(pair) for pair in zip(*ids, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    return RewardBatch(
        prompts=prompts,
        completions=completions,
        prompt_ids=ids[0],
        completion_ids=ids[1],
        ended=[True] * len(completions),
        tokens=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=TOKENIZER.pad_id),
        mask=torch.arange(int(lengths.max())) < lengths[:, None],
        columns=columns,
    )


def values(
    reward: Reward, completions: list[str], prompts: list[str] | None = None, **columns: list[Any]
) -> list[float]:
    """What a reward says of completions, through `total_reward`, before its weight."""
    _, found = total_reward([reward], texts(completions, prompts, **columns))
    return [round(value, 6) for value in found[reward.name].tolist()]
