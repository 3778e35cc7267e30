"""PreferenceData: equal and empty answers are reported with their lines, and dropped, kept or refused as told."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from lit_palm.data.preferences import PreferenceData
from lit_palm.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


def load(path: str, **options: Any) -> tuple[list[tuple[str, int | float | bool]], list[str]]:
    """((answer, what people said) of every row, the lines of the one warning there may be)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = PreferenceData(train=path, shuffle=False, tokenizer=TOKENIZER, batch_size=100, **options)
        data.setup("fit")
    (batch,) = data.train_dataloader()
    name = next(n for n in ("rank", "rating", "label") if n in batch)
    answers = [TOKENIZER.decode(t[m].tolist()) for t, m in zip(batch.tokens, batch.loss_mask, strict=True)]
    told = [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "faults" in str(w.message)]
    assert len(told) <= 1
    lines = told[0].replace(path, "x.jsonl").splitlines()[1:] if told else []
    return list(zip(answers, batch[name].tolist(), strict=True)), [line.strip() for line in lines]


def pair(chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"prompt": "p", "chosen": chosen, "rejected": rejected}


GOOD = pair("a", "b")
IDENTICAL = "the same answer was ranked differently (data.identical): "
EMPTY = "an answer is empty, nothing but EOS or white space (data.empty): "


def test_a_pair_of_equal_answers_is_dropped_kept_or_refused(write: Any) -> None:
    path = write("x.jsonl", [GOOD, pair("c", "c"), pair("d", "d "), pair("e", "e")])
    assert load(path) == ([("a", 0), ("b", 1), ("d", 0), ("d ", 1)], [IDENTICAL + "2 rows dropped (x.jsonl:2, 4)"])
    rows, told = load(path, identical="keep")
    assert len(rows) == 8 and told == [IDENTICAL + "2 rows kept (x.jsonl:2, 4)"]
    words = r"x\.jsonl:2: 'chosen' and 'rejected' are the same answer.* set data\.identical to drop or keep"
    with pytest.raises(ValueError, match=words):
        load(path, identical="error")


def test_equal_is_what_the_tokens_say_whatever_the_format(write: Any) -> None:
    user, yes = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    same = {"prompt": [user], "completions": ["yes", [yes]], "ranks": [0, 1]}
    other = {"prompt": [user], "completions": ["yes", [{**yes, "content": "no"}]], "ranks": [0, 1]}
    rows, told = load(write("x.jsonl", [same, other]))
    assert len(rows) == 2 and told == [IDENTICAL + "1 row dropped (x.jsonl:1)"]


def test_an_answer_without_text_is_dropped_kept_or_refused(write: Any) -> None:
    path = write("x.jsonl", [pair("", "b"), GOOD, pair("a", " \n"), pair("", "")])
    # two empty answers are the same as well, and are counted once
    assert load(path) == ([("a", 0), ("b", 1)], [EMPTY + "3 rows dropped (x.jsonl:1, 3, 4)"])
    rows, told = load(path, empty="keep", identical="keep")
    assert len(rows) == 8
    assert told == [EMPTY + "3 rows kept (x.jsonl:1, 3, 4)", IDENTICAL + "1 row kept (x.jsonl:4)"]
    with pytest.raises(ValueError, match=r"x\.jsonl:1: 'chosen' is empty.* set data\.empty to drop or keep"):
        load(path, empty="error")


def test_an_empty_message_is_empty_and_a_call_of_a_tool_is_not(write: Any) -> None:
    user, empty = {"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}
    path = write("x.jsonl", [{"prompt": [user], "chosen": [{**empty, "content": "yes"}], "rejected": [empty]}, GOOD])
    assert load(path)[1] == [EMPTY + "1 row dropped (x.jsonl:1)"]
    template = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}"
    template += "{{ m.content }}{{ m.tool_calls or '' }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    tokenizer = ByteTokenizer(chat_template=template)
    calling = {**empty, "tool_calls": ["search"]}
    path = write("y.jsonl", [{"prompt": [user], "chosen": [calling], "rejected": [empty]}])
    data = PreferenceData(train=path, tokenizer=tokenizer, empty="error")
    with pytest.raises(ValueError, match=r"'rejected' is empty"):
        data.setup("fit")


