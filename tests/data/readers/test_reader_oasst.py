"""OASST: threads, rankings and prompts of Open Assistant's trees, flat or nested, and what is pruned from them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_palm.data import DemonstrationData, PreferenceData
from lit_palm.data.readers import OASST
from tests.data.readers.published import Columns, columns, nested, oasst, read, said

TREE = [
    oasst("q", None, "Why?"),
    oasst("bad", "q", "No idea.", rank=1),
    oasst("good", "q", "Because.", rank=0),
    oasst("more", "good", "Really?", role="prompter"),
    oasst("yes", "more", "Yes.", rank=1),
    oasst("sure", "more", "Sure.", rank=0),
    oasst("thanks", "good", "Thanks", role="prompter"),
    oasst("what", "bad", "What?", role="prompter"),
]


def fill(tmp_path: Path, form: str, rows: list[Columns]) -> str:
    """A file as the hub has it: flat Parquet, or gzipped lines of messages or trees."""
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
        return str(tmp_path / "train.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in (nested(rows) if form == "trees" else rows))
    path = tmp_path / f"2023-04-12_oasst_ready.{form}.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode()))
    return str(path)


FORMS = ("parquet", "messages", "trees")


@pytest.mark.parametrize("form", FORMS)
def test_threads_follow_the_best_replies(form: str, tmp_path: Path) -> None:
    path = fill(tmp_path, form, TREE)
    rows, left_out = read(OASST(), "demonstrations", path)
    assert [row.columns for row in rows] == [{"messages": said("Why?", "Because.", "Really?", "Sure.")}]
    assert rows[0].group == "q"
    assert [line.partition(":")[0] for line in left_out] == [
        "a reply is not among the 1 best (data.reader.top_k)",
        "a message is left out that this one follows",
    ]
    threads = columns(OASST(top_k=None), "demonstrations", path)
    assert [[m["content"] for m in t["messages"]] for t in threads] == [
        ["Why?", "No idea."],
        ["Why?", "Because.", "Really?", "Yes."],
        ["Why?", "Because.", "Really?", "Sure."],
    ], "an unanswered message ends nothing, and what is the beginning of another thread is none"


@pytest.mark.parametrize("form", FORMS)
def test_ranked_replies_are_rankings_with_all_that_was_said_before(form: str, tmp_path: Path) -> None:
    path = fill(tmp_path, form, TREE)
    assert columns(OASST(), "preferences", path) == [
        {"prompt": said("Why?"), "completions": ["No idea.", "Because."], "ranks": [1, 0]},
        {"prompt": said("Why?", "Because.", "Really?"), "completions": ["Yes.", "Sure."], "ranks": [1, 0]},
    ]


@pytest.mark.parametrize("form", FORMS)
def test_prompts_are_what_people_asked_along_the_threads(form: str, tmp_path: Path) -> None:
    rows, _ = read(OASST(), "prompts", fill(tmp_path, form, TREE))
    assert [row.columns["message_id"] for row in rows] == ["q", "more", "thanks"]
    assert rows[1].columns["prompt"] == said("Why?", "Because.", "Really?") and rows[1].columns["lang"] == "en"


def test_the_same_rankings_as_the_data_module_without_a_reader(tmp_path: Path) -> None:
    path = fill(tmp_path, "messages", TREE)
    batches = []
    for reader in (None, OASST()):
        data = PreferenceData(train=path, reader=reader, tokenizer="bytes", shuffle=False)
        data.setup("fit")
        batches += list(data.train_dataloader())
    assert all((batches[0][name] == batches[1][name]).all() for name in batches[0])


def test_filters_take_everything_along_that_was_answered(tmp_path: Path) -> None:
    def first(lang: str, tree: str, **changes: Any) -> list[Columns]:
        question = oasst(f"q{tree}", None, "Q", tree=tree, lang=lang, **changes)
        return [question, *(oasst(f"a{tree}{i}", f"q{tree}", str(i), tree=tree, lang=lang, rank=i) for i in (0, 1))]

    rows = [
        *first("en", "1"),
        *first("de", "2"),
        *first("en", "3", deleted=True),
        *first("en", "4", review_result=False),
        *first("en", "5", tree_state="aborted_low_grade"),
        *first("en", "6"),
        oasst("orphan", "nowhere", "?", tree="7"),
    ]
    rows[-2] |= {"synthetic": True, "model_name": "sft"}
    path = fill(tmp_path, "messages", rows)
    kept, left_out = read(OASST(lang=["en", "fr"], synthetic=False), "preferences", path)
    assert [row.group for row in kept] == ["q1"]
    counts = {line.split(": ")[0]: line.split(": ")[1].split(" ")[0] for line in left_out}
    assert counts == {
        "the message that is answered is not in the data": "1",
        "the message is not in en or fr (data.reader.lang)": "1",
        "the message was deleted": "1",
        "the message did not pass review": "1",
        "the tree is not ready_for_export (data.reader.state)": "1",
        "a message is left out that this one follows": "8",
        "a model wrote the message (data.reader.synthetic)": "1",
        "a message has fewer than two ranked replies": "1",
    }
    assert len(read(OASST(), "preferences", path)[0]) == 3, "two languages, and what models wrote"
    assert len(read(OASST(state=""), "preferences", path)[0]) == 4


def test_unranked_replies_and_unanswered_questions(tmp_path: Path) -> None:
    rows = [oasst("q", None, "Q"), oasst("a", "q", "one"), oasst("b", "q", "two", rank=0), oasst("lone", None, "L")]
    path = fill(tmp_path, "messages", rows)
    kept, left_out = read(OASST(), "demonstrations", path)
    assert [row.columns["messages"] for row in kept] == [said("Q", "two")], "who has a rank is before who has none"
    assert any(line.startswith("nobody answers the message: 1") for line in left_out)
    assert read(OASST(), "preferences", path)[0] == []


def test_a_thread_with_two_unanswered_ends_is_one_thread(tmp_path: Path) -> None:
    rows = [oasst("q", None, "Q"), oasst("a", "q", "A"), *(oasst(n, "a", n, role="prompter") for n in "xy")]
    assert columns(OASST(), "demonstrations", fill(tmp_path, "trees", rows)) == [{"messages": said("Q", "A")}]


def test_a_tree_stays_on_one_side(tmp_path: Path) -> None:
    """Forty trees of two threads each: no tree is in both training and validation, and both have some."""
    rows: list[Columns] = []
    for tree in map(str, range(40)):
        rows += [oasst(f"q{tree}", None, "same question", tree=tree)]
        rows += [oasst(f"a{tree}", f"q{tree}", f"tree {tree}", tree=tree)]
        for i in (0, 1):
            rows += [oasst(f"m{tree}{i}", f"a{tree}", f"more {i}", tree=tree, role="prompter")]
            rows += [oasst(f"e{tree}{i}", f"m{tree}{i}", f"end {i}", tree=tree)]
    data = DemonstrationData(
        train=fill(tmp_path, "messages", rows), reader=OASST(), validation_fraction=0.4, tokenizer="bytes"
    )
    data.setup("fit")

    def trees(loader: Any) -> set[str]:
        texts = [data.tokenizer.decode(t.tolist()) for batch in loader for t in batch.tokens]
        return {text.split("tree ")[1].split("more")[0] for text in texts}

    train, validation = trees(data.train_dataloader()), trees(data.val_dataloader())
    assert len(train) + len(validation) == 40 and not train & validation and len(validation) > 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"role": "human"}, "the key 'role' is 'human', neither 'prompter' nor 'assistant'"),
        ({"text": None}, "the key 'text' is null; OASST reads rows as OpenAssistant/oasst1 has them"),
        ({"rank": "best"}, r"the key 'rank' is str \('best'\);.* a whole number"),
        ({"deleted": 0}, r"the key 'deleted' is int \(0\);.* true or false"),
    ],
)
def test_a_message_off_the_schema_is_named(change: Columns, words: str, tmp_path: Path) -> None:
    rows = [oasst("q", None, "Q"), {**oasst("a", "q", "A"), **change}]
    with pytest.raises(ValueError, match=rf"messages\.jsonl\.gz:2: {words}"):
        read(OASST(), "prompts", fill(tmp_path, "messages", rows))
    inside = words.replace("the key '", r"the key 'prompt\.replies\[0\]\.", 1)
    with pytest.raises(ValueError, match=rf"trees\.jsonl\.gz:1: {inside}"):
        read(OASST(), "prompts", fill(tmp_path, "trees", rows))


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="top_k is 0"):
        OASST(top_k=0)
    assert OASST(version=2).hub.name == "OpenAssistant/oasst2"
