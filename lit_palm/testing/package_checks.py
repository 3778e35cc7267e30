"""Checks of what a user of the command line meets: arguments, their help, YAML, the entry point and API_VERSION."""

from __future__ import annotations

import inspect
import typing
from typing import Any, get_args

import docstring_parser
import pytest
from jsonargparse import ArgumentParser

from lit_palm.objectives.base import Kind, Need, Objective
from lit_palm.plugins import PluginError, check_class, load
from lit_palm.testing.subject import (
    GROUP,
    Factory,
    Subject,
    class_and_arguments,
    class_path,
    distribution_of,
    entry_of,
    parameters,
)

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
            first = parser.dump(parser.parse_object({"objective": given}))
            second = parser.parse_string(first)
        except Exception as error:
            raise AssertionError(
                f"{cls.__name__} with {arguments} cannot be written as YAML and read back: give arguments the types of "
                f"their values, and use plain values ({error})"
            ) from error
        assert parser.dump(second) == first, f"read back from YAML, {cls.__name__} has other arguments:\n{first}"
        # called `instantiate` since jsonargparse 4.49
        made = getattr(parser, "instantiate", parser.instantiate_classes)(second).objective
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
        cls, _ = class_and_arguments(objective)
        assert not inspect.isabstract(cls), f"{cls.__name__} does not implement {', '.join(cls.__abstractmethods__)}"
        try:
            check_class(GROUP, cls)
        except PluginError as error:
            raise AssertionError(str(error)) from error

    def test_entry_point_leads_to_it(self, objective: Factory) -> None:
        """An installed class is found by its own name through the entry points of its distribution.

        When it fails, `--model.objective=NAME` does not find it: mind the name in pyproject.toml, and reinstall.
        """
        cls, _ = class_and_arguments(objective)
        plugin, distribution = entry_of(cls), distribution_of(cls)
        installed = distribution is not None if self.installed is None else self.installed
        if plugin is None and not installed:
            pytest.skip(f"{cls.__module__} belongs to no installed distribution, so {cls.__name__} has no entry point")
        assert plugin is not None, (
            f"no entry point leads to {cls.__name__} of {distribution}: write\n"
            f'[project.entry-points."{GROUP}"]\n{cls.__name__} = "{cls.__module__}:{cls.__name__}"\n'
            "into its pyproject.toml and install it again (`installed = False` in the test class: it needs none)"
        )
        assert plugin.name == cls.__name__, (
            f"the entry point {plugin.name} of {plugin.source} leads to the class {cls.__name__}: the names must be "
            "equal, because the command line finds a class by its own name"
        )
        if plugin.health == "off":
            pytest.skip(f"LIT_PALM_PLUGINS leaves {plugin.name} out")
        try:
            found = load(GROUP, plugin.name)
        except PluginError as error:
            raise AssertionError(str(error)) from error
        assert found is cls, f"{plugin.name} leads to {found}, not to {cls}: is another version installed?"


def is_plain(value: Any) -> bool:
    """Whether YAML can hold a value as it is."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str)


def plain(value: Any) -> Any:
    """A value as YAML knows it: tuples are lists."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return value
