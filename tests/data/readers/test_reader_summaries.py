"""SummarizeFromFeedback and TLDR: comparisons, marks, and posts with their authors' summaries."""

from __future__ import annotations

from typing import Any

import pytest

from lit_palm.data.readers import TLDR, SummarizeFromFeedback
from tests.data.readers.published import NEWS, POST, axis, columns, comparison, read

PROMPT = "SUBREDDIT: r/tifu\n\nTITLE: Ouch\n\nPOST: I fell.\n\nTL;DR:"


def test_the_choice_is_the_chosen_summary_and_a_post_is_a_group(write: Any) -> None:
    path = write("x.jsonl", [comparison(1), comparison(0)])
    rows, _ = read(SummarizeFromFeedback(), "preferences", path)
    assert rows[0].columns == {"prompt": PROMPT, "chosen": " I fell, it hurt", "rejected": " fell down"}
    assert rows[1].columns["chosen"] == " fell down" and {row.group for row in rows} == {"t3_2vwp1w"}
    rows, left_out = read(SummarizeFromFeedback(), "prompts", path)
    assert [row.columns for row in rows] == [{"prompt": PROMPT}] and len(left_out) == 1


def test_news_is_left_out_unless_asked_for(write: Any) -> None:
    path = write("x.jsonl", [comparison(1), comparison(1, info=NEWS)])
    rows, left_out = read(SummarizeFromFeedback(), "preferences", path)
    assert len(rows) == 1
    assert left_out == ["it is about a news article, not a post (data.reader.news): 1 row left out (x:2)"]
    news = columns(SummarizeFromFeedback(news=True), "preferences", path)[1]
    assert news["prompt"] == "TITLE: Sent off\n\nARTICLE: He fouled.\n\nTL;DR:"


def test_a_mark_is_a_rating(write: Any) -> None:
    path = write("x.jsonl", [axis(3), axis(None)])
    rows, left_out = read(SummarizeFromFeedback("axis"), "preferences", path)
    assert [row.columns for row in rows] == [{"prompt": PROMPT, "completion": " fell", "rating": 3.0}]
    assert left_out == ["there is no mark for overall (data.reader.axis): 1 row left out (x:2)"]
    assert [r["rating"] for r in columns(SummarizeFromFeedback("axis", "coverage"), "preferences", path)] == [4.0, 4.0]


def test_where_the_hub_has_it() -> None:
    hub = SummarizeFromFeedback("axis").hub
    assert (hub.data_dir, hub.revision) == ("axis", "refs/convert/parquet")
    assert SummarizeFromFeedback("axis").splits("preferences")["train"] == "test"


def test_posts_and_their_summaries_in_three_forms(write: Any) -> None:
    post = {k: POST[k] for k in ("id", "subreddit", "title", "post")}
    rows = [{**post, "summary": "fell"}, {"prompt": PROMPT, "label": " fell"}, {"prompt": PROMPT, "completion": "fell"}]
    for row in rows:
        path = write("x.jsonl", [row])
        assert columns(TLDR(), "demonstrations", path) == [{"prompt": PROMPT, "completion": " fell"}]
        assert columns(TLDR(), "prompts", path) == [{"prompt": PROMPT, "reference": "fell"}]
    _, left_out = read(TLDR(), "demonstrations", write("x.jsonl", [{**post, "summary": " "}]))
    assert left_out == ["the summary is empty: 1 row left out (x:1)"]


def test_rows_off_the_schema(write: Any) -> None:
    short = comparison(0) | {"summaries": [{"text": " one", "policy": "ref", "note": None}]}
    faults: list[tuple[dict[str, Any], str]] = [
        (comparison(2), "'choice' is 2, neither 0 nor 1"),
        (short, r"'summaries\[1\]\.text' is missing"),
        (comparison(0, info={"id": "a"}), r"'info\.article' is missing \(the keys there are 'id'\)"),
    ]
    for row, words in faults:
        with pytest.raises(ValueError, match=rf"x\.jsonl:2: the key {words}"):
            read(SummarizeFromFeedback(), "preferences", write("x.jsonl", [comparison(0), row]))
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the key 'title' is missing"):
        read(TLDR(), "demonstrations", write("x.jsonl", [{"subreddit": "a", "post": "b", "summary": "c"}]))
