"""SHP: pairs of comments by their votes, with the filters that the authors advise."""

from __future__ import annotations

from typing import Any

import pytest

from lit_palm.data.readers import SHP
from tests.data.readers.published import columns, read, said, shp


def test_the_label_says_which_comment_was_preferred(write: Any) -> None:
    path = write("x.jsonl", [shp("p", "yes", "no", 1), shp("q", "no", "yes", 0)])
    rows, _ = read(SHP(), "preferences", path)
    assert [row.columns["chosen"] for row in rows] == [[{"role": "assistant", "content": "yes"}]] * 2
    assert [row.columns["rejected"][0]["content"] for row in rows] == ["no", "no"]
    assert [row.group for row in rows] == ["p", "q"] and rows[0].columns["prompt"] == said("What is p?")
    plain = columns(SHP(chat=False), "preferences", path)
    assert plain[1] == {"prompt": "What is q?", "chosen": "yes", "rejected": "no"}
    assert columns(SHP(chat=False), "demonstrations", path)[0] == {"prompt": "What is p?", "completion": "yes"}


def test_prompts_are_posts_once_each(write: Any) -> None:
    path = write("x.jsonl", [shp("p"), shp("p", "C", "D"), shp("q")])
    rows, left_out = read(SHP(), "prompts", path)
    assert [row.columns for row in rows] == [
        {"prompt": said(f"What is {post}?"), "domain": "askculinary_train"} for post in "pq"
    ]
    assert left_out == ["the prompt occurred before: 1 row left out (x:2)"]


def test_filters_count_what_they_leave_out(write: Any) -> None:
    rows = [shp("p", ratio=1.5), shp("p", ratio=2.0), *(shp("q") for _ in range(4)), shp("r", domain="askbaking_train")]
    reader = SHP(domains=["askculinary"], min_score_ratio=2, max_pairs=3)
    kept, left_out = read(reader, "preferences", write("x.jsonl", rows))
    assert [row.group for row in kept] == ["p", "q", "q", "q"]
    assert left_out == [
        "the score ratio is below 2 (data.reader.min_score_ratio): 1 row left out (x:1)",
        "the post has more than 3 pairs (data.reader.max_pairs): 1 row left out (x:6)",
        "the post is not from askculinary (data.reader.domains): 1 row left out (x:7)",
    ]
    assert reader.hub.data_dir == "askculinary" and SHP(domains=["a", "b"]).hub.data_dir is None


def test_rows_and_arguments_off_the_schema(write: Any) -> None:
    faults = {
        "labels": (2, r"'labels' is 2, neither 1"),
        "score_ratio": ("3", r"'score_ratio' is str \('3'\);.* a number"),
        "history": (None, r"'history' is null"),
    }
    for name, (value, words) in faults.items():
        path = write("x.jsonl", [shp(), {**shp(), name: value}])
        with pytest.raises(ValueError, match=rf"x\.jsonl:2: the key {words}"):
            read(SHP(), "preferences", path)
    with pytest.raises(ValueError, match="must be at least 1"):
        SHP(min_score_ratio=0.5)
