"""HelpSteer 1 to 3: attributes as rankings or ratings, and preferences by their strength."""

from __future__ import annotations

from typing import Any

import pytest

from lit_palm.data import PreferenceData
from lit_palm.data.readers import HelpSteer, HelpSteer2, HelpSteer2Preference, HelpSteer3
from tests.data.readers.published import columns, helpsteer, helpsteer2_preference, helpsteer3, read, said

ROWS = [
    helpsteer("p", "poor", 1, 2, 3, 1, 1),
    helpsteer("q", "only", 3, 3, 3, 3, 3),
    helpsteer("p", "good", 4, 4, 4, 2, 1),
    helpsteer("p", "long", 4, 4, 4, 2, 4),
]


def test_responses_to_a_prompt_are_ranked_by_helpfulness(write: Any) -> None:
    path = write("x.jsonl", ROWS)
    for reader in (HelpSteer(), HelpSteer2()):
        rows, left_out = read(reader, "preferences", path)
        ranking = {"prompt": said("p"), "completions": ["poor", "good", "long"], "ranks": [1, 0, 0]}
        assert [row.columns for row in rows] == [ranking] and rows[0].where.endswith("x.jsonl:1")
        assert left_out == ["the prompt has a single response: 1 row left out (x:2)"]


def test_weights_decide_what_is_better(write: Any) -> None:
    weights = {"helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55, "verbosity": -0.4}
    path = write("x.jsonl", ROWS)
    rows, _ = read(HelpSteer(weights), "preferences", path)
    assert rows[0].columns["ranks"] == [2, 0, 1], "the verbose one loses"
    ratings = columns(HelpSteer(weights, form="rating"), "preferences", path)
    assert ratings[0] == {"prompt": said("p"), "completion": "poor", "rating": pytest.approx(3.75)}
    assert columns(HelpSteer(weights), "demonstrations", path)[0] == {"messages": said("p", "good")}
    data = PreferenceData(train=path, reader=HelpSteer(form="rating"), tokenizer="bytes", shuffle=False)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["rating"].tolist() == [1, 3, 4, 4]


def test_equal_sums_are_ties_whatever_they_are_made_of(write: Any) -> None:
    path = write("x.jsonl", [helpsteer("p", "a", 1, 2, 0, 0, 0), helpsteer("p", "b", 2, 1, 0, 0, 0)])
    rows, left_out = read(HelpSteer({"helpfulness": 0.1, "correctness": 0.1}), "preferences", path)
    assert not rows and left_out == ["all responses have the same score: 1 row left out (x:1)"]


def test_prompts_of_several_turns_are_messages(write: Any) -> None:
    turns = "Hi\n<extra_id_1>Assistant\nHello\nthere\n<extra_id_1>User\nAnd?"
    path = write("x.jsonl", [helpsteer(turns, "r", 1, 1, 1, 1, 1), helpsteer(turns, "s", 1, 1, 1, 1, 1)])
    rows, left_out = read(HelpSteer2(), "prompts", path)
    assert [row.columns for row in rows] == [{"prompt": said("Hi", "Hello\nthere", "And?")}] and len(left_out) == 1


@pytest.mark.parametrize("version", [2, 3])
def test_the_sign_says_which_is_preferred_and_the_size_how_much(version: int, write: Any) -> None:
    def row(strength: int) -> dict[str, Any]:
        return helpsteer2_preference(strength) if version == 2 else helpsteer3(strength)

    def reader(**options: Any) -> Any:
        return (HelpSteer2Preference if version == 2 else HelpSteer3)(**options)

    path = write("x.jsonl", [row(-3), row(1), row(0)])
    rows, left_out = read(reader(), "preferences", path)
    first, second = ([{"role": "assistant", "content": text}] for text in ("first", "second"))
    prompt = said("c#") if version == 2 else said("Hi", "Hello", "And?")
    assert [r.columns for r in rows] == [
        {"prompt": prompt, "chosen": first, "rejected": second, "margin": 3.0},
        {"prompt": prompt, "chosen": second, "rejected": first, "margin": 1.0},
    ]
    assert left_out == ["neither response is preferred: 1 row left out (x:3)"]
    rows, left_out = read(reader(min_strength=2), "demonstrations", path)
    assert [r.columns["messages"][-1]["content"] for r in rows] == ["first"]
    assert left_out[0] == "the preference is weaker than 2 (data.reader.min_strength): 1 row left out (x:2)"
    assert [r.columns for r in read(reader(), "prompts", path)[0]] == [{"prompt": prompt}]
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the key '\w*preference\w*' is 4, not from -3 to 3"):
        read(reader(), "preferences", write("x.jsonl", [row(4)]))
    with pytest.raises(ValueError, match="min_strength is 4"):
        reader(min_strength=4)


def test_the_column_split_tells_training_from_validation(write: Any) -> None:
    path = write(
        "preference.jsonl", [helpsteer2_preference(1), helpsteer2_preference(2, "val"), helpsteer2_preference(3)]
    )
    margins = {
        split: [row.columns["margin"] for row in read(HelpSteer2Preference(), "preferences", path, split)[0]]
        for split in ("train", "validation")
    }
    assert margins == {"train": [1.0, 3.0], "validation": [2.0]}
    data = PreferenceData(
        train=path, validation_split="validation", reader=HelpSteer2Preference(), tokenizer="bytes", shuffle=False
    )
    data.setup("fit")
    ((train,), (validation,)) = data.train_dataloader(), data.val_dataloader()
    assert train["margin"].tolist() == [1, 1, 3, 3] and validation["margin"].tolist() == [2, 2]


def test_domains_and_languages_of_helpsteer3(write: Any) -> None:
    rows = [helpsteer3(1), helpsteer3(1, domain="code", language="python"), helpsteer3(1, language="german")]
    kept, left_out = read(HelpSteer3(domains=["general"], languages=["english"]), "preferences", write("x.jsonl", rows))
    assert len(kept) == 1
    assert left_out == [
        "the domain is not general (data.reader.domains): 1 row left out (x:2)",
        "the language is not english (data.reader.languages): 1 row left out (x:3)",
    ]


def test_rows_and_arguments_off_the_schema(write: Any) -> None:
    row = ROWS[0] | {"verbosity": None}
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the key 'verbosity' is null; HelpSteer2 reads"):
        read(HelpSteer2({"verbosity": 1}), "preferences", write("x.jsonl", [row]))
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the key 'context\[1\]\.role' is missing"):
        turns = [{"role": "user", "content": "a"}, {"content": "b"}]
        read(HelpSteer3(), "preferences", write("x.jsonl", [helpsteer3(1, context=turns)]))
    with pytest.raises(ValueError, match=r"weights has beauty: 1\.0; weigh helpfulness"):
        HelpSteer({"beauty": 1.0})
    with pytest.raises(ValueError, match="all 0"):
        HelpSteer({"helpfulness": 0.0})
