"""UltraFeedback: four rated answers as a ranking, and the binarised pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_palm.data import PreferenceData
from lit_palm.data.readers import UltraFeedback, UltraFeedbackBinarized
from tests.data.readers.published import binarized, columns, read, said, ultrafeedback

RATINGS = [["2", "3", "3", "3"], ["5", "5", "5", "5"], ["3", "3", "3", "2"], ["1", "N/A", "1", "1"]]


def test_answers_are_ranked_by_the_mean_of_their_aspects_with_ties(write: Any) -> None:
    path = write("x.jsonl", [ultrafeedback(RATINGS)])
    answers = [f"answer {i}" for i in range(4)]
    ranking = {"prompt": said("Say it."), "completions": answers, "ranks": [1, 0, 1, 2]}
    assert columns(UltraFeedback(), "preferences", path) == [ranking]
    assert columns(UltraFeedback(aspects=["helpfulness"]), "preferences", path)[0]["ranks"] == [1, 0, 2, 3]
    assert columns(UltraFeedback(), "demonstrations", path) == [{"messages": said("Say it.", "answer 1")}]


def test_the_overall_score_ranks_where_it_is_asked_for(write: Any) -> None:
    path = write("x.jsonl", [ultrafeedback(RATINGS, [7.0, 6.5, float("nan"), 7])])
    (row,) = columns(UltraFeedback(score="overall"), "preferences", path)
    assert row["completions"] == ["answer 0", "answer 1", "answer 3"] and row["ranks"] == [0, 1, 0]


def test_rankings_that_say_nothing_are_left_out(write: Any) -> None:
    unrated = [["N/A"] * 4, ["N/A"] * 4]
    same = [["3"] * 4, ["3"] * 4]
    rows = [ultrafeedback(same), ultrafeedback(unrated), ultrafeedback(RATINGS, source="truthful_qa")]
    path = write("x.jsonl", [*rows, ultrafeedback(RATINGS)])
    kept, left_out = read(UltraFeedback(without=["truthful_qa"]), "preferences", path)
    assert len(kept) == 1
    assert left_out == [
        "all answers have the same score: 1 row left out (x:1)",
        "fewer than two answers have a score: 1 row left out (x:2)",
        "the source is truthful_qa (data.reader.without): 1 row left out (x:3)",
    ]
    prompts, left_out = read(UltraFeedback(), "prompts", path)
    assert prompts[0].columns == {
        "prompt": said("Say it."), "correct_answers": ["None"], "incorrect_answers": ["None"], "source": "sharegpt"
    }  # fmt: skip
    assert left_out == ["the prompt occurred before: 3 rows left out (x:2, 3, 4)"]


def test_parquet_of_the_hub_reads_alike_and_names_rows(tmp_path: Path) -> None:
    path = str(tmp_path / "train.parquet")
    pq.write_table(pa.Table.from_pylist([ultrafeedback(RATINGS)] * 2), path)
    assert columns(UltraFeedback(), "preferences", path)[1]["ranks"] == [1, 0, 1, 2]
    pq.write_table(pa.Table.from_pylist([ultrafeedback(RATINGS), ultrafeedback([["good"] * 4] * 2)]), path)
    words = (
        r"train\.parquet, row 2: the key 'completions\[0\]\.annotations\.instruction_following\.Rating' is 'good', no"
    )
    with pytest.raises(ValueError, match=words):
        read(UltraFeedback(), "preferences", path)


def test_a_key_that_is_missing_is_named_from_the_outside_in(write: Any) -> None:
    row = ultrafeedback(RATINGS)
    del row["completions"][2]["annotations"]["honesty"]
    words = (
        r"x\.jsonl:1: the key 'completions\[2\]\.annotations\.honesty\.Rating' is missing \(the keys there are"
        r" 'instruction_following', 'truthfulness', 'helpfulness'\)"
    )
    path = write("x.jsonl", [row])
    with pytest.raises(ValueError, match=words):
        read(UltraFeedback(), "preferences", path)
    with pytest.raises(ValueError, match=r"aspects is .*'beauty'.*; name some of instruction_following, honesty"):
        UltraFeedback(aspects=["beauty"])


def test_binarized_pairs_have_a_margin_and_no_ties(write: Any) -> None:
    rows = [binarized("yes", "no"), binarized("a", "b", (5.0, 5.0)), binarized("c", "d", (5.0, 4.5))]
    path = write("x.jsonl", rows)
    kept, left_out = read(UltraFeedbackBinarized(min_margin=1), "preferences", path)
    assert [row.columns for row in kept] == [
        {"chosen": said("Say it.", "yes"), "rejected": said("Say it.", "no"), "margin": 2.5}
    ]
    assert left_out == [
        "both answers have the same score: 1 row left out (x:2)",
        "the scores differ by less than 1 (data.reader.min_margin): 1 row left out (x:3)",
    ]
    assert columns(UltraFeedbackBinarized(), "demonstrations", path)[0] == {"messages": said("Say it.", "yes")}
    assert len(read(UltraFeedbackBinarized(), "prompts", path)[0]) == 1
    data = PreferenceData(train=path, reader=UltraFeedbackBinarized(), tokenizer="bytes", shuffle=False)
    with pytest.warns(UserWarning, match="UltraFeedbackBinarized left rows out of train\n  both answers have the same"):
        data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch["margin"].tolist() == [2.5, 2.5, 0.5, 0.5] and batch["rank"].tolist() == [0, 1, 0, 1]
    answers = [data.tokenizer.decode(t[m].tolist()) for t, m in zip(batch.tokens, batch.loss_mask, strict=True)]
    assert answers == ["yes", "no", "c", "d"], "the prompt that chosen and rejected repeat is no part of the answer"


def test_the_splits_of_the_binarized_pairs_depend_on_the_view() -> None:
    reader = UltraFeedbackBinarized()
    assert reader.splits("preferences") == {"train": "train_prefs", "validation": "test_prefs", "test": "test_prefs"}
    assert reader.splits("demonstrations")["train"] == "train_sft" and reader.splits("prompts")["test"] == "test_gen"
    with pytest.raises(ValueError, match="min_margin is -1"):
        UltraFeedbackBinarized(-1)
