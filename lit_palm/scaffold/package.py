"""The files of a new package, rendered from templates/ and written in one go.

render(names_for("my-loss"), "offline")                    # relative path -> text
write_package(names_for("my-loss"), "offline", Path("."))  # ./lit-palm-my-loss
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import tempfile
from email.utils import parseaddr
from importlib import resources
from pathlib import Path
from string import Template
from typing import Literal, NamedTuple, get_args

from lit_palm.objectives.base import Objective
from lit_palm.scaffold.names import Names
from lit_palm.version import __version__

__all__ = ["KINDS", "Author", "Kind", "imported_names", "render", "write_package"]

Kind = Literal["offline", "online"]
KINDS: tuple[str, ...] = get_args(Kind)

COMMON = {
    "pyproject.toml": "common/pyproject.toml",
    "README.md": "common/README.md",
    "LICENSE": "common/LICENSE",
    ".gitignore": "common/gitignore",
    "$module/__init__.py": "common/init.py",
    "$module/py.typed": "common/py.typed",
    "$module/objective.py": "$kind/objective.py",
    "configs/$name.yaml": "$kind/config.yaml",
    "tests/test_$name.py": "$kind/test_behaviour.py",
    "tests/test_${name}_conformance.py": "common/test_conformance.py",
}
"""File of the package -> its template."""

OWN = {
    "offline": {"data/pairs.jsonl": "offline/pairs.jsonl"},
    "online": {"data/prompts.jsonl": "online/prompts.jsonl", "example_reward.py": "online/example_reward.py"},
}
"""What only one kind has."""


class Author(NamedTuple):
    """Who wrote it, as the package's metadata says."""

    name: str
    email: str = ""

    @classmethod
    def parse(cls, text: str) -> Author:
        """From "Ada Lovelace" or "Ada Lovelace <ada@example.org>".

        Raises:
            ValueError: when it is neither, or goes over several lines.
        """
        text = text.strip()
        name, email = parseaddr(text) if "<" in text else (text, "")
        if not name or not text.isprintable() or ("<" in text and "@" not in email):
            raise ValueError(f"author {text!r}: write it as 'Ada Lovelace' or 'Ada Lovelace <ada@example.org>'")
        return cls(name, email)

    def toml(self) -> str:
        """The line of pyproject.toml; a JSON string of printable characters is a TOML string."""
        fields = {"name": self.name, "email": self.email}
        inner = ", ".join(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value)
        return f"authors = [{{ {inner} }}]"


def _template(path: str) -> Template:
    file = resources.files("lit_palm.scaffold") / "templates" / f"{path}.tmpl"
    return Template(file.read_text(encoding="utf-8"))


def render(names: Names, kind: Kind, author: Author | None = None) -> dict[str, str]:
    """The files of a package.

    Args:
        names: of the objective.
        kind: `offline` learns from given pairs, `online` from completions that the policy samples.
        author: for the metadata; None leaves it out.

    Returns:
        path relative to the package's folder -> text.
    """
    major, minor = __version__.split(".")[:2]
    words = {
        "distribution": names.distribution,
        "module": names.module,
        "class_name": names.class_name,
        "name": names.name,
        "kind": kind,
        "api_version": str(Objective.API_VERSION),
        # before 1.0 a minor version may change the interface
        "version_range": f">={major}.{minor},<{major}.{int(minor) + 1}",
        "authors": author.toml() if author else "",
    }
    files = {}
    for path, template in {**COMMON, **OWN[kind]}.items():
        text = _template(Template(template).substitute(words)).substitute(words)
        files[Template(path).substitute(words)] = text
    if not author:
        files["pyproject.toml"] = files["pyproject.toml"].replace('["LICENSE"]\n\n', '["LICENSE"]\n')
    return files


def imported_names(kind: Kind) -> set[str]:
    """Names that the module of a new objective imports."""
    tree = ast.parse(_template(f"{kind}/objective.py").safe_substitute(class_name="X", api_version="0"))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for node in imports for alias in node.names}


def write_package(names: Names, kind: Kind, parent: Path, author: Author | None = None) -> Path:
    """Write a package below `parent`, which is made if need be; all of it or nothing.

    Returns:
        The package's folder.

    Raises:
        ValueError: when the folder exists already or cannot be written.
    """
    folder = parent / names.distribution
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"{folder} exists already; choose another name, or another folder with --output")
    files = render(names, kind, author)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".new-objective-", dir=parent))
        try:
            for path, text in files.items():
                (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
                (unfinished / path).write_text(text, encoding="utf-8", newline="\n")
            unfinished.chmod(0o777 & ~_umask())  # mkdtemp's is closed to everybody else
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
