"""Folders that checkpoints are kept in, on a disk or behind any fsspec URL, and how a name in one is made to appear.

A checkpoint is written under a hidden name and gets its own afterwards, in one step and for good: what is visible is
whole. `last.ckpt` and `best.ckpt` are names for one of those beside them: a second hard link of a file, a symbolic link
to a folder of shards, and where there are neither, a file of one line that `resolve` follows.

    resolve("runs/x/last.ckpt")          the file or folder that is meant
    Place("s3://bucket/run").names()     what is there
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec

__all__ = ["STAGING", "STEP", "Place", "is_local", "is_transient", "local_path", "resolve", "retrying"]

T = TypeVar("T")

STAGING = ".staging-"
"""How the names of unfinished checkpoints begin; whoever holds the folder's lock sweeps them."""
STEP = re.compile(r"step-(\d{8,})(?:-\d+)?\.ckpt")
"""Names of finished checkpoints; the second number tells several of one step apart."""

_POINTER = "lit_palm checkpoint: "
_POINTER_BYTES = 512  # longer files are checkpoints themselves

# errors that will not pass by themselves
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_CODES = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL}
# libraries below fsspec's filesystems, whose errors are no OSError
_NETWORK = {"aiohttp", "azure", "botocore", "gcsfs", "google", "httpx", "requests", "urllib3"}
# where an object appears whole or not at all, and renaming would be a copy
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "tos", "r2"}


def is_local(path: str) -> bool:
    """Whether a path is on a disk of this machine (or mounted), with links and renaming."""
    return "://" not in path or path.startswith(("file://", "local://"))


