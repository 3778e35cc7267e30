"""Load what is asked for, and say what is wrong in the words of whoever asked."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_palm.plugins.checking import check, check_all
from lit_palm.plugins.registry import (
    BUILTINS,
    GROUPS,
    Plugin,
    PluginError,
    allowed_names,
    discover,
    group_of,
    is_builtin,
)
from lit_palm.plugins.scan import DEFAULT_PREFIXES, named_words

__all__ = ["explain", "load", "load_named", "plugin_table", "unknown_message"]

UNRESOLVED = (
    r"Expected an instantiatable class, but ([\w.]+) is abstract",
    r"(?s)Expected an instantiatable class, but is abstract.*?Given value: ([\w.]+)",
    r"Expected a dot import path string: ([\w.]+)",
    r"Problem with given class_path ['\"]([\w.]+)",
)
"""What jsonargparse says when a class was refused, a short name is nobody's, or a class path does not import. A class
path that is fine itself comes before what is wrong within it, so the last one is the least telling."""


def load(group: str, name: str) -> type:
    """Import one plugin or built-in and nothing else.

    Args:
        group: entry-point group ("lit_palm.objectives") or kind ("objective").
        name: the entry point's name.

    Returns:
        The class.

    Raises:
        PluginError: when nothing has this name (says what is installed, what is broken and the nearest name), several
            distributions or a plugin and a built-in share it, it does not import, or it breaks the rules.
    """
    group = group_of(group)
    same = [plugin for plugin in discover() if plugin.group == group and plugin.name == name]
    usable = [plugin for plugin in same if plugin.health != "off"]
    if not usable:
        if same:
            raise PluginError(f"{same[0].problem()}; LIT_PALM_PLUGINS={os.environ.get('LIT_PALM_PLUGINS', '')}")
        raise PluginError(unknown_message(group, name))
    if len(usable) > 1:
        raise PluginError(str(usable[0].cause))
    cls = check(usable[0])
    if cls is None:
        raise PluginError(usable[0].problem())
    return cls


def load_named(
    args: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    files: Sequence[str | Path] = (),
    prefixes: Sequence[str] = DEFAULT_PREFIXES,
) -> list[Plugin]:
    """Import the built-ins and the plugins that a command line names, so that the CLI resolves their short names.

    Names are looked for in the arguments, in the YAML files they name (and the files those name), in environment
    variables that give defaults and in the CLI's default configuration files: see `lit_palm.plugins.scan`.

    Args:
        args: command line tokens, without the program's name.
        env: environment; None takes the process's.
        files: the CLI's default configuration files.
        prefixes: prefixes of the environment variables that give defaults.

    Returns:
        The named plugins that cannot be used; each has been reported on stderr.

    Raises:
        PluginError: when a name that is written out shadows a built-in: the CLI would silently take the built-in.
    """
    names = named_words(args, os.environ if env is None else env, files, prefixes)
    check_all([plugin for plugin in discover() if is_builtin(plugin)])
    named = [p for p in discover() if not is_builtin(p) and (names is None or p.name in names or p.name == "?")]
    for plugin in named:
        if names is not None and plugin.health == "duplicate" and plugin.name in BUILTINS[plugin.group]:
            raise PluginError(str(plugin.cause))
    troubled = [plugin for plugin, cls in zip(named, check_all(named), strict=True) if cls is None]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for problem in _problems(troubled):
            print(f"lit_palm: {problem}", file=sys.stderr)
        for name in sorted((allowed_names() or set()) - {plugin.name for plugin in discover()}):
            print(f"lit_palm: LIT_PALM_PLUGINS names {name}, which is not installed", file=sys.stderr)
    return troubled


def plugin_table() -> list[Plugin]:
    """Every built-in and plugin, imported and checked: what is installed, from where, healthy or why not."""
    check_all(discover())
    order = list(GROUPS)

    def place(plugin: Plugin) -> tuple[int, bool, str, str]:
        kind = order.index(plugin.group) if plugin.group in order else len(order)
        return (kind, False, "", "") if is_builtin(plugin) else (kind, True, plugin.distribution.lower(), plugin.name)

    return sorted(discover(), key=place)


def _problems(plugins: Sequence[Plugin]) -> list[str]:
    """What is wrong with them, each thing once: a name that two distributions bring is one problem."""
    return list(dict.fromkeys(plugin.problem() for plugin in plugins))


def unknown_message(group: str, name: str) -> str:
    """The error for a name that cannot be resolved: what is wrong with it, or else the nearest name and what there is.

    Args:
        group: entry-point group or kind.
        name: what the user wrote.
    """
    group = group_of(group)
    kind = GROUPS[group][0]
    known = [plugin for plugin in plugin_table() if plugin.group in (group, "?")]
    same = [plugin for plugin in known if plugin.name == name and plugin.health != "healthy"]
    if same:
        return "\n".join(_problems(same))
    healthy = [plugin for plugin in known if plugin.health == "healthy"]
    others = {plugin.name.lower(): plugin.name for plugin in known}
    near = difflib.get_close_matches(name.lower(), others, n=1)
    elsewhere = next((plugin for plugin in discover() if plugin.name == name), None)
    hint = f"; did you mean {others[near[0]]}?" if near else ""
    hint = f": that is a kind of {elsewhere.kind}" if elsewhere else hint
    lines = [f"unknown {kind} {name!r}{hint}"]
    lines.append(f"installed: {', '.join(f'{plugin.name} ({plugin.source})' for plugin in healthy) or 'none'}")
    unusable = [plugin for plugin in known if plugin.health != "healthy"]
    return "\n".join([*lines, *(f"not usable: {problem}" for problem in _problems(unusable))])


def explain(message: str) -> str:
    """What to add to the argument parser's error when a short name or class path did not lead to a usable plugin.

    Args:
        message: the error of jsonargparse, which names the key and what it was given, but neither why the class is
            missing nor which ones there are.

    Returns:
        `unknown_message` for what was asked for; "" when the error is about something else.
    """
    key = re.search(r"Parser key ['\"]([\w.]+)", message)
    asked = next((match.group(1) for pattern in UNRESOLVED if (match := re.search(pattern, message))), None)
    if asked is None:
        return ""
    name = asked.rpartition(".")[2]
    parts = [part.removesuffix("s") for part in key.group(1).split(".")] if key else []
    by_key = [group for group, (kind, _) in GROUPS.items() if kind in parts]
    same = [plugin for plugin in discover() if plugin.name == name and plugin.group in GROUPS]
    if any(check(plugin) is not None for plugin in same if not by_key or plugin.group in by_key):
        return ""  # the class is fine, its arguments are not
    if "." in asked and not same:
        return _explain_path(asked)
    groups = by_key or [plugin.group for plugin in same]
    return "\n".join(unknown_message(group, name) for group in dict.fromkeys(groups))


def _explain_path(path: str) -> str:
    """Why a class path that is no plugin's does not lead to a class; "" when it does, and something else is wrong."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        return (
            f"{path} cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}): check the path, and "
            "that its folder is on PYTHONPATH"
        )
    return "" if isinstance(found, type) else f"{path} is no class"
