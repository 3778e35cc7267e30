"""The command line of `lit-palm new-objective`.

lit-palm new-objective my-loss                    learns from pairs: ./lit-palm-my-loss with the class MyLoss
lit-palm new-objective MyLoss --kind online       learns from completions that the policy samples
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lit_palm.scaffold.names import Names, check_free, names_for
from lit_palm.scaffold.package import KINDS, Author, imported_names, write_package

__all__ = ["main"]

ABOUT = "Write a package with a new objective: it installs, trains and passes its tests as it stands."

NEXT = """\
{folder} holds {names.class_name}, an {kind} objective that works as it stands. Next:

  cd {folder}
  pip install -e ".[test]"     # makes --model.objective={names.class_name} known
  pytest                       # what it computes, and what lit_palm expects of it
  lit-palm fit --config configs/{names.name}.yaml     # trains a fresh network in seconds

Then replace what is between the marks in {names.module}/objective.py; README.md there says the rest."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lit-palm new-objective` with the given arguments; returns the exit code.

    Raises:
        ValueError: when the name cannot be used or is taken, or the folder exists or cannot be written.
    """
    parser = argparse.ArgumentParser(prog="lit-palm new-objective", description=ABOUT)
    parser.add_argument("name", metavar="NAME", help="my-loss or MyLoss: package lit-palm-my-loss, class MyLoss")
    kinds = "offline: learns from given pairs; online: from completions that the policy samples (default: offline)"
    parser.add_argument("--kind", choices=KINDS, default="offline", help=kinds)
    parser.add_argument("--output", type=Path, default=Path(), metavar="DIR", help="folder to write the package into")
    parser.add_argument("--author", metavar="'NAME <MAIL>'", help="for the package's metadata")
    arguments = parser.parse_args(argv)
    names = names_for(arguments.name)
    check_free(names, imported_names(arguments.kind))
    author = Author.parse(arguments.author) if arguments.author is not None else None
    folder = write_package(names, arguments.kind, arguments.output, author)
    print(next_steps(names, arguments.kind, folder))
    return 0


def next_steps(names: Names, kind: str, folder: Path) -> str:
    """What to type now."""
    return NEXT.format(names=names, kind=kind, folder=folder)
