"""A folder that appears whole: written beside its place under a hidden name, and moved there at the end.

What is at that place already is replaced only when an earlier export or import wrote it. A URL gets the files by
fsspec, its `config.json` last, because that is the file which says what the folder is.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from lit_palm.data.tokenizer_base import TOKENIZER_FILE
from lit_palm.modules.storage import is_local, local_path

__all__ = ["new_folder"]

_LAST = "config.json"


@contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[str]:
    """A folder to write in, which becomes `target` when the block ends well, and vanishes when it does not.

    Args:
        target: path or fsspec URL.

    Raises:
        ValueError: at once, when the target holds something that was not written from here.
    """
    place = os.fspath(target).rstrip("/")
    filesystem, inner = fsspec.core.url_to_fs(place)
    check_target(place)
    local = is_local(place)
    final = os.path.abspath(local_path(place)) if local else ""
    try:
        if local:
            os.makedirs(os.path.dirname(final), exist_ok=True)
            prefix = f".{os.path.basename(final)}."
            staged = tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=os.path.dirname(final))
            os.chmod(staged, 0o777 & ~_umask())
        else:
            staged = tempfile.mkdtemp(suffix=".tmp")
    except OSError as error:
        raise ValueError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        yield staged
        if local:
            _move(staged, final)
        else:
            _upload(staged, filesystem, inner)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_target(target: str) -> None:
    """Look whether a folder may be written.

    Raises:
        ValueError: something else is there.
    """
    filesystem, inner = fsspec.core.url_to_fs(target)
    if not filesystem.exists(inner):
        return
    if not filesystem.isdir(inner):
        raise ValueError(f"{target}: is a file; name a folder to write")
    names = _names(filesystem, inner)
    if names and not _ours(filesystem, inner):
        raise ValueError(
            f"{target}: is not empty (it holds {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}) and was not "
            "written by lit-palm export or import: name another folder"
        )


def _names(filesystem: Any, inner: str) -> list[str]:
    found = (path.rstrip("/").rpartition("/")[2] for path in filesystem.ls(inner, detail=False))
    return sorted({name for name in found if name})


def _ours(filesystem: Any, inner: str) -> bool:
    """Whether the folder is an earlier export: its configuration says so, or an adapter has our tokeniser with it."""
    if filesystem.exists(f"{inner}/adapter_config.json") and filesystem.exists(f"{inner}/{TOKENIZER_FILE}"):
        return True
    try:
        with filesystem.open(f"{inner}/{_LAST}", "r", encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and ("networks" in found or "lit_palm" in found)


def _move(staged: str, final: str) -> None:
    if not os.path.isdir(final):
        os.rename(staged, final)
        return
    with tempfile.TemporaryDirectory(prefix=".replaced.", dir=os.path.dirname(final)) as old:
        os.rename(final, os.path.join(old, "folder"))  # a folder with files in it cannot be replaced in one step
        try:
            os.rename(staged, final)
        except BaseException:
            os.rename(os.path.join(old, "folder"), final)
            raise


def _upload(staged: str, filesystem: Any, inner: str) -> None:
    """Put files where renaming would be a copy: what says that the folder is whole goes first and comes last."""
    new = sorted(os.listdir(staged), key=lambda name: name == _LAST)
    filesystem.makedirs(inner, exist_ok=True)
    old = set(_names(filesystem, inner))
    folders = {name for name in new if os.path.isdir(os.path.join(staged, name))}
    for name in sorted(old - set(new) | old & (folders | {_LAST}), key=lambda name: name != _LAST):
        filesystem.rm(f"{inner}/{name}", recursive=True)
    for name in new:
        filesystem.put(os.path.join(staged, name), f"{inner}/{name}", recursive=name in folders)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
