"""NumericMatch: how numbers are read, where they are looked for, and when two are equal."""

from __future__ import annotations

import math
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_palm.rollout.rewards import NumericMatch
from lit_palm.rollout.rewards.reading import boxed, numbers
from tests.rollout.reward_batches import values

READ: dict[str, list[Any]] = {
    "": [],
    "no number": [],
    "It costs $1,250.50.": [Fraction(2501, 2)],
    "3-5": [3, 5],
    "-7 and +8": [-7, 8],
    "x=-4.": [-4],
    "-$5": [-5],
    "\N{MINUS SIGN}5": [-5],
    "f(2)-5": [2, 5],
    "covid-19": [19],
    "H2O, v1.2.3, x_1": [],
    "so...42": [42],
    ".5": [Fraction(1, 2)],
    "1e3 and 2.5E-1": [1000, Fraction(1, 4)],
    "1,2,3": [1, 2, 3],
    "10,2000": [10, 2000],
    "1,234,567": [1234567],
    "1/2": [Fraction(1, 2)],
    "-3 / 4": [Fraction(-3, 4)],
    "2 1/2 cups": [Fraction(5, 2)],
    "-2 1/2": [Fraction(-5, 2)],
    "page 12 13/2": [12, Fraction(13, 2)],
    "5\n1/2": [5, Fraction(1, 2)],
    "3/0": [None],
    "1e999": [None],
    "9" * 400: [None],
    r"\frac{1}{2}": [Fraction(1, 2)],
    r"-\dfrac{3}{4}": [Fraction(-3, 4)],
    r"\frac12": [Fraction(1, 2)],
    r"2\frac{1}{2}": [Fraction(5, 2)],
    r"\frac{-1}{2}": [Fraction(-1, 2)],
    r"1{,}234 and 1\,234": [1234, 1234],
    "答案是42。": [42],
}


@pytest.mark.parametrize("text", READ)
def test_numbers_as_people_write_them(text: str) -> None:
    assert [number.value for number in numbers(text)] == READ[text]


def test_percent_is_noticed() -> None:
    assert [(n.value, n.percent) for n in numbers(r"5%, 6 percent, 7\% of 8 per centuries")] == [
        (5, True), (6, True), (7, True), (8, False),
    ]  # fmt: skip


def test_the_last_closed_box() -> None:
    assert boxed(r"\boxed{1} then \boxed{x^{2}}") == "x^{2}"
    assert boxed(r"\boxed{1} then \boxed{2") == "1"
    assert boxed(r"\boxed{a \boxed{3} b}") == "3"
    assert boxed(r"\fbox {7}") == "7" and boxed("}{") is None and boxed("") is None


@given(
    st.integers(-(10**30), 10**30), st.sampled_from(["{}", "{:,}", "is {}.", "({})", "${:,} or so", "n = {} apples"])
)
def test_whole_numbers_are_read_back(number: int, form: str) -> None:
    if "$" in form:
        number = abs(number)
    (found,) = numbers(form.format(number))
    assert found == (number, False)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_decimals_are_read_back_with_and_without_separators(number: Any) -> None:
    assert numbers(f"{number:f}") == numbers(f"{number:,f}") == [(Fraction(number), False)]


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_are_read_back_also_as_tex(above: int, below: int) -> None:
    for text in (f"{above}/{below}", f"{above} / {below}", rf"\frac{{{above}}}{{{below}}}", f"so {above}/{below}%"):
        assert numbers(text)[-1].value == Fraction(above, below)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e250, max_value=1e250))
def test_a_float_equals_its_own_spelling(number: float) -> None:
    if number == 0 or abs(number) > 1e-250:  # smaller ones have longer exponents than are read
        assert values(NumericMatch(), [f"= {number!r}"], answer=[number]) == [1]


@given(st.text(max_size=40))
def test_any_text_is_read(text: str) -> None:
    numbers(text)
    boxed(text)


