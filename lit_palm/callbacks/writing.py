"""Writing one checkpoint under a hidden name, as a file or as a folder of shards, on a disk or behind a URL."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import traceback
from dataclasses import dataclass
from typing import Any

import torch

from lit_palm.modules.storage import STAGING, Place, retrying, sync_path

__all__ = ["Job", "is_storage_error", "write"]


@dataclass
class Job:
    """One checkpoint to write.

    Attributes:
        name: what it is to be called.
        checkpoint: what is written by one rank.
        shards: what every rank writes its part of; None: there is only the file.
        step: optimiser steps taken.
        score: the monitored metric; None: it does not take part in the choice of the best.
    """

    name: str
    checkpoint: dict[str, Any]
    shards: dict[str, Any] | None
    step: int
    score: float | None = None

    @property
    def staged(self) -> str:
        """The hidden name it is written under."""
        return f"{STAGING}{self.name}"


def is_storage_error(error: BaseException) -> bool:
    """Whether a saving failed because of the place it writes to, and not because of what is written."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:  # of several ranks
        return all(is_storage_error(failure[0]) for failure in failures.values())
    # torch's own writer has no type for a full disk: it complains about where in the file it is
    of_torch = isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|inline_container", str(error))
    return isinstance(error, OSError) or bool(of_torch)


def reason(error: BaseException) -> str:
    """One line on why a saving failed."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        rank = min(failures)
        return f"rank {rank}: {reason(failures[rank][0])}"
    cause = error.__cause__ or error.__context__
    if not isinstance(error, OSError) and isinstance(cause, OSError):
        error = cause
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def write(job: Job, place: Place, writes_file: bool, group: Any = None) -> None:
    """Write a checkpoint where it is not yet visible; behind a URL a folder is written in its place, `meta.pt` last.

    Args:
        job: what to write.
        place: where.
        writes_file: this rank writes what is not spread over the ranks.
        group: process group of the ranks that write shards; None: that of training.
    """
    try:
        if job.shards is None:
            if writes_file:
                _write_file(job.checkpoint, place, job.staged if place.local else job.name)
        else:
            _write_folder(job, place, writes_file, group)
    except BaseException as error:
        # frames of the failure hold the tensors, and the error is kept until it is reported
        traceback.clear_frames(error.__traceback__)
        raise


def _write_file(checkpoint: dict[str, Any], place: Place, name: str) -> None:
    if place.local:
        _save(checkpoint, place.path(name))
        return
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "checkpoint")
        _save(checkpoint, local)
        place.upload(local, name)


def _save(checkpoint: dict[str, Any], path: str) -> None:
    with open(path, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def _write_folder(job: Job, place: Place, is_first: bool, group: Any) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    name = job.staged if place.local else job.name
    path = place.path(name)

    def save() -> None:
        writer: Any = dcp.FileSystemWriter(path) if place.local else FsspecWriter(path)
        dcp.save(job.shards, storage_writer=writer, process_group=group)

    # every rank sees the failures of all, so all of them try again
    retrying(save, path, place.retries, place.pause)
    if not is_first:
        return
    files = place.sizes(name)
    files.pop("meta.pt", None)
    if "lit_palm" in job.checkpoint:
        job.checkpoint["lit_palm"]["files"] = files
    _write_file(job.checkpoint, place, f"{name}/meta.pt")
    if place.local:
        sync_path(path)


def discard(job: Job, place: Place) -> None:
    """Remove what is left of a saving that failed."""
    for name in (job.staged, job.name) if not place.local else (job.staged,):
        path = place.path(name)
        if place.local:
            shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else _unlink(path)
        else:
            place.remove(name)


def _unlink(path: str) -> None:
    if os.path.lexists(path):
        os.unlink(path)
