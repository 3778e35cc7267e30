"""GSM8KAnswer: the published check to the letter, and the tolerant one by value."""

from __future__ import annotations

import random
import re

import pytest

from lit_palm.rollout.rewards import GSM8KAnswer
from tests.rollout.reward_batches import values

SOLUTION = "She has 48/2 = <<48/2=24>>24 clips.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"


# the check as openai/grade-school-math states it (dataset.py), restated here to compare with
def published(text: str) -> str:
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    return match.group(1).strip().replace(",", "") if match else "[invalid]"


def test_the_published_check_is_that_of_the_dataset() -> None:
    """2,000 texts from the pieces that the two could read differently, each against one of the answers."""
    draw = random.Random(0)
    pieces = ["####", "#### ", " ", "18", "-18", "1,800", "1800", "18.00", "18.", "$", "%", ",", ".", "x", "\n", "#"]
    completions = ["".join(draw.choices(pieces, k=draw.randint(1, 8))) for _ in range(2000)]
    answers = [f"work\n#### {draw.choice(['18', '-18', '1,800', '18.00'])}" for _ in completions]
    expected = [float(published(c) == published(a)) for c, a in zip(completions, answers, strict=True)]
    assert 20 < sum(expected) < 1900, "both outcomes occur"
    assert values(GSM8KAnswer(check="published"), completions, answer=answers) == expected


def test_the_published_check_takes_a_bare_number_for_the_answer() -> None:
    completions = ["#### 1,800", "1800", "#### 1800.0", "#### -1800"]
    assert values(GSM8KAnswer(check="published"), completions, answer=["1800"] * 4) == [1, 0, 0, 0]
    assert values(GSM8KAnswer(check="published"), completions, answer=[1800] * 4) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("#### 72", True),
        ("so 72 it is", True),
        ("$72", True),
        ("72.00", True),
        ("#### $72.0", True),
        ("####72 of 5", True),
        ("#### 71\n#### 72", True),  # the last one counts
        ("#### 72\n#### 71", False),
        ("72 is the sum of 48 and 24", False),  # the last number is 24
        (r"\boxed{72}, that is 6 dozen", True),
        (r"\boxed{71}, or rather 72", False),
        (r"\boxed{71} #### 72", True),  # the marker before the box
        ("#### none, but 72", True),
        ("#### unknown", False),
        ("72%", True),
        ("7,2", False),
        ("", False),
        ("seventy-two", False),
    ],
)
def test_the_tolerant_check_reads_what_people_and_models_write(completion: str, right: bool) -> None:
    for answer in ("72", SOLUTION, 72, 72.0):
        assert values(GSM8KAnswer(), [completion], answer=[answer]) == [float(right)]


def test_thousands_and_zeros_make_no_difference_to_the_tolerant_check() -> None:
    completions = ["1,000", "#### 1000.0", "it costs $1,000.00.", "1000%", "10,00", "1e3"]
    assert values(GSM8KAnswer(), completions, answer=["#### 1,000"] * 6) == [1, 1, 1, 1, 0, 1]


def test_the_format_is_worth_something_of_its_own() -> None:
    reward = GSM8KAnswer(match=2, no_match=-1, format_match=0.5)
    assert values(reward, ["#### 3", "3", "#### 4", "4"], answer=["3"] * 4) == [2.5, 2, -0.5, -1]


def test_a_column_without_a_number_is_refused_by_name() -> None:
    for check in ("tolerant", "published"):
        with pytest.raises(ValueError, match=r"the column 'answer' of prompt 1 of the batch is 'none'.* no number"):
            values(GSM8KAnswer(check=check), ["1", "2"], answer=["1", "none"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no column 'answer'"):
        values(GSM8KAnswer(), ["1"])
