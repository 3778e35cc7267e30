"""Numbers as people and models write them, read exactly.

    numbers("It costs $1,250.50, or 1/2 of that, or 12%")   # 2501/2, 1/2, 12 (percent)

Signs, thousands separators (1,234), decimals, exponents (1.5e3), fractions (3/4), mixed numbers (2 1/2), percent, and
their spelling in TeX (\\frac{3}{4}, 1{,}234, 50\\%). Values are exact fractions, so that 0.1 and 1/10 are equal.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

__all__ = ["Number", "boxed", "numbers"]

MAX_DIGITS = 300
"""A longer number, or a larger exponent, is read as one that equals nothing: exact arithmetic on it would take long."""

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][+-]?\d+)?"
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![A-Za-z0-9_)\]}}])[+-])?           # after a digit or a word it is a dash: 3-5, covid-19
    (?:[$€£¥]\s?)?
    (?<![A-Za-z0-9_])(?<!\d\.)                      # the 2 of H2O and the 3 of v1.2.3 are no numbers
    (?:(?P<whole>{_DIGITS})\ (?=\d+\ ?/\ ?\d))?        # 2 1/2
    (?P<number>{_DECIMAL})
    (?:\ ?/\ ?(?P<below>{_DECIMAL}))?
    (?P<percent>\ ?(?:%|percent\b|per\ cent\b))?
    """,
    re.VERBOSE,
)
_TEX = ((r"\%", "%"), (r"\$", "$"), ("{,}", ","), (r"\,", ""), (r"\!", ""), ("\N{MINUS SIGN}", "-"))
_PART = rf"(?:\s*\{{\s*([+-]?{_DECIMAL})\s*\}}|\s*(\d))"
_FRACTION = re.compile(rf"(\d?)\s*\\[dtc]?frac{_PART}{_PART}")


class Number(NamedTuple):
    """A number in a text.

    Args:
        value: exact; None when it cannot be held (a division by zero, more than 300 digits).
        percent: a sign or word for percent follows; 50% has the value 50.
    """

    value: Fraction | None
    percent: bool = False


def numbers(text: str) -> list[Number]:
    """All numbers in a text, in order."""
    for written, meant in _TEX:
        text = text.replace(written, meant)
    text = _FRACTION.sub(_plain_fraction, text)
    return [number for match in _NUMBER.finditer(text) for number in _read(match)]


def boxed(text: str) -> str | None:
    r"""The inside of the last \boxed{...} or \fbox{...} of a text, None when there is none that is closed."""
    last: tuple[int, int] | None = None
    opened: list[int | None] = []  # where the inside of each box that is open begins; None for any other brace
    for match in re.finditer(r"(\\(?:boxed|fbox)\s*)?\{|\}", text):
        if match.group() != "}":
            opened.append(match.end() if match[1] else None)
        elif opened and (start := opened.pop()) is not None and (last is None or start > last[0]):
            last = start, match.start()
    return text[slice(*last)] if last else None


def _plain_fraction(match: re.Match[str]) -> str:
    before, *parts = match.groups()
    above, below = (part for part in parts if part is not None)
    return f"{before} {above}/{below}" if before else f"{above}/{below}"  # 2\frac{1}{2} is a mixed number


def _read(match: re.Match[str]) -> list[Number]:
    sign = -1 if match["sign"] == "-" else 1
    percent = match["percent"] is not None
    value, below = _exact(match["number"]), None
    if match["below"] is not None:
        below = _exact(match["below"])
        value = value / below if value is not None and below else None
    if match["whole"] is None:
        return [Number(None if value is None else sign * value, percent)]
    whole = _exact(match["whole"])
    if whole is not None and value is not None and value < 1:
        return [Number(sign * (whole + value), percent)]
    return [Number(None if whole is None else sign * whole), Number(value, percent)]  # two numbers side by side


def _exact(text: str) -> Fraction | None:
    mantissa, _, exponent = text.lower().replace(",", "").partition("e")
    if len(mantissa) > MAX_DIGITS or len(exponent) > 4 or abs(int(exponent or 0)) > MAX_DIGITS:
        return None
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)
