"""The command line of `lit-palm data inspect`: the arguments of `lit-palm fit`, or a reader and a path."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import yaml

__all__ = ["main"]

ParseFit = Callable[[list[str], Sequence[str]], tuple[Any, ...]]

# a model that parses where none is named: nothing of it is built
_NO_MODEL = ["--model=LitLanguageModel", "--model.network=PaLMConfig"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lit-palm data inspect",
        usage="lit-palm data inspect [READER [PATH]] [flags of `lit-palm fit`] [--view VIEW] "
        "[--stage STAGE] [--rows ROWS] [--json]",
        allow_abbrev=False,
        description="Show what a run would train on: counts, lengths, rows with what is learned from, and what is "
        "left out and why. Takes the YAML files and flags of `lit-palm fit` as they are; or a reader of published "
        "data, such as OASST or the dotted name of one of your own, with what it reads: a file, folder, glob, URL or "
        "hub dataset (default: where the dataset is).",
    )
    add = parser.add_argument
    add("--view", help="of a reader: demonstrations, preferences or prompts (default: preferences, where it has them)")
    add("--stage", default="train", choices=["train", "validation", "test", "predict"], help="(default train)")
    add("--rows", type=int, default=3, help="how many to show (default 3)")
    add("--json", action="store_true", help="print JSON instead of text")
    return parser


def main(argv: Sequence[str], parse_fit: ParseFit) -> int:
    """Run `lit-palm data inspect`.

    Args:
        argv: arguments of `data`.
        parse_fit: gives the parsed configuration and the parts of it that are built, from the arguments of `fit`.

    Raises:
        ValueError: naming what is wrong and the way out; a row at fault with file and line.
    """
    if list(argv[:1]) in ([], ["-h"], ["--help"]):
        print(_parser().format_help())
        return 0
    if argv[0] != "inspect":
        raise ValueError(f"lit-palm data {argv[0]}: there is `lit-palm data inspect`")
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    words = list(argv[1:first])
    options, flags = _parser().parse_known_args(list(argv[first:]))
    if options.rows < 0:
        raise ValueError(f"--rows is {options.rows}: it must be at least 0")
    if len(words) > 2:
        raise ValueError(f"lit-palm data inspect takes a reader and a path; {words[2]!r} is neither")
    if words:
        flags = [*_data_flags(words[0], words[1:], options.view), *flags]
    elif options.view:
        raise ValueError("--view chooses what a reader gives: name the reader first, or --data a data module")
    elif not flags:
        raise ValueError("name the data: --config FILE, --data MODULE with its flags, or a reader and what it reads")
    has_model = _names_model(flags)
    _, module, data = parse_fit(flags if has_model else [*_NO_MODEL, *flags], ("model", "data"))

    from lit_palm.inspection.measuring import Inspection
    from lit_palm.inspection.showing import show

    inspection = Inspection(data, module if has_model else None, options.stage)
    if options.json:
        print(json.dumps(inspection.record(options.rows), indent=2, ensure_ascii=False))
    else:
        show(inspection, options.rows, sys.stdout)
    if inspection.error is not None:
        sys.stdout.flush()
        raise inspection.error
    return 0


def _data_flags(reader: str, path: Sequence[str], view: str | None) -> list[str]:
    """The data module that takes what a reader gives."""
    from lit_palm.data.readers.base import MODULES

    modules = {str(name): module for name, module in MODULES.items()}
    views = [str(name) for name in _reader_class(reader).views()]
    view = view or next((name for name in ("preferences", *views) if name in views), "preferences")
    if view not in views:
        raise ValueError(f"--view {view}: {reader} has {', '.join(views) or 'no view'}")
    return [f"--data={modules[view]}", f"--data.reader={reader}", *(f"--data.train={place}" for place in path)]


def _reader_class(name: str) -> Any:
    from lit_palm.data import readers

    found = getattr(readers, name, None)
    if "." in name:
        module, _, short = name.rpartition(".")
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())  # a console script does not look where it is run
        try:
            found = getattr(importlib.import_module(module), short)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"the reader {name!r} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, readers.Reader) and found is not readers.Reader):
        known = [
            n for n in readers.__all__ if isinstance(c := getattr(readers, n), type) and issubclass(c, readers.Reader)
        ]
        names = ", ".join(sorted(set(known) - {"Reader"}))
        raise ValueError(f"there is no reader {name!r}: name one of {names}, or the dotted name of one of your own")
    return found


def _names_model(flags: Sequence[str]) -> bool:
    """Whether a flag, a file or the environment names a model."""
    if any(re.match(r"--model\b", flag) for flag in flags) or os.environ.get("LIT_PALM_FIT__MODEL"):
        return True
    files = [flag.partition("=")[2] for flag in flags if re.match(r"(--config|-c)=", flag)]
    files += [value for flag, value in pairwise(flags) if flag in ("--config", "-c")]
    return any("model" in _content(file) for file in files)


def _content(file: str) -> dict[str, Any]:
    try:
        with open(file, encoding="utf-8") as opened:
            content = yaml.safe_load(opened)
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # the parser says what is wrong with it
    return content if isinstance(content, dict) else {}
