"""Small files of the demo: JSON lines in and out, written atomically, with errors that name file and line.

A reader never sees half a file: everything is written beside its destination and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["read_json", "read_jsonl", "replacing", "sha256_file", "unit_hash", "write_json", "write_jsonl"]


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone: the demo's only source of chance besides sampling.

    Being a function of (seed, purpose, snippet) it gives a snippet the same fate on every machine and Python version,
    whichever other snippets there are.
    """
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there replaces `path` when the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write one JSON value, indented for people."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON lines; returns how many."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
    return len(lines)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read one JSON value.

    Raises:
        ValueError: when the file is missing or is not JSON; the message names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; run the step that writes it first") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def read_jsonl(path: str | os.PathLike[str], columns: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Any]]:
    """Read JSON lines; every row must have the `columns`, of the given types.

    Raises:
        ValueError: when the file is missing or empty, or a line is not such a row; the message names file and line.
    """
    rows: list[dict[str, Any]] = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_parse_row(line, f"{path}:{number}", columns))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; run the step that writes it first") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    if not rows:
        raise ValueError(f"{path}: the file is empty; run the step that writes it again")
    return rows


def _parse_row(line: str, where: str, columns: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with the columns {list(columns)}, found {type(row).__name__}")
    for name, kind in columns.items():
        if name not in row:
            raise ValueError(f"{where}: no column {name!r}; the row has {sorted(row)}")
        # bool is an int to Python, but True as a number of tokens is a mistake
        if not isinstance(row[name], kind) or (isinstance(row[name], bool) and kind is not bool):
            raise ValueError(f"{where}: column {name!r} has the wrong type {type(row[name]).__name__}")
    return row