@pytest.mark.parametrize("text", ["1", "1,", "1 ", "1/", "1,111", "1 1/1 ", "-", ".", "1.", r"\frac{1}", r"\boxed{"])
def test_long_nonsense_is_read_in_linear_time(text: str) -> None:
    start = time.process_time()
    long = text * (20_000 // len(text))
    numbers(long)
    boxed(long)
    assert time.process_time() - start < 2, "hours, were it quadratic in the worst of them; a tenth of a second it is"


# ------------------------------------------------------------------------------------------ where it is looked for


def test_the_last_number_is_compared() -> None:
    given = ["2 + 2 = 4", "4", "It is 4.0, of course.", "4 or 5", "four", ""]
    assert values(NumericMatch(), given, answer=[4] * 6) == [1, 1, 1, 0, 0, 0]
    assert values(NumericMatch("n", match=3, no_match=-1), given, n=["4"] * 6) == [3, 3, 3, -1, -1, -1]


def test_a_marker_as_in_gsm8k() -> None:
    given = ["5 + 3 = 8\n#### 8", "#### 8 apples, 2 each", "8", "#### 7\n#### 8", "#### none", "####"]
    answer = ["He has 5 + 3 = 8.\n#### 8"] * 6
    assert values(NumericMatch(after="####"), given, answer=answer) == [1, 1, 0, 1, 0, 0]
    assert values(NumericMatch(after="####"), given, answer=[8] * 6) == [1, 1, 0, 1, 0, 0]


def test_a_box_and_a_pattern() -> None:
    given = [r"so \boxed{\frac{1}{2}} of 9", "1/2", r"\boxed{x = 0.5}"]
    assert values(NumericMatch(boxed=True), given, answer=["1/2", 0.5, r"we see \boxed{0.50}."]) == [1, 0, 1]
    reward = NumericMatch(extract=r"<answer>(.*?)</answer>")
    assert values(reward, ["3 <answer>4</answer> 5", "4", "<answer></answer>"], answer=[4] * 3) == [1, 0, 0]


def test_several_right_answers_and_numbers_inside_words() -> None:
    assert values(NumericMatch(), ["-2", "2", "3"], answer=[[2, -2]] * 3) == [1, 1, 0]
    assert values(NumericMatch(), ["1200", "0.1"], answer=["$1,200 in all", 0.1]) == [1, 1]


def test_percent_as_told() -> None:
    given, answer = ["50%", "50%", "0.5", "50", "50%"], [50, 0.5, "50%", "50%", "50 percent"]
    assert values(NumericMatch(), given, answer=answer) == [1, 1, 1, 1, 1]
    assert values(NumericMatch(percent="number"), given, answer=answer) == [1, 0, 0, 1, 1]
    assert values(NumericMatch(percent="share"), given, answer=answer) == [0, 1, 1, 0, 1]


def test_tolerance_is_absolute_or_relative_to_the_answer() -> None:
    given = ["100", "100.1", "101", "-100"]
    assert values(NumericMatch(), given, answer=[100] * 4) == [1, 0, 0, 0]
    assert values(NumericMatch(absolute=0.1), given, answer=[100] * 4) == [1, 1, 0, 0]
    assert values(NumericMatch(relative=0.01), given, answer=[100] * 4) == [1, 1, 1, 0]
    assert values(NumericMatch(relative=0.01), ["0.333", "0.32"], answer=["1/3"] * 2) == [1, 0]
    assert values(NumericMatch(relative=0.5), ["0.1"], answer=[0]) == [0], "relative to zero is nothing"
    assert values(NumericMatch(), ["1000000000000000001"], answer=[10**18]) == [0], "exact, not as floats"


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"solution": ["1"]}, r"has no column 'answer' .*'solution'\): set `answer`"),
        ({"answer": ["none"]}, "column 'answer' of prompt 0 of the batch is 'none', in which there is no number"),
        ({"answer": [math.nan]}, "is 'nan', in which there is no number"),
        ({"answer": ["1/0"]}, "in which there is no number"),
        ({"answer": [None]}, "is None; it must hold"),
    ],
)
def test_a_column_without_numbers_is_named(columns: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"reward 'numeric_match' raised ValueError: .*{words}"):
        values(NumericMatch(), ["1"], **columns)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"absolute": -1.0}, "must not be negative"),
        ({"relative": math.nan}, "relative of NumericMatch is nan"),
        ({"after": "#", "boxed": True}, "set one of extract, after and boxed"),
        ({"extract": "("}, "extract of NumericMatch"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NumericMatch(**options)
