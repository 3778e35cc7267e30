"""`lit-palm plugins`: what is installed, from where, healthy or why not.

lit-palm plugins              a table
lit-palm plugins --json       the same for programs
lit-palm plugins show PPO     what it does and its typed, documented arguments
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from lit_palm.plugins.loading import load, plugin_table
from lit_palm.plugins.registry import Plugin, PluginError

__all__ = ["argument_names", "describe", "format_table", "main"]

COLUMNS = ("name", "kind", "distribution", "version", "api", "health")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lit-palm plugins` with the given arguments; returns the exit code.

    Raises:
        PluginError: from `show`, when the name cannot be used.
    """
    about = "List the installed objectives, rewards, networks and engines, or show one of them."
    parser = argparse.ArgumentParser(prog="lit-palm plugins", description=about)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    verbs = parser.add_subparsers(dest="verb", metavar="{show}")
    show = verbs.add_parser("show", help="print what one does and its typed arguments")
    show.add_argument("name", metavar="NAME")
    arguments = parser.parse_args(argv)
    if arguments.verb == "show":
        print(describe(arguments.name))
    elif arguments.json:
        with contextlib.redirect_stdout(sys.stderr):  # a plugin that prints while it is imported would spoil the list
            table = plugin_table()
        print(json.dumps([as_record(plugin) for plugin in table], indent=2))
    else:
        print(format_table(plugin_table()))
    return 0


def as_record(plugin: Plugin) -> dict[str, str | int | None]:
    """One plugin as plain values: name, kind, distribution, version, api, health, cause."""
    return {column: getattr(plugin, column) for column in (*COLUMNS, "cause")}


def format_table(plugins: Sequence[Plugin]) -> str:
    """A text table, one row a plugin, with the cause of every trouble on a line of its own underneath."""
    rows = [[_cell(getattr(plugin, column)) for column in COLUMNS] for plugin in plugins]
    widths = [max(len(cell) for cell in cells) for cells in zip(COLUMNS, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    lines = [line([column.upper() for column in COLUMNS])]
    for plugin, row in zip(plugins, rows, strict=True):
        lines.append(line(row))
        if plugin.cause:
            lines.append(f"    {plugin.cause}")
    return "\n".join(lines)


def _cell(value: str | int | None) -> str:
    return "-" if value is None else str(value)


def describe(name: str) -> str:
    """Where a plugin comes from, its docstring and its typed arguments with their defaults.

    Raises:
        PluginError: when no kind of plugin has this name, or the one that has it cannot be used.
    """
    table = plugin_table()
    groups = dict.fromkeys(plugin.group for plugin in table if plugin.name == name)
    if not groups:
        near = difflib.get_close_matches(name, [plugin.name for plugin in table], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise PluginError(f"no plugin is called {name!r}; {hint}`lit-palm plugins` lists what is installed")
    return "\n\n".join(_describe_class(group, load(group, name), table) for group in groups)


def _describe_class(group: str, cls: type, table: Sequence[Plugin]) -> str:
    plugin = next(plugin for plugin in table if plugin.group == group and plugin.name == cls.__name__)
    title = f"{plugin.name}: {plugin.kind} from {plugin.source} ({plugin.value})"
    # its arguments follow with types and defaults
    doc = re.sub(r"^Args:\n(?:[ ]+.*\n?|\n(?=[ ]))*", "", inspect.getdoc(cls) or "(no docstring)", flags=re.MULTILINE)
    arguments = [line for parameter, text in _arguments(cls) for line in (_signature(parameter), *_wrap(text))]
    return "\n".join([title, "", doc.strip(), "", "Arguments:", *(arguments or ["  (none)"])])


def argument_names(cls: type) -> list[str]:
    """What the constructor of a class takes, in the order of its signature."""
    return [parameter.name for parameter, _ in _arguments(cls)]


def _arguments(cls: type) -> list[tuple[inspect.Parameter, str]]:
    """The arguments of a class in the order of its signature, each with its documentation.

    What `**kwargs` passes on belongs to the next class that has a constructor.
    """
    import docstring_parser  # jsonargparse's, so that both say the same

    found: dict[str, tuple[inspect.Parameter, str]] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        documented = {
            parameter.arg_name.lstrip("*"): parameter.description or ""
            for where in (vars(base)["__init__"], base)
            for parameter in docstring_parser.parse_from_object(where).params
        }
        parameters = [*_resolved(vars(base)["__init__"]).parameters.values()][1:]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(parameter.name, (parameter, documented.get(parameter.name, "")))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return list(found.values())


def _resolved(function: Callable[..., Any]) -> inspect.Signature:
    """A signature with the meaning of its annotations; as they are written where that cannot be found out."""
    try:
        return inspect.signature(function, eval_str=True)
    except Exception:  # a name that is imported for type checkers only, in somebody else's module
        return inspect.signature(function)


def _wrap(text: str) -> list[str]:
    indent = " " * 6
    return textwrap.wrap(" ".join(text.split()), 100, initial_indent=indent, subsequent_indent=indent)


def _signature(parameter: inspect.Parameter) -> str:
    kind, default = parameter.annotation, parameter.default
    text = f"  {parameter.name}"
    if kind is not inspect.Parameter.empty:
        text += f": {kind if isinstance(kind, str) else inspect.formatannotation(kind)}"
    return text if default is inspect.Parameter.empty else f"{text} = {_value(default)}"


def _value(default: object) -> str:
    """A default as YAML users and programmers both read it; a function by its name, which has no address in it."""
    return getattr(default, "__qualname__", None) or repr(default)
