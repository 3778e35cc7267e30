"""One-digit addition: right sums, a start that is as weak as promised, a reward that can be verified."""

from __future__ import annotations

import json
import pkgutil
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from lit_palm.demo.__main__ import main
from lit_palm.demo.addition import exact_answer, examples, problems


def value(prompt: str) -> int:
    a, b = prompt.removesuffix("=").split("+")
    return int(a) + int(b)


def test_problems_are_all_right() -> None:
    assert len({row["prompt"] for row in problems()}) == 100
    assert all(int(row["answer"]) == value(row["prompt"]) for row in problems())
    assert {"prompt": "3+4=", "answer": "7"} in problems()


def test_the_start_is_weak() -> None:
    rows = examples(copies=60, correct=0.3, slip=0.4)
    kinds = Counter(min(int(row["completion"]) - value(row["prompt"]), 2) for row in rows)
    for kind, share in {0: 0.3, 1: 0.4}.items():
        assert abs(kinds[kind] - 6000 * share) < 4 * (6000 * share * (1 - share)) ** 0.5  # 4 sigma, fixed hash
    answers: dict[str, Counter[int]] = defaultdict(Counter)
    for row in rows:
        answers[row["prompt"]][int(row["completion"])] += 1
    assert all(sum(counts.values()) == 60 for counts in answers.values())
    greedy = sum(counts.most_common(1)[0][0] == value(prompt) for prompt, counts in answers.items())
    assert greedy < 30  # the most likely answer is mostly wrong: choosing greedily does not solve the task
    assert {int(row["completion"]) for row in rows} == set(range(20))
    assert rows == examples(copies=60)
    assert rows != examples(copies=60, seed=1)


def test_extremes() -> None:
    assert all(int(row["completion"]) == value(row["prompt"]) for row in examples(2, correct=1, slip=0))
    assert all(int(row["completion"]) != value(row["prompt"]) for row in examples(2, correct=0))
    for bad in ({"copies": 0}, {"correct": -0.1}, {"correct": 0.7, "slip": 0.4}):
        with pytest.raises(ValueError, match="copies must be at least 1"):
            examples(**bad)  # type: ignore[arg-type]


def test_reward_by_name() -> None:
    """As a YAML file names it, with the columns that a reward receives besides."""
    reward = pkgutil.resolve_name("lit_palm.demo.addition.exact_answer")
    assert reward is exact_answer
    scores = reward(
        prompts=["3+4="] * 6,
        completions=["7", " 7\n", "77", "", "seven", "12"],
        prompt_ids=[[1]] * 6,
        completion_ids=[[2]] * 6,
        answer=["7", 7, "7", "7", "7", 12],
    )
    assert scores == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_addition_command(tmp_path: Path) -> None:
    assert main(["addition", "--output", str(tmp_path), "--copies", "3"]) == 0
    read = {
        path.relative_to(tmp_path).as_posix(): [json.loads(line) for line in path.read_text().splitlines()]
        for path in tmp_path.rglob("*.jsonl")
    }
    assert {name: len(rows) for name, rows in read.items()} == {
        "text/train.jsonl": 300, "demonstrations/train.jsonl": 300, "prompts/train.jsonl": 100
    }  # fmt: skip
    demonstrations = [row["prompt"] + row["completion"] for row in read["demonstrations/train.jsonl"]]
    assert [row["text"] for row in read["text/train.jsonl"]] == demonstrations
    assert read["prompts/train.jsonl"] == problems()
