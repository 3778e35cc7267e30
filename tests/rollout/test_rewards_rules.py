"""Rewards by rule: patterns, exact answers, length and repetition, with values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_palm.rollout.rewards import ExactMatch, LengthPenalty, RegexReward, RepetitionPenalty, Reward, total_reward
from tests.rollout.reward_batches import texts, values

# ------------------------------------------------------------------------------------------ patterns


def test_a_pattern_is_found_anywhere_or_matches_the_whole() -> None:
    found = ["<b>x</b>", "say <b>y</b> now", "<b>no", ""]
    assert values(RegexReward(r"<b>.*</b>"), found) == [1, 1, 0, 0]
    assert values(RegexReward(r"<b>.*</b>", full=True), found) == [1, 0, 0, 0]
    assert values(RegexReward(r"<b>.*</b>", match=0.25, no_match=-2.0), found) == [0.25, 0.25, -2, -2]
    assert values(RegexReward(r"(?i)YES"), ["yes", "no"]) == [1, 0]
    assert values(RegexReward(r"a.b"), ["a\nb"]) == [0] and values(RegexReward(r"(?s)a.b"), ["a\nb"]) == [1]


def test_matches_are_counted_up_to_a_cap() -> None:
    found = ["", "a", "a b a", "aaaa"]
    assert values(RegexReward("a", max_count=3), found) == [0, 1, 2, 3]
    assert values(RegexReward("a", max_count=2, match=-0.5, no_match=0.1), found) == [0.1, -0.5, -1, -1]
    assert values(RegexReward("a"), found) == [0, 1, 1, 1]
    assert values(RegexReward("aa", max_count=9), ["aaaaa"]) == [2], "matches do not overlap"


def test_a_pattern_can_reach_into_the_prompt() -> None:
    prompts, completions = ["2 + 2 =", "say "], ["4", "= 4"]
    assert values(RegexReward("= ?4"), completions, prompts) == [0, 1]
    assert values(RegexReward("= ?4", over="text"), completions, prompts) == [1, 1]
    assert values(RegexReward("say = 4", over="text", full=True), completions, prompts) == [0, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "(a"}, r"pattern of RegexReward '\(a' is no regular expression: missing \), .* at character 0"),
        ({"pattern": "a", "max_count": 0}, "max_count of RegexReward is 0"),
        ({"pattern": "a", "max_count": 2, "full": True}, "with full=true"),
        ({"pattern": "a*", "max_count": 2}, "matches the empty text"),
        ({"pattern": "a", "match": math.inf}, "match of RegexReward is inf"),
        ({"pattern": "a", "no_match": math.nan}, "no_match of RegexReward is nan"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RegexReward(**options)


# ------------------------------------------------------------------------------------------ exact answers


def test_the_whole_completion_or_what_is_extracted_is_compared() -> None:
    right = ["Paris", "Rome", "7", "x"]
    given = [" Paris\n", "rome", "7", "X y"]
    assert values(ExactMatch(), given, answer=right) == [1, 0, 1, 0]
    assert values(ExactMatch(strip=False), given, answer=right) == [0, 0, 1, 0]
    assert values(ExactMatch(ignore_case=True), given, answer=right) == [1, 1, 1, 0]
    assert values(ExactMatch("city", match=2, no_match=-1), given, city=right) == [2, -1, 2, -1]
    said = ["so (A), or rather (B)", "(A)", "B", "(b)"]
    assert values(ExactMatch(extract=r"\(([A-D])\)"), said, answer=["B"] * 4) == [1, 0, 0, 0], "the last match counts"
    assert values(ExactMatch(extract=r"[A-D]"), said, answer=["B"] * 4) == [1, 0, 1, 0], "without a group: the match"
    assert values(ExactMatch(extract=r"is (\w+)|= (\w+)"), ["it is B", "= B"], answer=["B"] * 2) == [1, 1]


def test_an_answer_may_be_a_number_several_or_inside_a_solution() -> None:
    assert values(ExactMatch(), ["42", "1.5", "b", "c"], answer=[42, 1.5, ["a", "b"], ["a", "b"]]) == [1, 1, 1, 0]
    reward = ExactMatch(extract=r"#### (.*)", extract_answer=r"#### (.*)")
    assert values(reward, ["#### B", "#### C", "B"], answer=["as ... #### B"] * 3) == [1, 0, 0]
    with pytest.raises(ValueError, match=r"'exact_match' .* not found in the column 'answer' of prompt 1 .*'only B'"):
        values(reward, ["#### B"] * 2, answer=["#### B", "only B"])


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({}, r"has no column 'answer' .*beside the prompt: none\): set `answer`"),
        ({"solution": ["a"]}, r"has no column 'answer' .*beside the prompt: 'solution'\)"),
        ({"answer": [None]}, "column 'answer' of prompt 0 of the batch is None; it must hold a string, a number"),
        ({"answer": [True]}, "is True; it must hold"),
        ({"answer": [[]]}, r"is \[\]; it must hold"),
        ({"answer": [["a", {}]]}, "it must hold"),
    ],
)
def test_a_column_without_answers_is_named(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"reward 'exact_match' raised ValueError: .*{words}"):
        values(ExactMatch(), ["a"], **columns)


def test_patterns_of_answers_must_compile() -> None:
    with pytest.raises(ValueError, match="extract of ExactMatch '\\[' is no regular expression"):
        ExactMatch(extract="[")
    with pytest.raises(ValueError, match="extract_answer of ExactMatch '\\*' is no regular expression"):
        ExactMatch(extract_answer="*")


# ------------------------------------------------------------------------------------------ length


def test_length_costs_by_the_unit_outside_the_range() -> None:
    found = ["", "abc", "abcdef", "abcdefghij"]  # with EOS 1, 4, 7 and 11 tokens of a byte
    assert values(LengthPenalty(max_length=4), found) == [0, 0, -0.03, -0.07]
    assert values(LengthPenalty(max_length=4, min_length=3, penalty=0.5), found) == [-1, 0, -1, -1]
    assert values(LengthPenalty(max_length=4, min_length=3, penalty=0.5, cap=None), found) == [-1, 0, -1.5, -3.5]
    assert values(LengthPenalty(min_length=5, penalty=0.1, unit="character"), found) == [-0.5, -0.2, 0, 0]
    assert values(LengthPenalty(max_length=2, unit="character", penalty=1, cap=2.5), ["aé日"]) == [-1]


def test_length_counts_ids_as_sampled() -> None:
    batch = texts(["same text"] * 2)
    batch.completion_ids = [torch.arange(3), torch.arange(8)]
    assert list(LengthPenalty(max_length=3, penalty=1, cap=None)(batch)) == [0, -5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "set max_length, min_length or both"),
        ({"max_length": 3, "min_length": 4}, "min_length 4, max_length 3"),
        ({"min_length": -1}, "leaves no length"),
        ({"max_length": 3, "penalty": -1.0}, "negative weight rewards"),
        ({"max_length": 3, "cap": -1.0}, "must not be negative"),
        ({"max_length": 3, "penalty": math.nan}, "penalty of LengthPenalty is nan"),
    ],
)
def test_a_length_that_cannot_be_meant_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LengthPenalty(**options)


# ------------------------------------------------------------------------------------------ repetition


def test_repetition_is_the_share_of_n_grams_said_before() -> None:
    found = ["a b c d", "a b a b", "go go go go go", "one", ""]
    # bigrams of words: 3 of 3 new; ab ba ab: 1 of 3 old; 3 of 4 old; none; none
    assert values(RepetitionPenalty(2, "word"), found) == [0, -0.333333, -0.75, 0, 0]
    assert values(RepetitionPenalty(2, "word", penalty=2, allowed=0.5), found) == [0, 0, -0.5, 0, 0]
    assert values(RepetitionPenalty(1, "word"), ["Go go now"]) == [-0.333333], "without case"
    # bytes with EOS: aaaa$ has trigrams aaa aaa aa$
    assert values(RepetitionPenalty(), ["aaaa"]) == [-0.333333]


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_repetition_counts_every_n_gram_seen_before(ids: list[int], n: int) -> None:
    batch = texts(["x"])
    batch.completion_ids = [torch.tensor(ids, dtype=torch.long)]
    seen: list[list[int]] = []
    again = 0
    for start in range(len(ids) - n + 1):
        gram = ids[start : start + n]
        again += gram in seen
        seen.append(gram)
    expected = -again / len(seen) if seen else 0.0
    assert RepetitionPenalty(n)(batch)[0] == pytest.approx(expected, abs=1e-12)  # two ways to divide in float64


@pytest.mark.parametrize("options", [{"n": 0}, {"penalty": -1.0}, {"allowed": 1.0}, {"allowed": -0.1}])
def test_a_repetition_that_cannot_be_meant_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} of RepetitionPenalty is"):
        RepetitionPenalty(**options)


# ------------------------------------------------------------------------------------------ together


def test_rules_add_up_with_their_weights() -> None:
    rewards: list[Reward] = [
        ExactMatch(extract=r"\d+", weight=2.0),
        RegexReward("please", match=0.5, name="polite"),
        RegexReward("damn", match=-1.0, max_count=5, name="rude", weight=0.1),
        LengthPenalty(max_length=10, unit="character", penalty=0.1, weight=3.0),
    ]
    batch = texts(["7, please", "damn damn 8", "the answer is 7"], answer=[7, 7, 7])
    total, found = total_reward(rewards, batch)
    # 2 * 1 + .5;  .1 * -2 + 3 * -.1;  2 * 1 + 3 * -.5
    assert total.tolist() == pytest.approx([2.5, -0.5, 0.5], abs=1e-6)  # float32
    assert list(found) == ["exact_match", "polite", "rude", "length_penalty"]
    with pytest.raises(ValueError, match="two rewards are called 'regex_reward'"):
        total_reward([RegexReward("a"), RegexReward("b")], batch)
