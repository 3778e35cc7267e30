"""The second recipe: one-digit addition, a reward that can be verified, no download.

    python -m lit_palm.demo addition --output runs/addition/data

writes, below the output folder,

    text/train.jsonl            {"text": "3+4=7"}                      to pre-train on
    demonstrations/train.jsonl  {"prompt": "3+4=", "completion": "7"}  the same examples, to fine-tune on
    prompts/train.jsonl         {"prompt": "3+4=", "answer": "7"}      all 100 sums, to improve and to measure on

Only a share `correct` of the examples is right; most of the others are one too many, the rest any other sum. Whoever
learns them to perfection answers that share of the prompts correctly at temperature 1, and none of them greedily: the
most likely answer is wrong. That is the weak start. PPO then has to find out from the reward which of the answers it
gives are right. All sums are both training and validation: the task is to learn from a verified reward, not to
generalise to sums never seen.

The reward is used by name from YAML: `lit_palm.demo.addition.exact_answer`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_palm.demo.files import unit_hash, write_jsonl

__all__ = ["exact_answer", "examples", "problems", "write_addition"]

ANSWERS = range(20)  # 0+0 to 9+9, and one too many


def problems() -> list[dict[str, str]]:
    """The 100 sums of two digits: rows {"prompt", "answer"}."""
    return [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]


def examples(copies: int = 20, correct: float = 0.3, slip: float = 0.4, seed: int = 0) -> list[dict[str, str]]:
    """Rows {"prompt", "completion"}: every sum `copies` times, in a random order.

    Args:
        copies: examples of each of the 100 sums.
        correct: probability that an example is right.
        slip: probability that it is one too many; what is left falls on the other numbers 0 to 19, equally likely.
        seed: another seed, other examples.

    Raises:
        ValueError: when `copies` is below 1, or `correct` and `slip` are not probabilities that add up to at most 1.
    """
    if copies < 1 or min(correct, slip) < 0 or correct + slip > 1:
        raise ValueError(
            "copies must be at least 1, correct and slip at least 0 and together at most 1; "
            f"got copies={copies}, correct={correct}, slip={slip}"
        )
    rows = []
    for copy in range(copies):
        for problem in problems():
            key = (seed, copy, problem["prompt"])
            right = int(problem["answer"])
            others = [number for number in ANSWERS if number not in (right, right + 1)]
            other = others[int(unit_hash("other", *key) * len(others))]
            u = unit_hash("kind", *key)
            answer = right if u < correct else right + 1 if u < correct + slip else other
            rows.append((unit_hash("order", *key), {"prompt": problem["prompt"], "completion": str(answer)}))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def write_addition(
    folder: str | os.PathLike[str], copies: int = 20, correct: float = 0.3, slip: float = 0.4, seed: int = 0
) -> dict[str, int]:
    """Write the three files; returns how many rows each has."""
    folder = Path(folder)
    rows = examples(copies, correct, slip, seed)
    return {
        "text/train.jsonl": write_jsonl(
            folder / "text/train.jsonl", [{"text": row["prompt"] + row["completion"]} for row in rows]
        ),
        "demonstrations/train.jsonl": write_jsonl(folder / "demonstrations/train.jsonl", rows),
        "prompts/train.jsonl": write_jsonl(folder / "prompts/train.jsonl", problems()),
    }


def exact_answer(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[Any], **columns: Any
) -> list[float]:
    """1 where the completion, white space at its ends aside, is the answer, else 0.

    Args:
        prompts: what was asked; not looked at.
        completions: what was answered, without the end-of-sequence token.
        answer: the right answers, from the column `answer` of the prompts.
        **columns: whatever else a reward receives; not looked at.
    """
    return [float(given.strip() == str(right)) for given, right in zip(completions, answer, strict=True)]
