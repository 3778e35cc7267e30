"""HHRLHF: dialogues of Anthropic/hh-rlhf as pairs, demonstrations and prompts, and what is left out of them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lit_palm.data import PreferenceData
from lit_palm.data.readers import HHRLHF
from lit_palm.data.readers.hh import hh_messages
from lit_palm.data.tokenizers import ByteTokenizer
from tests.data.readers.published import columns, hh, read, said

ROWS = [
    {"chosen": hh("Hi", "Hello!", "Help me", "Sure."), "rejected": hh("Hi", "Hello!", "Help me", "No.")},
    {"chosen": hh("Hi", "Yes?"), "rejected": hh("Hi", "What?")},
]


def test_what_two_dialogues_share_is_the_prompt(write: Any) -> None:
    path = write("x.jsonl", ROWS)
    first, second = columns(HHRLHF(), "preferences", path)
    assert first == {
        "prompt": said("Hi", "Hello!", "Help me"),
        "chosen": [{"role": "assistant", "content": "Sure."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    assert second["prompt"] == said("Hi")
    assert columns(HHRLHF(), "demonstrations", path)[0] == {"messages": said("Hi", "Hello!", "Help me", "Sure.")}
    assert columns(HHRLHF(), "prompts", path) == [{"prompt": said("Hi", "Hello!", "Help me")}, {"prompt": said("Hi")}]


def test_dialogues_that_part_earlier_keep_what_follows(write: Any) -> None:
    row = {"chosen": hh("Hi", "Hello!", "Thanks", "Bye"), "rejected": hh("Hi", "What?", "Nothing", "Fine")}
    (found,) = columns(HHRLHF(), "preferences", write("x.jsonl", [row]))
    assert found["prompt"] == said("Hi") and [m["content"] for m in found["rejected"]] == ["What?", "Nothing", "Fine"]


def test_what_cannot_be_trained_on_is_left_out_with_its_reason(write: Any) -> None:
    rows = [
        *ROWS,
        {"chosen": hh("Hi", "Yes?", "And?"), "rejected": hh("Hi", "No")},
        {"chosen": "\n\nAssistant: I begin.", "rejected": hh("Hi", "No")},
        {"chosen": "\n\nHuman: Hi\n\nHuman: Hm\n\nAssistant: Yes?", "rejected": hh("Hi", "No")},
        {"chosen": hh("Hi", "a", "b", "c"), "rejected": hh("Hi", "a", "other", "c")},
        {"chosen": hh("Hi", "a"), "rejected": hh("Ho", "a")},
    ]
    path = write("x.jsonl", rows)
    kept, left_out = read(HHRLHF(), "preferences", path)
    assert len(kept) == 2
    assert left_out == [
        "a dialogue does not end with the assistant: 1 row left out (x:3)",
        "a dialogue does not begin with the human: 1 row left out (x:4)",
        "one speaker has two turns in a row: 1 row left out (x:5)",
        "the two dialogues differ in what the human says: 2 rows left out (x:6, 7)",
    ]
    prompts, left_out = read(HHRLHF(), "prompts", write("x.jsonl", [ROWS[1], ROWS[0], ROWS[1]]))
    assert len(prompts) == 2 and left_out == ["the prompt occurred before: 1 row left out (x:3)"]


def test_batches_are_those_of_the_same_pairs_without_a_reader(write: Any) -> None:
    path, tokenizer = write("x.jsonl", ROWS), ByteTokenizer()
    batches = []
    for reader in (None, HHRLHF()):
        data = PreferenceData(train=path, reader=reader, tokenizer=tokenizer, shuffle=False)
        data.setup("fit")
        batches += list(data.train_dataloader())
    assert batches[0].keys() == batches[1].keys()
    assert all((batches[0][name] == batches[1][name]).all() for name in batches[0])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"chosen": hh("Hi", "a")},
            r"x\.jsonl:2: the key 'rejected' is missing \(the keys there are 'chosen'\); HHRLHF",
        ),
        ({"chosen": hh("Hi", "a"), "rejected": 3}, r"x\.jsonl:2: the key 'rejected' is int \(3\); .* a string"),
        ({"chosen": "Hi", "rejected": hh("Hi", "a")}, r"x\.jsonl:2: the key 'chosen' does not begin with 'Human:'"),
    ],
)
def test_a_row_off_the_schema_is_named(row: dict[str, Any], words: str, write: Any) -> None:
    data = PreferenceData(train=write("x.jsonl", [ROWS[0], row]), reader=HHRLHF(), tokenizer="bytes")
    with pytest.raises(ValueError, match=words):
        data.setup("fit")


def test_prompts_are_those_that_trl_extracts(write: Any) -> None:
    """Sixty pairs of random dialogues that part in the last answer, or earlier."""
    extract_prompt = pytest.importorskip("trl").extract_prompt
    draw = random.Random(0)
    rows = []
    for number in range(60):
        shared = [f"turn {number} {i}" for i in range(draw.choice([1, 3, 5]))]
        rest = [[f"{side} {i}" for i in range(draw.choice([1, 3]))] for side in ("good", "bad")]
        rows.append({"chosen": hh(*shared, *rest[0]), "rejected": hh(*shared, *rest[1])})
    ours = columns(HHRLHF(), "preferences", write("x.jsonl", rows))
    theirs = [extract_prompt({name: hh_messages(text) for name, text in row.items()}) for row in rows]
    assert ours == theirs and {len(row["prompt"]) for row in ours} == {1, 3, 5}