def test_a_ranking_loses_its_faulty_answers_and_keeps_the_others(write: Any) -> None:
    def ranking(completions: list[str], ranks: list[int]) -> dict[str, Any]:
        return {"prompt": "p", "completions": completions, "ranks": ranks}

    rows = [
        ranking(["a", "b", "a", "c"], [0, 1, 2, 2]),  # a contradicts itself: b and c stay
        ranking(["d", "e", "e"], [0, 1, 1]),  # a tie of equal answers contradicts nothing
        ranking(["f", "g", "f"], [0, 1, 2]),  # g alone says nothing
        ranking(["h", "", "i"], [1, 0, 1]),  # what is left is a tie
        ranking(["j", " ", "k"], [0, 0, 1]),
    ]
    path = write("x.jsonl", rows)
    left, told = load(path)
    assert left == [("b", 1), ("c", 2), ("d", 0), ("e", 1), ("e", 1), ("j", 0), ("k", 1)]
    partly = "1 row lost such answers and kept others"
    assert told == [
        f"{EMPTY}1 row dropped (x.jsonl:4); {partly} (x.jsonl:5)",
        f"{IDENTICAL}{partly} (x.jsonl:1); 1 row dropped (x.jsonl:3)",
    ]
    with pytest.raises(ValueError, match=r"x\.jsonl:1: 'completions\[0\]' and 'completions\[2\]' are the same answer"):
        load(path, identical="error")
    with pytest.raises(ValueError, match=r"x\.jsonl:4: 'completions\[1\]' is empty"):
        load(path, empty="error")


def test_ratings_and_feedback_lose_their_empty_answers(write: Any) -> None:
    path = write("x.jsonl", [{"text": "good", "rating": 2}, {"text": " ", "rating": 1}, {"text": "good", "rating": 0}])
    assert load(path) == ([("good", 2.0), ("good", 0.0)], [EMPTY + "1 row dropped (x.jsonl:2)"])
    rows = [{"prompt": "p", "completion": text, "label": bool(text)} for text in ("", "a", "b")]
    path = write("y.jsonl", rows)
    assert load(path)[0] == [("a", True), ("b", True)]
    assert load(path, empty="keep")[0] == [("", False), ("a", True), ("b", True)]


def test_all_faults_are_in_one_report_with_the_first_places(write: Any) -> None:
    rows = [pair("c", "c")] * 7 + [pair("x" * 50, "y"), GOOD, pair("", "b")]
    path = write("x.jsonl", rows)
    _, told = load(path, max_length=20, overlong="drop")
    assert told == [
        EMPTY + "1 row dropped (x.jsonl:10)",
        IDENTICAL + "7 rows dropped (x.jsonl:1, 2, 3, 4, 5 and 2 more)",
        "longer than 20 tokens (data.overlong): 1 row dropped (x.jsonl:8)",
    ]


def test_the_report_is_the_same_from_the_cache_and_per_stage(write: Any, own_cache: Any) -> None:
    path = write("x.jsonl", [GOOD, pair("c", "c")])
    first = load(path)
    entries = sorted(own_cache.iterdir())
    assert load(path) == first and first[1] and sorted(own_cache.iterdir()) == entries, "not made again"
    assert load(path, identical="keep")[1] != first[1], "another decision is another entry"
    clean = write("y.jsonl", [GOOD])
    with pytest.warns(UserWarning, match=r"x\.jsonl:2"):
        PreferenceData(train=clean, validation=path, tokenizer=TOKENIZER).setup("fit")


def test_clean_data_says_nothing_and_data_of_faults_alone_is_an_error(write: Any) -> None:
    assert load(write("x.jsonl", [GOOD]))[1] == []
    with pytest.raises(ValueError, match=r"no row is left .*data\.empty\): 1 row dropped .*:2\); .*identical\): 1 row"):
        load(write("y.jsonl", [pair("c", "c"), pair("", "b")]))


def test_a_pair_of_equal_answers_is_not_told_as_long_when_it_is_dropped(write: Any) -> None:
    path = write("x.jsonl", [GOOD, pair("c" * 50, "c" * 50)])
    assert load(path, max_length=20, overlong="error")[1] == [IDENTICAL + "1 row dropped (x.jsonl:2)"]
