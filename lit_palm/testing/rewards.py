"""`RewardConformance`: everything that a reward must keep to, as a class of tests to inherit.

    class TestMyReward(RewardConformance):
        columns = {"answer": "4"}              # columns of the prompt data that it reads

        @pytest.fixture
        def reward(self):
            return MyReward                    # a class, or functools.partial(MyReward, limit=3)

Rewards that score with a network get a tiny one from `build`, whatever checkpoint they name. Every check takes a fresh
reward, and what is wrong with one thing alone fails one check alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import docstring_parser
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lit_palm.rollout.rewards import Reward, RewardBatch, total_reward
from lit_palm.testing.compare import nested_alike
from lit_palm.testing.entries import (
    as_yaml,
    check_api_version,
    check_entry_point,
    class_path,
    is_plain,
    parameters,
    plain,
    read_yaml,
)
from lit_palm.testing.reward_subject import GROUP, RewardSubject, class_and_arguments

__all__ = ["RewardConformance"]

Factory = Callable[..., Reward]

# float32 networks round otherwise when the other rows, and so the padding, change; measured: up to 1e-6
SAME = 1e-4


class RewardConformance(RewardSubject):
    """What must hold so that a reward can be trained on, configured and found. Under a second without networks."""

    # ------------------------------------------------------------------ values

    def test_one_finite_number_for_each_completion(self, reward: Factory) -> None:
        """It gives one finite number for each completion, for many and for one.

        When it fails, a run stops at the first collection with this message.
        """
        for rows in (self.all_rows(), [0]):
            self.checked(reward, self.batch(rows))

    def test_survives_empty_and_foreign_text(self, reward: Factory) -> None:
        """Completions without text, of white space, in any script and with control characters are scored as well.

        When it fails, a policy that writes such a thing ends the run: it will, early in training.
        """
        self.score(reward, self.all_rows())
        for text in FOREIGN:
            self.checked(reward, self.batch([0, 1], [text, self.completions[1]]), f" with the completion {text!r}")

    def test_other_rows_have_no_influence(self, reward: Factory) -> None:
        """A completion's value is the same whatever other completions are scored with it.

        When it fails, values depend on the batch size and on the number of processes. What compares completions with
        each other, such as a baseline, belongs into an objective's `prepare`.
        """
        rows = self.all_rows()
        whole, half = self.steady(reward, rows), self.score(reward, rows[: len(rows) // 2])
        for row in range(len(half)):
            assert close(whole[row], half[row]), (
                f"the completion {self.completions[row]!r} is worth {whole[row].item():.6g} in a batch of {len(rows)} "
                f"and {half[row].item():.6g} in one of {len(half)}: a reward must look at each row alone"
            )

    def test_order_has_no_influence(self, reward: Factory) -> None:
        """A completion's value is the same wherever it stands in the batch.

        When it fails, a value is looked up by the place in the batch, or given to another completion.
        """
        rows = self.all_rows()
        order = [*reversed(rows[1:]), rows[0]]
        straight, other = self.steady(reward, rows), self.score(reward, order)
        for place, row in enumerate(order):
            assert close(straight[row], other[place]), (
                f"the completion {self.completions[row]!r} is worth {straight[row].item():.6g} as row {row} of a batch "
                f"and {other[place].item():.6g} as row {place}: return the values in the order of the completions"
            )

    def test_same_result_twice(self, reward: Factory) -> None:
        """The same reward gives the same values for the same completions again, to the last bit.

        When it fails, a run cannot be repeated or resumed: a reward must neither remember nor draw numbers.
        """
        made = self.make(reward)
        first = self.score(made, self.all_rows())
        assert torch.equal(first, self.score(made, self.all_rows())), (
            f"{made.name} gives other values when it is called again: what changes from call to call (a running mean, "
            "random numbers) cannot be resumed; an objective's `prepare` with `state_dict` can"
        )

    def test_batch_is_left_as_it_was(self, reward: Factory) -> None:
        """It changes nothing in the batch, which other rewards and the training itself still read."""
        batch = self.batch(self.all_rows())
        before = copy.deepcopy(vars(batch))
        self.score(reward, batch)
        for name, value in before.items():
            assert nested_alike(value, vars(batch)[name], 0), (
                f"it changed batch.{name}, which others still read: work on a copy"
            )

    # ------------------------------------------------------------------ weight and name

    def test_weight_is_applied_by_the_sum(self, reward: Factory) -> None:
        """It takes a `weight`, leaves its values as they are, and the sum multiplies them by it.

        When it fails, `weight` in YAML does nothing, or counts twice.
        """
        self.score(reward, self.all_rows())
        one, two = self.option(reward, weight=1.0), self.option(reward, weight=-2.0)
        assert two.weight == -2.0, f"it was given the weight -2 and has {two.weight}: hand it to super().__init__"
        plain, total, own = self.steady(one, self.all_rows()), *self.checked(two, self.batch(self.all_rows()))
        assert close(own, plain), "with another weight it returns other values: the sum multiplies them, not the reward"
        assert close(total, -2.0 * plain), "the sum is not its values times its weight"

    def test_name_can_be_chosen(self, reward: Factory) -> None:
        """It takes a `name` and is logged under it; otherwise two of its kind could not be in one run."""
        name = self.option(reward, name="another_name").name
        assert name == "another_name", f"it was given the name another_name and has {name!r}: pass it to the base class"

    # ------------------------------------------------------------------ what a user of the command line meets

    def test_arguments_are_documented(self, reward: Factory) -> None:
        """Every constructor argument has a line under `Args:` in the docstring of the class.

        When it fails, `lit-palm plugins show` and `--help` are silent about it.
        """
        cls, _ = class_and_arguments(reward)
        bases = [base for base in cls.__mro__ if base is not object]
        documented = {p.arg_name for base in bases for p in docstring_parser.parse_from_object(base).params}
        missing = [name for name in parameters(cls) if name not in documented]
        assert not missing, f"{', '.join(missing)} of {cls.__name__} is not documented: describe it under `Args:`"

    def test_yaml_round_trip(self, reward: Factory) -> None:
        """Written under model.rewards in YAML and read back, it has the same arguments and gives the same values.

        When it fails, a saved configuration does not repeat its run: mind the types of the arguments.
        """
        cls, arguments = class_and_arguments(reward)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--rewards", type=list[Reward])
        given = {"class_path": class_path(cls), "init_args": {k: as_config(v) for k, v in arguments.items()}}
        try:
            (made,) = read_yaml(parser, as_yaml(parser, parser.parse_object({"rewards": [given]}))).rewards
        except Exception as error:
            raise AssertionError(
                f"{cls.__name__} with {arguments} cannot be written as YAML and read back: give every argument the "
                f"type of its values, and use plain values ({error})"
            ) from error
        original = self.make(reward)
        for name, value in vars(original).items():
            if name in parameters(cls) and is_plain(value):
                found = getattr(made, name, None)
                assert same(plain(found), plain(value)), (
                    f"read back from YAML, {cls.__name__}.{name} is {found!r} instead of {value!r}: annotate the "
                    "argument with the type it is used as"
                )
        assert close(self.score(made, self.all_rows()), self.steady(reward, self.all_rows())), (
            f"read back from YAML, {cls.__name__} gives other values: an argument has become another one"
        )

    def test_states_its_api_version(self, reward: Factory) -> None:
        """The class states, as a literal, the version of the interface that it was written for.

        When it fails, no later lit_palm could tell that the class is out of date: write `API_VERSION = 1`.
        """
        check_api_version(GROUP, class_and_arguments(reward)[0])

    def test_entry_point_leads_to_it(self, reward: Factory) -> None:
        """An installed class is found by its own name through the entry points of its distribution.

        When it fails, `class_path: NAME` does not find it: mind the name in pyproject.toml, and reinstall.
        """
        check_entry_point(GROUP, class_and_arguments(reward)[0], self.installed)

    # ------------------------------------------------------------------ how they score

    def checked(self, reward: Factory | Reward, batch: RewardBatch, when: str = "") -> tuple[Tensor, Tensor]:
        """The weighted sum and the values [B], or a failure with the reason."""
        made = self.make(reward)
        try:
            total, values = total_reward([made], batch)
        except ValueError as error:
            raise AssertionError(f"{error}{when}") from error
        return total, values[made.name]

    def score(self, reward: Factory | Reward, rows: Sequence[int] | RewardBatch) -> Tensor:
        """The values [B] of a fresh reward; skips the check when there are none, which another check is about."""
        batch = rows if isinstance(rows, RewardBatch) else self.batch(rows)
        try:
            return self.checked(reward, batch)[1]
        except AssertionError as error:
            pytest.skip(f"there are no values to look at: {error}")

    def steady(self, reward: Factory | Reward, rows: Sequence[int]) -> Tensor:
        """The same; skips when values change from call to call, which another check is about."""
        made = self.make(reward)
        first = self.score(made, rows)
        if not close(first, self.score(made, rows)):
            pytest.skip("it gives other values each time: see test_same_result_twice")
        return first

    def option(self, reward: Factory, **argument: Any) -> Reward:
        """A fresh reward with one more constructor argument."""
        (name,) = argument
        cls, _ = class_and_arguments(reward)
        assert name in parameters(cls), (
            f"{cls.__name__}.__init__ takes no `{name}`, so that YAML cannot set it: take it and hand it to "
            "super().__init__(weight, name)"
        )
        return self.make(functools.partial(reward, **argument))


FOREIGN = (
    "",
    " ",
    "\n\n",
    "\t\r\n",
    "日本語の答え",
    "\U0001f642\U0001f3fd",
    "e\u0301",
    "\u202eabc",
    "\x00",
    "\ufffd",
    "4" * 40,
)
"""Nothing, white space, another script, a picture, marks that combine or turn around, control characters, a number."""


def close(one: Tensor, other: Tensor) -> bool:
    """Equal up to rounding."""
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=SAME, atol=SAME)


def same(one: Any, other: Any) -> bool:
    """Equal, and of one type: "7" and 7 are not, 1 and 1.0 are."""
    numbers = not isinstance(one, bool) and not isinstance(other, bool)
    alike = type(one) is type(other) or (numbers and isinstance(one, int | float) and isinstance(other, int | float))
    return alike and one == other


def as_config(value: Any) -> Any:
    """An argument as YAML says it: rewards by class_path and init_args, classes and functions by their dotted name."""
    if isinstance(value, list | tuple):
        return [as_config(v) for v in value]
    if isinstance(value, functools.partial):
        cls, arguments = class_and_arguments(value)
        return {"class_path": class_path(cls), "init_args": {k: as_config(v) for k, v in arguments.items()}}
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return value
