"""Whatever is wrong with a row, a reader says so in one line with file, line and key, or can do without the key."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from lit_palm import data
from lit_palm.data import readers
from lit_palm.data.readers import Reader
from lit_palm.data.readers.base import MODULES
from lit_palm.data.sources import Row
from tests.data.readers import published as p

RATINGS = [["2", "3", "3", "3"], ["5", "5", "5", "N/A"]]
POST = {**{k: p.POST[k] for k in ("id", "subreddit", "title", "post")}, "summary": "fell"}
SHARED = {"id": "x", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
TREE = [p.oasst("q", None, "Q"), p.oasst("a", "q", "A", rank=0), p.oasst("b", "q", "B", rank=1)]
SAMPLES: list[tuple[Reader, list[dict[str, Any]]]] = [
    (readers.HHRLHF(), [{"chosen": p.hh("Hi", "a"), "rejected": p.hh("Hi", "b")}]),
    (readers.OASST(lang=["en"], synthetic=False), TREE),
    (readers.OASST(lang=["en"], synthetic=False), p.nested(TREE)),
    (readers.SHP(domains=["askculinary"], max_pairs=2), [p.shp()]),
    (readers.UltraFeedback(without=["flan"]), [p.ultrafeedback(RATINGS)]),
    (readers.UltraFeedback("overall"), [p.ultrafeedback(RATINGS, [7.0, 6.0])]),
    (readers.UltraFeedbackBinarized(), [p.binarized("yes", "no")]),
    (readers.HelpSteer(), [p.helpsteer("p", "r", 1, 2, 3, 4, 0), p.helpsteer("p", "s", 2, 2, 3, 4, 0)]),
    (readers.HelpSteer2(form="rating"), [p.helpsteer("p", "r", 1, 2, 3, 4, 0)]),
    (readers.HelpSteer2Preference(), [p.helpsteer2_preference(1)]),
    (readers.HelpSteer3(domains=["general"], languages=["english"]), [p.helpsteer3(1)]),
    (readers.SummarizeFromFeedback(), [p.comparison(1)]),
    (readers.SummarizeFromFeedback(news=True), [p.comparison(1, info=p.NEWS)]),
    (readers.SummarizeFromFeedback("axis"), [p.axis(3)]),
    (readers.TLDR(), [POST]),
    (readers.TLDR(), [{"prompt": "x TL;DR:", "completion": " y"}]),
    (readers.Alpaca(), [{"instruction": "a", "input": "b", "output": "c", "text": "d"}]),
    (readers.ShareGPT(), [SHARED]),
    (readers.GSM8K(), [p.gsm8k()]),
]
WRONG: list[Any] = [None, 7, 2.5, True, "text", "", [], {}, ["x"], [{}], {"x": 1}]


def places(value: Any) -> Iterator[list[Any]]:
    """The paths to everything inside a row."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield [key]
        yield from ([key, *path] for path in places(inside))


def changed(rows: list[dict[str, Any]], path: list[Any]) -> Iterator[list[dict[str, Any]]]:
    """The rows with one place of the last row left out, and with every wrong value there."""
    for wrong in (..., *WRONG):
        new = copy.deepcopy(rows)
        at: Any = new[-1]
        for key in path[:-1]:
            at = at[key]
        if wrong is ...:
            del at[path[-1]]
        else:
            at[path[-1]] = wrong
        yield new


@pytest.mark.parametrize(
    ("reader", "rows"), SAMPLES, ids=[f"{type(r).__name__}-{i}" for i, (r, _) in enumerate(SAMPLES)]
)
def test_a_wrong_value_anywhere_is_one_line_or_no_matter(reader: Reader, rows: list[dict[str, Any]]) -> None:
    refused = 0
    modules = {view: getattr(data, MODULES[view])(tokenizer="bytes") for view in reader.views()}
    for path in places(rows[-1]):
        for new in changed(rows, path):
            for view in reader.views():
                given = iter([Row(f"x.jsonl:{i}", row) for i, row in enumerate(new, 1)])
                try:
                    # as a data module takes them, which looks at messages once more
                    list(modules[view].parse(getattr(reader, view)(given, lambda row, reason: None)))
                except ValueError as error:
                    refused += 1
                    message = str(error)
                    assert message.startswith(f"x.jsonl:{len(rows)}: ") and "\n" not in message, (path, view, message)
                    assert "the key '" in message or "message" in message
    assert refused > 10, "what the reader needs is missed"


def test_the_samples_themselves_are_read() -> None:
    for reader, rows in SAMPLES:
        for view in reader.views():
            given = iter([Row("x", json.loads(json.dumps(row))) for row in rows])
            assert list(getattr(reader, view)(given, lambda row, reason: None)), (type(reader).__name__, view)
