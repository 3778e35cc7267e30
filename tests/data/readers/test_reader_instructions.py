"""Alpaca and ShareGPT: instructions and conversations as demonstrations and prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_palm.data.readers import Alpaca, ShareGPT
from tests.data.readers.published import columns, read, said

ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3", "text": "Below is ..."},
    {"instruction": "Greet.", "input": "", "output": "Hello", "text": "Below is ..."},
]


def test_the_input_follows_the_instruction(write: Any) -> None:
    path = write("x.jsonl", ALPACA)
    found = columns(Alpaca(), "demonstrations", path)
    assert [row["prompt"] for row in found] == [said("Add.\n\n1 2"), said("Greet.")]
    assert found[0]["completion"] == [{"role": "assistant", "content": "3"}]
    assert columns(Alpaca(), "prompts", path) == [{"prompt": said("Add.\n\n1 2")}, {"prompt": said("Greet.")}]


def test_plain_text_is_what_alpaca_was_trained_with(write: Any) -> None:
    with_input, without = columns(Alpaca(chat=False), "demonstrations", write("x.jsonl", ALPACA))
    assert with_input["prompt"].startswith("Below is an instruction that describes a task, paired with an input that")
    assert with_input["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:")
    assert without["prompt"].endswith("the request.\n\n### Instruction:\nGreet.\n\n### Response:")
    assert without["completion"] == "\nHello"


def test_an_empty_output_is_left_out_and_a_missing_one_named(write: Any) -> None:
    rows, left_out = read(Alpaca(), "demonstrations", write("x.jsonl", [*ALPACA, ALPACA[0] | {"output": " "}]))
    assert len(rows) == 2 and left_out == ["the output is empty: 1 row left out (x:3)"]
    with pytest.raises(ValueError, match=r"y\.jsonl:1: the key 'output' is missing .*tatsu-lab/alpaca"):
        read(Alpaca(), "demonstrations", write("y.jsonl", [{"instruction": "a", "input": ""}]))


def share(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "dsOTKpn_0", "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def test_conversations_are_read_from_an_array_as_the_hub_has_it(tmp_path: Path) -> None:
    rows = [
        share(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")),
        share(("system", "s"), ("human", "a"), ("gpt", "b"), ("human", "c")),
        share(("gpt", "left over"), ("human", "a"), ("gpt", "b")),
    ]
    path = tmp_path / "ShareGPT_V3_unfiltered_cleaned_split.json"
    path.write_text(json.dumps(rows))
    found = [row["messages"] for row in columns(ShareGPT(), "demonstrations", str(path))]
    assert found == [
        said("a", "b", "c", "d"),
        [{"role": "system", "content": "s"}, *said("a", "b")],
        said("a", "b"),
    ]
    assert columns(ShareGPT(system=False), "demonstrations", str(path))[1]["messages"] == said("a", "b")
    prompts, left_out = read(ShareGPT(), "prompts", str(path))
    assert [row.columns["prompt"] for row in prompts] == [said("a"), found[1][:2]]
    assert left_out == ["the prompt occurred before: 1 row left out (x, item 3)"]


def test_conversations_that_teach_nothing_are_left_out(write: Any) -> None:
    rows = [
        share(("gpt", "b")),
        share(("human", "a"), ("human", "b"), ("gpt", "c")),
        share(("human", "a"), ("system", "s"), ("gpt", "c")),
        share(("human", "a"), ("gpt", " ")),
        share(("human", "a")),
        share(),
    ]
    kept, left_out = read(ShareGPT(), "demonstrations", write("x.jsonl", rows))
    assert not kept
    assert left_out == [
        "the conversation has no human: 2 rows left out (x:1, 6)",
        "one speaker has two turns in a row: 1 row left out (x:2)",
        "a system message is not the first: 1 row left out (x:3)",
        "a turn is empty: 1 row left out (x:4)",
        "the assistant says nothing: 1 row left out (x:5)",
    ]


def test_an_unknown_speaker_is_named(write: Any) -> None:
    path = write("x.jsonl", [share(("human", "a"), ("robot", "b"))])
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the key 'conversations\[1\]\.from' is 'robot', none of human"):
        read(ShareGPT(), "demonstrations", path)
