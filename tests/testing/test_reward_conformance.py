"""The rewards' conformance kit finds what it is there to find, and nothing else: each defect fails one check alone."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import kit_runs
import pytest
import torch
from torch import Tensor, nn

from lit_palm.plugins import discover
from lit_palm.rollout.rewards import (
    Ensemble,
    ExactMatch,
    GSM8KAnswer,
    LengthPenalty,
    NumericMatch,
    PythonReward,
    RegexReward,
    RepetitionPenalty,
    Reward,
    RewardBatch,
    RewardModel,
)
from lit_palm.testing import RewardConformance
from lit_palm.testing.processes import Program

Factory = Callable[..., Reward]


failures = functools.partial(kit_runs.failures, kit=RewardConformance)


# ------------------------------------------------------------------------------------------ sound ones pass


def vowels(completions: list[str]) -> list[float]:
    return [float(sum(text.count(letter) for letter in "aeiou")) for text in completions]


class TestNumericMatch(RewardConformance):
    """As an author writes it."""

    columns: ClassVar[Any] = {"answer": 4}

    @pytest.fixture
    def reward(self) -> Factory:
        return NumericMatch


BUILT_IN: list[Any] = [
    functools.partial(RewardModel, "some.ckpt", batch_size=3),
    functools.partial(PythonReward, vowels),
    functools.partial(RegexReward, r"^#### \d+", match=0.5, name="format"),
    functools.partial(RegexReward, "o", max_count=3, over="text"),
    ExactMatch,
    functools.partial(ExactMatch, extract=r"#### (.*)", ignore_case=True),
    functools.partial(NumericMatch, after="####", relative=0.1),
    functools.partial(NumericMatch, boxed=True, percent="share", match=2),
    functools.partial(GSM8KAnswer, format_match=0.5),
    functools.partial(LengthPenalty, 10, min_length=3, cap=None),
    functools.partial(LengthPenalty, max_length=10, unit="character"),
    RepetitionPenalty,
    functools.partial(RepetitionPenalty, 2, "word", allowed=0.1),
    functools.partial(
        Ensemble,
        rewards=[
            functools.partial(RewardModel, checkpoint="a.ckpt", name="a"),
            functools.partial(RewardModel, checkpoint="b.ckpt", name="b", weight=0.5),
            functools.partial(RegexReward, pattern="answer"),
        ],
        combine="lower_bound",
        k=0.5,
    ),
]


def name_of(factory: Any) -> str:
    if isinstance(factory, functools.partial):
        return "-".join([factory.func.__name__, *factory.keywords])
    return factory.__name__


class TestBuiltIn(RewardConformance):
    columns: ClassVar[Any] = {"answer": ["4", "4", "4", "1/2", "no 0", "4%", "yes, 1", "on, 2"]}

    @pytest.fixture(params=BUILT_IN, ids=name_of)
    def reward(self, request: pytest.FixtureRequest) -> Factory:
        return request.param


# ------------------------------------------------------------------------------------------ planted defects


class Sound(Reward):
    """Number of spaces; what the defects are made from.

    Args:
        per_space: value of a space.
        weight: in the sum.
        name: in the logs.
    """

    API_VERSION = 1

    def __init__(self, per_space: float = 1.0, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        self.per_space = per_space

    def __call__(self, batch: RewardBatch) -> Sequence[float] | Tensor:
        return [self.per_space * text.count(" ") for text in batch.completions]


class OneShort(Sound):
    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [1.0 for _ in batch.completions[1:]]


class Infinite(Sound):
    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [float("inf") if " " in text else 0.0 for text in batch.completions]


class Squeezed(Sound):
    """Forgets that a batch may hold a single row."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> Tensor:
        return torch.tensor([[float(text.count(" "))] for text in batch.completions]).squeeze()


class ByLength(Sound):
    """Divides by the length of the text."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [text.count(" ") / len(text) for text in batch.completions]


class Latin(Sound):
    """Reads Latin letters only."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [float(len(text.encode("latin-1"))) for text in batch.completions]


class Centred(Sound):
    """Subtracts the mean of the batch."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> Tensor:
        counts = torch.tensor([float(text.count(" ")) for text in batch.completions])
        return counts - counts.mean()


class ByPlace(Sound):
    """Depends on the place in the batch."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [0.1 * place + text.count(" ") for place, text in enumerate(batch.completions)]


class Sorted(Sound):
    """Scores in the order of the length, as one does to save padding, and forgets to undo it."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [float(i) for i in sorted(range(len(batch)))]


class Remembering(Sound):
    """Subtracts the mean of everything it ever saw."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> list[float]:
        self.seen = [*getattr(self, "seen", [0.0]), 1.0]
        return [text.count(" ") - sum(self.seen) for text in batch.completions]


class Drawing(Sound):
    """Adds noise."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [text.count(" ") + random.random() for text in batch.completions]


class Stripping(Sound):
    """Strips the completions of everybody."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> list[float]:
        for i, text in enumerate(batch.completions):
            batch.completions[i] = text.strip(".!")
        return [float(text.count(" ")) for text in batch.completions]


