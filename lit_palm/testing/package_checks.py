"""Checks of what a user of the command line meets: arguments, their help, YAML, the entry point and API_VERSION."""

from __future__ import annotations

import inspect
import typing
from typing import get_args

import docstring_parser
from jsonargparse import ArgumentParser

from lit_palm.objectives.base import Kind, Need, Objective
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
from lit_palm.testing.subject import GROUP, Factory, Subject, class_and_arguments

__all__ = ["PackageChecks"]


class PackageChecks(Subject):
    """What must hold so that a class can be named, configured and found."""

    def test_arguments_are_typed_and_documented(self, objective: Factory) -> None:
        """Every constructor argument has a type, and a line under `Args:` in the docstring of the class.

        When it fails, `--model.objective.help` is silent about it, or YAML accepts anything for it.
        """
        cls, _ = class_and_arguments(objective)
        documented = {
            p.arg_name
            for base in cls.__mro__
            if base is not object
            for p in docstring_parser.parse_from_object(base).params
        }
        for name, (parameter, owner) in parameters(cls).items():
            where = f"{owner.__name__}.__init__ argument {name!r}"
            assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.POSITIONAL_ONLY), (
                f"{where} has no name that YAML could use: make it a keyword"
            )
            assert parameter.annotation is not inspect.Parameter.empty, (
                f"{where} has no type: annotate it, so that a wrong value is refused with its name"
            )
            assert name in documented, f"{where} is not documented: describe it under `Args:` in the class docstring"
        for owner in {owner for _, owner in parameters(cls).values()}:
            try:
                typing.get_type_hints(vars(owner)["__init__"])
            except NameError as error:
                raise AssertionError(
                    f"a type in the signature of {owner.__name__}.__init__ cannot be resolved ({error}): import it at "
                    "the top of the module, not under TYPE_CHECKING"
                ) from error

    def test_yaml_round_trip(self, objective: Factory) -> None:
        """Written as YAML and read back it is the same objective with the same arguments.

        When it fails, a saved configuration does not repeat its run: mind the types of the arguments.
        """
        cls, arguments = class_and_arguments(objective)
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--objective", type=Objective)
        given = {"class_path": class_path(cls), "init_args": arguments}
        try:
            first = as_yaml(parser, parser.parse_object({"objective": given}))
            second = as_yaml(parser, parser.parse_string(first))
            made = read_yaml(parser, first).objective
        except Exception as error:
            raise AssertionError(
                f"{cls.__name__} with {arguments} cannot be written as YAML and read back: give arguments the types of "
                f"their values, and use plain values ({error})"
            ) from error
        assert second == first, f"read back from YAML, {cls.__name__} has other arguments:\n{first}"
        for name, value in vars(self.make(objective)).items():
            known = name not in parameters(cls) or not is_plain(value)
            assert known or plain(getattr(made, name, None)) == plain(value), (
                f"read back from YAML, {cls.__name__}.{name} is {getattr(made, name, None)!r} instead of {value!r}: "
                "annotate the argument with the type it is used as"
            )

    def test_declares_what_there_is(self, objective: Factory) -> None:
        """`kind` and `needs` name what the host knows.

        When it fails, a misspelt need is never met.
        """
        made = self.make(objective)
        assert made.kind in get_args(Kind), f"kind is {made.kind!r}: choose one of {', '.join(get_args(Kind))}"
        unknown = set(made.needs) - set(get_args(Need))
        assert not unknown, f"needs names {', '.join(sorted(unknown))}; there are {', '.join(get_args(Need))}"
        for name in ("grouped", "coupled"):
            assert isinstance(getattr(made, name), bool), f"{name} must be True or False, a value or a property"

    def test_states_its_api_version(self, objective: Factory) -> None:
        """The class states, as a literal, the version of the interface that it was written for.

        When it fails, no later lit_palm could tell that the class is out of date: write `API_VERSION = 1`.
        """
        check_api_version(GROUP, class_and_arguments(objective)[0])

    def test_entry_point_leads_to_it(self, objective: Factory) -> None:
        """An installed class is found by its own name through the entry points of its distribution.

        When it fails, `--model.objective=NAME` does not find it: mind the name in pyproject.toml, and reinstall.
        """
        check_entry_point(GROUP, class_and_arguments(objective)[0], self.installed)
