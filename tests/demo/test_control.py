"""Random keep: uniform, reproducible, blind to what the completions say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lit_palm.demo.control import keep_at_random, write_control


def test_keeps_one_ended_completion_of_each_prompt_uniformly() -> None:
    samples = [
        {"prompt": f"p{p}", "completion": f"c{c}", "ended": c != 3 and p != 7} for c in range(5) for p in range(2000)
    ]
    kept = keep_at_random(samples)
    assert [row["prompt"] for row in kept] == [f"p{p}" for p in range(2000) if p != 7]
    counts = Counter(row["completion"] for row in kept)
    assert set(counts) == {"c0", "c1", "c2", "c4"}
    assert all(abs(count - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values())  # 4 sigma, fixed hash
    assert keep_at_random(samples) == kept
    assert keep_at_random(samples, seed=1) != kept
    # other texts, and prompts in another order: the same places are kept
    renamed = [{**row, "completion": "x" + row["completion"]} for row in samples]
    assert keep_at_random(renamed) == [{**row, "completion": "x" + row["completion"]} for row in kept]
    assert keep_at_random([row for row in samples if row["prompt"] == "p11"]) == [kept[10]]


def test_write_control(tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text('{"prompt": "A", "completion": " b.", "ended": true, "kl": 0.0}\n')
    assert write_control(samples, tmp_path / "control.jsonl") == 1
    assert json.loads((tmp_path / "control.jsonl").read_text()) == {"prompt": "A", "completion": " b."}
    samples.write_text('{"prompt": "A", "completion": " b.", "ended": false}\n')
    with pytest.raises(ValueError, match="no completion ended by itself"):
        write_control(samples, tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ('{"prompt": "A", "completion": "b", "ended": true}\n\n{oops}\n', r"samples\.jsonl:3: not JSON"),
        ("[1]\n", r"samples\.jsonl:1: expected an object"),
        ('{"prompt": "A", "completion": "b"}\n', r"samples\.jsonl:1: no column 'ended'"),
        (
            '{"prompt": 1, "completion": "b", "ended": true}\n',
            r"samples\.jsonl:1: column 'prompt' has the wrong type int",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        write_control(path, tmp_path / "control.jsonl")
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        write_control(tmp_path / "nowhere.jsonl", tmp_path / "control.jsonl")
