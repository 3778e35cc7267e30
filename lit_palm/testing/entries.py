"""How a class is named in YAML, which arguments it has, and which entry point leads to it: what the kits share."""

from __future__ import annotations

import functools
import importlib
import inspect
from importlib import metadata
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lit_palm.plugins import Plugin, PluginError, check_class, discover, load

__all__ = [
    "as_yaml",
    "check_api_version",
    "check_entry_point",
    "class_and_arguments",
    "class_path",
    "entry_of",
    "is_plain",
    "parameters",
    "plain",
    "read_yaml",
]


def class_and_arguments(factory: Any, base: type, fixture: str) -> tuple[type[Any], dict[str, Any]]:
    """The class behind a factory, with the arguments it is given, by name.

    Args:
        factory: a class, or functools.partial of one.
        base: what it must extend.
        fixture: name of the fixture that gave it, for the message.
    """
    arguments: dict[str, Any] = {}
    positional: tuple[Any, ...] = ()
    while isinstance(factory, functools.partial):
        positional, arguments, factory = factory.args + positional, {**factory.keywords, **arguments}, factory.func
    assert isinstance(factory, type) and issubclass(factory, base), (
        f"the fixture `{fixture}` returns neither a class nor a functools.partial of one, so that nobody could write "
        f"it in YAML: return My{base.__name__}, or functools.partial(My{base.__name__}, limit=3), no lambda or function"
    )
    return factory, {**dict(zip(parameters(factory), positional, strict=False)), **arguments}


def class_path(cls: type) -> str:
    """The dotted name under which a class can be imported by another process."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    found: Any = None
    if "<locals>" not in path and cls.__module__ != "__main__":
        found = importlib.import_module(cls.__module__)
        for name in cls.__qualname__.split("."):
            found = getattr(found, name, None)
    assert found is cls, (
        f"{path} cannot be imported under that name, so neither YAML nor another process can find it: define the class "
        "at the top level of a module, not inside a function"
    )
    return path


def parameters(cls: type) -> dict[str, tuple[inspect.Parameter, type]]:
    """Constructor arguments by name, each with the class whose `__init__` takes it; `**kwargs` leads to the base's."""
    found: dict[str, tuple[inspect.Parameter, type]] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        given = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in given:
            if parameter.kind is not parameter.VAR_KEYWORD:
                found.setdefault(parameter.name, (parameter, base))
        if not any(p.kind is p.VAR_KEYWORD for p in given):
            break
    return found


def entry_of(group: str, cls: type) -> Plugin | None:
    """The built-in or entry point that leads to a class; only those of its own package are imported."""
    package = cls.__module__.partition(".")[0]
    for plugin in discover():
        module, _, attribute = plugin.value.partition("[")[0].partition(":")
        if plugin.group != group or module.strip().partition(".")[0] != package:
            continue
        try:
            found: Any = importlib.import_module(module.strip())
            for name in attribute.strip().split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            continue
        if found is cls:
            return plugin
    return None


def distribution_of(cls: type) -> str | None:
    """The installed distribution that a class's package comes from."""
    names = metadata.packages_distributions().get(cls.__module__.partition(".")[0])
    return names[0] if names else None


def check_api_version(group: str, cls: type) -> None:
    """Assert that a class is complete and states, as a literal, the version it was written for."""
    assert not inspect.isabstract(cls), (
        f"{cls.__name__} does not implement {', '.join(getattr(cls, '__abstractmethods__', ()))}"
    )
    try:
        check_class(group, cls)
    except PluginError as error:
        raise AssertionError(str(error)) from error


def check_entry_point(group: str, cls: type, installed: bool | None) -> None:
    """Assert that an installed class is found by its own name; skip one that belongs to no distribution.

    Args:
        group: entry-point group.
        cls: the class.
        installed: whether it must have an entry point; None: when its package is an installed distribution's.
    """
    plugin, distribution = entry_of(group, cls), distribution_of(cls)
    if plugin is None and not (distribution is not None if installed is None else installed):
        pytest.skip(f"{cls.__module__} belongs to no installed distribution, so {cls.__name__} has no entry point")
    assert plugin is not None, (
        f"no entry point leads to {cls.__name__} of {distribution}: write\n"
        f'[project.entry-points."{group}"]\n{cls.__name__} = "{cls.__module__}:{cls.__name__}"\n'
        "into its pyproject.toml and install it again (`installed = False` in the test class: it needs none)"
    )
    assert plugin.name == cls.__name__, (
        f"the entry point {plugin.name} of {plugin.source} leads to the class {cls.__name__}: the names must be "
        "equal, because the command line finds a class by its own name"
    )
    if plugin.health == "off":
        pytest.skip(f"LIT_PALM_PLUGINS leaves {plugin.name} out")
    try:
        found = load(group, plugin.name)
    except PluginError as error:
        raise AssertionError(str(error)) from error
    assert found is cls, f"{plugin.name} leads to {found}, not to {cls}: is another version installed?"


def as_yaml(parser: ArgumentParser, config: Any) -> str:
    """A configuration as --print_config writes it, with what is null (the option got another name in 4.49)."""
    text: str = parser.dump(config, **{"skip_unset" if hasattr(parser, "instantiate") else "skip_none": False})
    return text


def read_yaml(parser: ArgumentParser, text: str) -> Any:
    """What a configuration instantiates to (`instantiate` since jsonargparse 4.49)."""
    return getattr(parser, "instantiate", parser.instantiate_classes)(parser.parse_string(text))


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