class Filling(Sound):
    """Overwrites padding in place."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> Tensor:
        return batch.tokens.masked_fill_(~batch.mask, 0).ne(0).sum(1)


class Adding(Sound):
    """Leaves a column of its own behind."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> list[float]:
        batch.columns["spaces"] = [float(text.count(" ")) for text in batch.completions]
        return batch.columns["spaces"]


class Weighing(Sound):
    """Applies its weight itself."""

    API_VERSION = 1

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [self.weight * text.count(" ") for text in batch.completions]


class Unweighted(Sound):
    """Forgets its weight."""

    API_VERSION = 1

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(name=name)


class NoWeight(Sound):
    """Takes no weight."""

    API_VERSION = 1

    def __init__(self, per_space: float = 1.0, name: str | None = None) -> None:
        super().__init__(per_space, name=name)


class NoName(Sound):
    """Takes no name."""

    API_VERSION = 1

    def __init__(self, per_space: float = 1.0, weight: float = 1.0) -> None:
        super().__init__(per_space, weight)


class OwnName(Sound):
    """Has one name for ever."""

    API_VERSION = 1

    @property
    def name(self) -> str:
        return "mine"


class Undocumented(Sound):
    API_VERSION = 1

    def __init__(self, limit: int = 3, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight=weight, name=name)
        self.limit = limit


class Guessing(Sound):
    """An argument that YAML takes for something else.

    Args:
        wanted: a text.
    """

    API_VERSION = 1

    def __init__(self, wanted: int | str = 4, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight=weight, name=name)
        self.wanted = wanted

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [float(text == self.wanted) for text in batch.completions]


