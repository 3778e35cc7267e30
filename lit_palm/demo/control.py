"""The control of the experiment: samples of the fine-tuned policy, kept at random, to fine-tune on.

Rejection sampling keeps the sample that a reward likes best. Keeping one at random goes through the same motions
(sampling, selecting, more training on one's own completions) without any reward: what changes then in the eyes of the
judge is not due to people's preferences.

    python -m lit_palm.demo control --samples samples.jsonl --output control.jsonl

In: rows {"prompt", "completion", "ended"}, any number for each prompt. Out: rows {"prompt", "completion"}, one for each
prompt, ready for `DemonstrationData`. Only completions that ended by themselves are kept: the others are cut off, and
fine-tuning would teach to stop in the middle of a sentence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from lit_palm.demo.files import read_jsonl, unit_hash, write_jsonl

__all__ = ["keep_at_random", "write_control"]


def keep_at_random(samples: Iterable[Mapping[str, Any]], seed: int = 0) -> list[dict[str, str]]:
    """One ended completion of each prompt, each of them equally likely; prompts without one are left out.

    The choice depends on the seed, the prompt and the place of the completion among those of its prompt.
    """
    best: dict[str, tuple[float, str]] = {}
    place: dict[str, int] = {}
    for row in samples:
        prompt = row["prompt"]
        place[prompt] = place.get(prompt, -1) + 1
        if row["ended"]:
            ticket = (unit_hash(seed, "control", prompt, place[prompt]), row["completion"])
            best[prompt] = min(best.get(prompt, ticket), ticket)
    return [{"prompt": prompt, "completion": completion} for prompt, (_, completion) in best.items()]


def write_control(samples: str | os.PathLike[str], output: str | os.PathLike[str], seed: int = 0) -> int:
    """Read samples, write the kept ones; returns how many.

    Raises:
        ValueError: when the samples are not readable or none of them ended by itself.
    """
    rows = keep_at_random(read_jsonl(samples, {"prompt": str, "completion": str, "ended": bool}), seed)
    if not rows:
        raise ValueError(f"{samples}: no completion ended by itself; allow more new tokens or train the policy longer")
    return write_jsonl(output, rows)
