"""Import one plugin and say whether it keeps to the contract of its group."""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_palm.plugins.registry import GROUPS, Plugin, PluginError, group_of, is_builtin

__all__ = ["check", "check_all", "check_class", "is_plugin"]


def _import(value: str) -> Any:
    """The object of "module:Class", by importing its module."""
    module, _, attribute = value.partition("[")[0].partition(":")
    if not attribute:
        raise ImportError(f'the entry point is "{value}"; write it as "module:Class"')
    found = importlib.import_module(module.strip())
    for part in attribute.strip().split("."):
        found = getattr(found, part)
    return found


def check(plugin: Plugin) -> type | None:
    """Import a plugin and fill in its health; its class when it is healthy. Never raises on a plugin's account."""
    return check_all([plugin])[0]


def check_all(plugins: Sequence[Plugin]) -> list[type | None]:
    """The same for several, in their order."""
    unchecked = [plugin for plugin in plugins if plugin.health == "unchecked"]
    classes = [_check(plugin) for plugin in plugins]
    if any(plugin.health == "broken" for plugin in unchecked):
        # Classes made before an import failed would still be found by their short name. With torch in memory this takes
        # a tenth of a second, so it is done once.
        gc.collect()
    return classes


def _check(plugin: Plugin) -> type | None:
    if plugin.health not in ("unchecked", "healthy"):
        return None
    try:
        cls = _import(plugin.value)
    except (Exception, SystemExit) as error:
        if is_builtin(plugin):
            raise
        plugin.health, plugin.cause = "broken", _describe(error)
        return None
    api = getattr(cls, "API_VERSION", None)
    plugin.api = api if type(api) is int else None
    refusal = _refusal(plugin, cls)
    if refusal is None:
        plugin.health = "healthy"
        return cls  # type: ignore[no-any-return]
    plugin.health, plugin.cause = "refused", refusal
    if _is_member(plugin.group, cls):
        # It is imported, so the CLI would find it by its short name; nobody offers or instantiates an abstract class.
        cls.__abstractmethods__ = frozenset({f"(refused: {refusal})"})
    return None


def _describe(error: BaseException) -> str:
    """An import's failure on one line, with the place in the plugin where it happened."""
    machinery = (__file__, importlib.__file__)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in machinery and not frame.filename.startswith("<frozen")
    ]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _is_member(group: str, cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, _import(GROUPS[group][1]))


def is_plugin(thing: object) -> bool:
    """Whether something is an objective, reward, network configuration or engine, whoever brought it."""
    return any(_is_member(group, type(thing)) for group in GROUPS)


def _refusal(plugin: Plugin, cls: Any) -> str | None:
    """Why a class that imports is not accepted under its entry point."""
    if not _is_member(plugin.group, cls):
        return f"{plugin.value} is not a subclass of {GROUPS[plugin.group][1].replace(':', '.')}"
    if cls.__name__ != plugin.name:
        return f"the entry point {plugin.name} names the class {cls.__name__}; the names must be equal"
    if not is_builtin(plugin):
        reason = _api_refusal(plugin.group, cls)
        if reason is not None:
            return reason
    if inspect.isabstract(cls):
        return f"it does not implement {', '.join(sorted(cls.__abstractmethods__))}"
    return None


def _api_refusal(group: str, cls: type) -> str | None:
    """Why a class's API_VERSION is not accepted; it must be stated where the plugin's own code can go out of date."""
    package = cls.__module__.partition(".")[0]
    own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == package]
    stated = next((base for base in own if "API_VERSION" in vars(base)), None)
    current = _import(GROUPS[group][1]).API_VERSION
    if stated is None:
        return f"it states no API_VERSION; add the one it was written for to the class, as in `API_VERSION = {current}`"
    api = vars(stated)["API_VERSION"]
    if type(api) is not int or not _is_literal(stated):
        return f"its API_VERSION must be a literal integer, as in `API_VERSION = {current}`"
    if api != current:
        older, newer = ("the plugin", "lit_palm") if api < current else ("lit_palm", "version of the plugin")
        return (
            f"it was written for API_VERSION {api} and this lit_palm has {current}: "
            f"upgrade {older}, or install an older {newer}"
        )
    return None


def _is_literal(cls: type) -> bool:
    """Whether the class body assigns API_VERSION a constant; `Objective.API_VERSION` would agree with every version."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # no source to look at
        return True
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "API_VERSION" for target in targets):
                return isinstance(node.value, ast.Constant)
    return True


def check_class(group: str, cls: type) -> None:
    """Refuse a class that does not keep to the group's contract, however it was found (class path, Python).

    Args:
        group: entry-point group or kind.
        cls: the class of the objective, reward, network configuration or engine.

    Raises:
        PluginError: when it is no subclass of the group's abstract class or states another API_VERSION.
    """
    group = group_of(group)
    kind, base = GROUPS[group]
    where = f"{cls.__module__}.{cls.__qualname__}"
    if not _is_member(group, cls):
        raise PluginError(f"{where} cannot be used as {kind}: it does not extend {base.replace(':', '.')}")
    if cls.__module__.partition(".")[0] != "lit_palm":
        reason = _api_refusal(group, cls)
        if reason is not None:
            raise PluginError(f"{kind} {where} is refused: {reason}")