def local_path(path: str) -> str:
    """A local path without the scheme it may be written with."""
    return path.partition("://")[2] if "://" in path else path


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: timeouts, lost connections and overloaded servers, but no full or missing disk."""
    failures = getattr(error, "failures", None)  # what torch.distributed.checkpoint gathers from the ranks
    if isinstance(failures, dict):
        return bool(failures) and all(is_transient(failure[0]) for failure in failures.values())
    if isinstance(error, OSError):
        return not isinstance(error, _FINAL) and error.errno not in _FINAL_CODES
    code = getattr(error, "code", None) or getattr(error, "status", None)
    if isinstance(code, int):
        return code in (408, 429) or code >= 500
    return type(error).__module__.partition(".")[0] in _NETWORK


def retrying(action: Callable[[], T], where: str, retries: int, pause: float = 0.5) -> T:
    """Do something with a remote place, again after a transient error.

    Args:
        action: what to do; it must be safe to repeat.
        where: URL, for the error.
        retries: how often it is tried again, after `pause` seconds and twice as long each time (at most a minute), give
            or take a quarter, so that many ranks do not return together.

    Raises:
        OSError: naming the URL, when every try failed; other errors as they are.
    """
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            if attempt == retries:
                why = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
                raise OSError(f"{where}: given up after {attempt + 1} attempts ({why})") from error
            time.sleep(min(pause * 2**attempt, 60) * random.uniform(0.75, 1.25))
    raise AssertionError("retries is negative")


class Place:
    """A folder of checkpoints.

    Args:
        folder: path or fsspec URL.
        retries: how often a transient error of a URL is met with another attempt.
        pause: seconds before the first of them.
    """

    def __init__(self, folder: str | os.PathLike[str], retries: int = 4, pause: float = 0.5) -> None:
        given = os.fspath(folder).rstrip("/") or "/"
        self.local = is_local(given)
        self.folder = local_path(given) if self.local else given
        self.retries, self.pause = (0 if self.local else retries), pause
        self.fs: Any
        self.fs, self._inner = fsspec.core.url_to_fs(self.folder)

    def path(self, name: str) -> str:
        """The path or URL of a name."""
        return f"{self.folder}/{name}"

    def _there(self, name: str) -> str:
        return f"{self._inner}/{name}"

    def _try(self, action: Callable[[], T], name: str = "") -> T:
        return retrying(action, self.path(name) if name else self.folder, self.retries, self.pause)

    def make(self) -> None:
        """Create the folder."""
        self._try(lambda: self.fs.makedirs(self._inner, exist_ok=True))

    def names(self) -> list[str]:
        """The names in it, hidden ones too."""
        if self.local:
            return sorted(os.listdir(self.folder)) if os.path.isdir(self.folder) else []

        def names() -> list[str]:
            self.fs.invalidate_cache()
            try:
                found = self.fs.ls(self._inner, detail=False)
            except FileNotFoundError:
                return []
            return sorted({name.rstrip("/").rpartition("/")[2] for name in found})

        return self._try(names)

    def sizes(self, name: str) -> dict[str, int]:
        """Files in a folder in it, with their bytes."""

        def sizes() -> dict[str, int]:
            self.fs.invalidate_cache()
            entries = self.fs.ls(self._there(name), detail=True)
            return {e["name"].rstrip("/").rpartition("/")[2]: int(e["size"] or 0) for e in entries}

        return self._try(sizes, name)

    def is_folder(self, name: str) -> bool:
        """Whether a name is a folder, or a link to one."""
        return bool(self._try(lambda: self.fs.isdir(self._there(name)), name))

    def is_whole(self, name: str) -> bool:
        """Whether a name is a checkpoint: a file, or a folder with the part that is written last."""
        if not self.is_folder(name):
            return bool(self._try(lambda: self.fs.exists(self._there(name)), name))
        ends = [self._there(f"{name}/{end}") for end in ("meta.pt", "config.json")]
        return any(self._try(lambda: [self.fs.exists(end) for end in ends], name))

    def read(self, name: str) -> bytes:
        """The bytes of a small file.

        Raises:
            FileNotFoundError: there is none.
        """
        return bytes(self._try(lambda: self.fs.cat_file(self._there(name)), name))

    def write(self, name: str, data: bytes) -> None:
        """Put a small file in its place at once."""
        if not self.local:
            self._try(lambda: self.fs.pipe_file(self._there(name), data), name)
            return
        new = self.path(f"{STAGING}{name.lstrip('.')}")
        with open(new, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path(name))

    def upload(self, source: str, name: str) -> None:
        """Put a local file behind a URL: whole or not at all."""
        direct = self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,)
        if "/" in name or _OBJECT_STORES & set(direct):
            self._try(lambda: self.fs.put_file(source, self._there(name)), name)
            return
        new = self._there(f"{STAGING}{name}")
        self._try(lambda: self.fs.put_file(source, new), name)
        self._try(lambda: self.fs.mv(new, self._there(name)), name)

    def remove(self, name: str) -> None:
        """Remove a file or a folder; a folder stops being a checkpoint before any part of it is gone."""
        if self.local:
            path = Path(self.path(name))
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
                return
            hidden = path.with_name(f"{STAGING}removed-{name.lstrip('.')}")
            shutil.rmtree(hidden, ignore_errors=True)
            path.rename(hidden)
            shutil.rmtree(hidden)
            return
        with contextlib.suppress(FileNotFoundError):
            if self.is_folder(name):
                with contextlib.suppress(FileNotFoundError):
                    self._try(lambda: self.fs.rm_file(self._there(f"{name}/meta.pt")), name)
            self._try(lambda: self.fs.rm(self._there(name), recursive=True), name)

    def sync(self) -> None:
        """Make the names themselves survive a power cut."""
        if self.local:
            with contextlib.suppress(OSError):  # not every filesystem can
                sync_path(self.folder)

    def point(self, alias: str, name: str) -> None:
        """Let an alias (`last.ckpt`) mean another name from now on; it always means one or the other."""
        if not self.local:
            self.write(alias, f"{_POINTER}{name}\n".encode())
            return
        new = Path(self.path(f"{STAGING}{alias}"))
        new.unlink(missing_ok=True)
        try:
            if self.is_folder(name):
                os.symlink(name, new)
            else:
                link(self.path(name), str(new))
        except OSError:  # a filesystem without symbolic links
            self.write(alias, f"{_POINTER}{name}\n".encode())
            return
        os.replace(new, self.path(alias))
        if new.exists():  # renaming a link to a file onto that same file does nothing
            new.unlink()
        self.sync()

    def target(self, alias: str) -> str | None:
        """The name that an alias means; None where it is a checkpoint itself, or is not there."""
        if self.local and os.path.islink(self.path(alias)):
            return os.path.basename(os.readlink(self.path(alias)))
        try:
            if self.is_folder(alias) or self._try(lambda: self.fs.size(self._there(alias))) > _POINTER_BYTES:
                return None
            data = self.read(alias)
        except FileNotFoundError:
            return self._newest() if alias == "last.ckpt" else None
        text = data.decode("utf-8", "replace")
        if text.startswith(_POINTER) and text.endswith("\n"):
            return text.removeprefix(_POINTER).strip()
        # a line that was cut short: what it was to mean is complete, since it is written last
        torn = _POINTER.startswith(text[: len(_POINTER)]) or text.startswith(_POINTER)
        return self._newest() if torn and alias == "last.ckpt" else None

    def _newest(self) -> str | None:
        steps = sorted((name for name in self.names() if STEP.fullmatch(name)), key=step_of)
        return next((name for name in reversed(steps) if self.is_whole(name)), None)


def step_of(name: str) -> tuple[int, int]:
    """The order of finished checkpoints: by step, then by their second number."""
    numbers = re.findall(r"\d+", name)
    return int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0


def sync_path(path: str) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(source: str, target: str) -> None:
    """A second name for a file; a copy where the filesystem has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        shutil.copyfile(source, target)
        sync_path(target)


def resolve(path: str | os.PathLike[str]) -> str:
    """The file or folder that a path or URL means, if it is an alias that points to one; else the path itself."""
    given = os.fspath(path).rstrip("/")
    if is_local(given) and not os.path.isfile(local_path(given)) and os.path.exists(local_path(given)):
        return given  # a folder, or a link to one
    folder, _, name = given.rpartition("/")
    try:
        place = Place(folder or ".")
        target = place.target(name)
    except ImportError as error:
        raise ValueError(f"{given}: files of this kind cannot be opened here ({error})") from error
    if target is None:
        return given
    return f"{given.removesuffix(name)}{target}"
