"""Which words a command line names, before any argument parser exists: how a run learns which plugins to import.

The parser resolves the short name `DPO` only once the class is imported, so the names have to be found first. Every
value of the command line, of the YAML files it names, of the files those name and of environment variables is
collected, as a whole word and, for a class path, as its last part. It costs one YAML parse a file; a word too many
costs at most an import.

    named_words(["fit", "--config", "dpo.yaml", "--model.objective.beta=0.1"], os.environ)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["DEFAULT_PREFIXES", "named_words"]

DEFAULT_PREFIXES = ("PL_", "LIT_PALM_")
"""Prefixes of environment variables that give defaults: LightningCLI's, and this package's."""

NOT_DEFAULTS = {"LIT_PALM_PLUGINS", "LIT_PALM_CACHE"}
CONFIG_SUFFIXES = {".yaml", ".yml", ".json"}

MAX_BYTES = 2**20
"""A larger file is read only when an option such as `--config` names it: it is more likely to be data."""


class _Unreadable(Exception):
    """A configuration that can be read only once (a pipe) or not from here (a URL)."""


def named_words(
    args: Sequence[str],
    env: Mapping[str, str],
    files: Sequence[str | Path] = (),
    prefixes: Sequence[str] = DEFAULT_PREFIXES,
) -> set[str] | None:
    """All words that could be a short name.

    Args:
        args: command line tokens, without the program's name.
        env: environment variables.
        files: default configuration files; those that do not exist are passed over, as the parser does.
        prefixes: prefixes of the environment variables that give defaults.

    Returns:
        The words; None when a configuration can only be read by the parser itself (a pipe, a URL), so that any word
        may be named.
    """
    words: set[str] = set()
    seen: set[Path] = set()
    try:
        for option, value in [*_options(args), *_defaults(env, prefixes), *(("config", str(file)) for file in files)]:
            _scan_value(value, Path(), words, seen, config=option in ("c", "config"))
    except _Unreadable:
        return None
    return words


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(last part of the option's name, value) for `--option=value`, `--option value` and bare values."""
    option = ""
    for token in args:
        if token.startswith("-") and not token.startswith(("-{", "-[")) and len(token) > 1:
            key, equals, value = token.partition("=")
            option = key.lstrip("-").rstrip("+").rpartition(".")[2]
            if equals:
                yield option, value
                option = ""
        else:
            yield option, token
            option = ""


def _defaults(env: Mapping[str, str], prefixes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The same for environment variables such as PL_FIT__CONFIG and PL_FIT__MODEL__OBJECTIVE."""
    for name, value in env.items():
        if name.startswith(tuple(prefixes)) and name not in NOT_DEFAULTS:
            yield re.split("__|_", name)[-1].lower(), value


def _scan_value(value: str, folder: Path, words: set[str], seen: set[Path], *, config: bool = False) -> None:
    """Take a word, follow a file, or take a YAML or JSON value apart."""
    if config and (value == "-" or "://" in value):
        raise _Unreadable
    if "\n" not in value and (config or Path(value).suffix in CONFIG_SUFFIXES):
        path = next((path for path in (folder / value, Path(value)) if _exists(path)), None)
        if path is not None:
            _scan_file(path, words, seen, config=config)
            return
    if any(mark in value for mark in "{[:\n"):
        _scan_text(value, folder, words, seen)
    else:
        words.update((value, value.rpartition(".")[2]))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a value that cannot be a path, for example a very long one
        return False


def _scan_file(path: Path, words: set[str], seen: set[Path], *, config: bool) -> None:
    if not path.is_file():
        if config and not path.is_dir():
            raise _Unreadable  # reading a pipe would take it from the parser
        return
    path = path.resolve()
    if path in seen or (not config and path.stat().st_size > MAX_BYTES):
        return
    seen.add(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # the parser will say so, with the option that named it
        return
    _scan_text(text, path.parent, words, seen)


def _scan_text(text: str, folder: Path, words: set[str], seen: set[Path]) -> None:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:  # the parser will say so; until then every word counts
        words.update(re.findall(r"\w+", text))
        return
    _scan_tree(tree, folder, words, seen)


def _scan_tree(tree: Any, folder: Path, words: set[str], seen: set[Path]) -> None:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        for item in tree:
            _scan_tree(item, folder, words, seen)
    elif isinstance(tree, str):
        if "\n" not in tree and Path(tree).suffix in CONFIG_SUFFIXES:
            _scan_value(tree, folder, words, seen)
        words.update((tree, tree.rpartition(".")[2]))
