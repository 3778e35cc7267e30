"""What a new objective is called: distribution, module and class from one name, and whether they are free."""

from __future__ import annotations

import builtins
import keyword
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata, util

from lit_palm.plugins import discover

__all__ = ["Names", "check_free", "names_for"]

MAX_LENGTH = 40
"""Characters; longer names make lines and paths that no longer fit."""

PREFIX = "lit-palm-"


@dataclass(frozen=True)
class Names:
    """The names of one objective.

    Args:
        distribution: what is installed and published, "lit-palm-my-loss".
        module: what is imported, "lit_palm_my_loss".
        class_name: what YAML and the command line say, "MyLoss".
        name: in file names, "my_loss".
    """

    distribution: str
    module: str
    class_name: str
    name: str


def names_for(text: str) -> Names:
    """The names for "my-loss", "my_loss", "MyLoss" or "lit-palm-my-loss".

    Raises:
        ValueError: when it cannot be made into a Python class and a distribution, with a name that can.
    """
    bare = re.sub(r"^lit[-_]palm[-_]", "", text)
    words = re.split(r"[-_]", bare)
    if not all(re.fullmatch(r"[A-Za-z0-9]+", word) for word in words) or not bare[0].isalpha():
        raise ValueError(
            f"{text!r} is no name for an objective: use letters and digits in words joined by hyphens, beginning with "
            "a letter, as in my-loss, or the name of the class, as in MyLoss"
        )
    if len(bare) > MAX_LENGTH:
        raise ValueError(f"{text!r} has {len(bare)} characters; a name may have {MAX_LENGTH}")
    class_name = "".join(word[0].upper() + word[1:] for word in words)
    for reserved in (bare, class_name):
        if keyword.iskeyword(reserved):
            raise ValueError(f"{text!r} is a keyword of Python: choose another name, such as {text.lower()}-loss")
    if hasattr(builtins, class_name):
        raise ValueError(f"{class_name} is a name of Python's own: choose another, such as {text}-loss")
    # MyDPOLoss -> my-dpo-loss
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", "-".join(words)).lower()
    distribution = PREFIX + split
    return Names(distribution, distribution.replace("-", "_"), class_name, split.replace("-", "_"))


def check_free(names: Names, imported: Iterable[str] = ()) -> None:
    """Refuse names that something else has already.

    Args:
        names: of the new objective.
        imported: names that its module imports, which a class of that name would hide.

    Raises:
        ValueError: naming what has it, with its distribution.
    """
    same = [plugin for plugin in discover() if plugin.name.lower() == names.class_name.lower()]
    if same:
        plugin = same[0]
        differ = "" if plugin.name == names.class_name else ", which differs only in capitals"
        raise ValueError(
            f"{names.class_name} is taken: {plugin.source} brings the {plugin.kind} {plugin.name}{differ}; choose "
            "another name"
        )
    if names.class_name in imported:
        raise ValueError(f"{names.class_name} is a name that every objective imports; choose another")
    try:
        version = metadata.version(names.distribution)
    except metadata.PackageNotFoundError:
        pass
    else:
        raise ValueError(f"{names.distribution} {version} is installed already; choose another name, or uninstall it")
    if util.find_spec(names.module) is not None:
        raise ValueError(f"a module {names.module} can be imported already; choose another name")