class Hiding(Guessing):
    """The same, and keeps the argument under another name: its values tell."""

    API_VERSION = 1

    def __init__(self, wanted: int | str = 4, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(wanted, weight, name)
        self.hidden = vars(self).pop("wanted")

    def __call__(self, batch: RewardBatch) -> list[float]:
        return [float(text == self.hidden) for text in batch.completions]


class Marked(Sound):
    """A string that may be null: YAML reads a leading # as a comment.

    Args:
        marker: a text.
    """

    API_VERSION = 1

    def __init__(self, marker: str | None = None, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight=weight, name=name)
        self.marker = marker


class Objects(Sound):
    """An argument that no YAML can hold.

    Args:
        table: numbers.
    """

    API_VERSION = 1

    def __init__(self, table: list[float] | None = None, weight: float = 1.0, name: str | None = None) -> None:
        super().__init__(weight=weight, name=name)


class NoVersion(Sound):
    API_VERSION = Reward.API_VERSION


class OldVersion(Sound):
    API_VERSION = 0


class Unnetworked(Sound):
    """Sound as well: scores with a network of its own, in double precision, that only `build` makes."""

    API_VERSION = 1

    def build(self, load: Any) -> nn.Module:
        return nn.ModuleDict({"trunk": load("any.ckpt", "reward")})

    def __call__(self, batch: RewardBatch) -> Tensor:
        assert isinstance(self.network, nn.ModuleDict)
        values = self.network["trunk"](batch.tokens)
        return values.gather(1, batch.mask.sum(1, keepdim=True) - 1)[:, 0].double()


VALUES, FOREIGN = "test_one_finite_number_for_each_completion", "test_survives_empty_and_foreign_text"
OTHERS, ORDER = "test_other_rows_have_no_influence", "test_order_has_no_influence"
TWICE, LEFT = "test_same_result_twice", "test_batch_is_left_as_it_was"
WEIGHT, NAME = "test_weight_is_applied_by_the_sum", "test_name_can_be_chosen"
DOCUMENTED, YAML = "test_arguments_are_documented", "test_yaml_round_trip"
VERSION, ENTRY = "test_states_its_api_version", "test_entry_point_leads_to_it"

DEFECTS: list[tuple[Any, str, str]] = [
    (OneShort, VALUES, "'one_short' returned 7 values; it must return 8 numbers"),
    (Infinite, VALUES, "returned inf for completion 0"),
    (Squeezed, VALUES, r"a tensor of shape []"),
    (ByLength, FOREIGN, "ZeroDivisionError: division by zero with the completion ''"),
    (Latin, FOREIGN, "UnicodeEncodeError"),
    (Centred, OTHERS, "in a batch of 8 and"),
    (ByPlace, ORDER, "as row 7 of a batch"),
    (Sorted, ORDER, "return the values in the order of the completions"),
    (Remembering, TWICE, "gives other values when it is called again"),
    (Drawing, TWICE, "gives other values when it is called again"),
    (Stripping, LEFT, "it changed batch.completions"),
    (Filling, LEFT, "it changed batch.tokens"),
    (Adding, LEFT, "it changed batch.columns"),
    (Weighing, WEIGHT, "the sum multiplies them, not the reward"),
    (Unweighted, WEIGHT, "it was given the weight -2 and has 1"),
    (NoWeight, WEIGHT, "NoWeight.__init__ takes no `weight`"),
    (NoName, NAME, "NoName.__init__ takes no `name`"),
    (OwnName, NAME, "and has 'mine'"),
    (Undocumented, DOCUMENTED, "limit of Undocumented is not documented"),
    (functools.partial(Guessing, wanted="4"), YAML, "Guessing.wanted is 4 instead of '4'"),
    (functools.partial(Hiding, wanted="4"), YAML, "Hiding gives other values: an argument has become another one"),
    (functools.partial(Marked, marker="#### "), YAML, "Marked.marker is None instead of '#### '"),
    (functools.partial(Objects, table=torch.ones(2)), YAML, "cannot be written as YAML and read back"),
    (NoVersion, VERSION, "must be a literal integer"),
    (OldVersion, VERSION, "it was written for API_VERSION 0 and this lit_palm has 1"),
]


def test_the_sound_ones_pass() -> None:
    for sound in (Sound, functools.partial(Sound, per_space=0.5, name="x"), Unnetworked):
        assert failures(sound) == {}


@pytest.mark.parametrize(("factory", "check", "words"), DEFECTS, ids=[name_of(d[0]) for d in DEFECTS])
def test_a_planted_defect_fails_one_check_alone(factory: Any, check: str, words: str) -> None:
    found = failures(factory)
    assert list(found) == [check]
    assert words in found[check]


def test_every_check_has_a_defect() -> None:
    checks = {name for name in dir(RewardConformance) if name.startswith("test_")}
    assert checks == {check for _, check, _ in DEFECTS} | {ENTRY}
    assert all(getattr(RewardConformance, name).__doc__ for name in checks)


def test_what_is_no_class_says_so() -> None:
    message = failures(lambda **_: Sound())[YAML]
    assert "neither a class nor a functools.partial of one" in message

    class Local(Sound):
        API_VERSION = 1

    assert "define the class at the top level of a module" in failures(Local)[YAML]


def test_a_missing_column_is_named() -> None:
    assert "has no column 'answer'" in failures(ExactMatch)[VALUES]


# ------------------------------------------------------------------------------------------ entry points

PLUGIN = """
from lit_palm.rollout.rewards import Reward
class Spaces(Reward):
    API_VERSION = 1
    def __call__(self, batch):
        return [float(text.count(" ")) for text in batch.completions]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """install(package, entry) -> the class Spaces of a distribution with this entry point; "" has none."""

    def install(package: str, entry: str, folder: str = "site") -> type:
        site = tmp_path / folder
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"{package}.py,,\n")
        (info / "entry_points.txt").write_text(f"[lit_palm.rewards]\n{entry}\n")
        (site / f"{package}.py").write_text(PLUGIN)
        monkeypatch.syspath_prepend(str(site))
        discover.cache_clear()
        return __import__(package).Spaces

    yield install
    monkeypatch.undo()
    discover.cache_clear()


def test_an_entry_point_has_the_name_of_its_class_and_there_is_one(install: Any) -> None:
    assert failures(install("spaces_right", "Spaces = spaces_right:Spaces")) == {}
    wrong = failures(install("spaces_wrong", "Space = spaces_wrong:Spaces"))
    assert (
        list(wrong) == [ENTRY] and "the entry point Space of spaces_wrong 1.0 leads to the class Spaces" in wrong[ENTRY]
    )
    none = install("spaces_none", "")
    assert "no entry point leads to Spaces of spaces_none" in failures(none)[ENTRY]
    assert failures(none, installed=False) == {}
    assert "no entry point leads to Sound" in failures(Sound, installed=True)[ENTRY]


def test_an_entry_point_that_two_distributions_bring_is_named(install: Any) -> None:
    install("spaces_first", "Spaces = spaces_first:Spaces")
    second = install("spaces_second", "Spaces = spaces_second:Spaces")
    found = failures(second)
    assert list(found) == [ENTRY] and "brought by both" in found[ENTRY]


def test_pytest_collects_it_and_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "spaces.py").write_text(PLUGIN)
    (tmp_path / "test_spaces.py").write_text(
        "import pytest\nfrom spaces import Spaces\nfrom lit_palm.testing import RewardConformance\n"
        "class TestSpaces(RewardConformance):\n    @pytest.fixture\n    def reward(self):\n        return Spaces\n"
        "class TestNothing(RewardConformance):\n    pass\n"
    )
    arguments = ["-q", "-p", "no:cacheprovider", "test_spaces.py"]
    done = Program("pytest", arguments, tmp_path / "log", folder=tmp_path).finish()
    assert re.search(r"11 passed, 1 skipped, .*12 errors", done.stdout), done.stdout + done.stderr
    assert "TestNothing has no fixture `reward`: define one" in done.stdout
