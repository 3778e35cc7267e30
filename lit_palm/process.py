"""What is settled for a process of `lit-palm` before torch is loaded: how its threads wait, what of memory and code is
kept, and which advice is dropped because a user could not act on it. What the environment says goes first."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings

__all__ = ["keep_code", "keep_memory", "prepare_process"]

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Of glibc's malloc.h."""


def keep_code() -> None:
    """Let oneDNN, and torch beside it, keep the code that is made for a shape of a product for 64 shapes.

    It is half a megabyte each and made again in a millisecond or two; left alone they keep that of 1,024.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")


def keep_memory() -> None:
    """Let glibc keep what a tensor frees for the next one, unless the environment tells it something (`MALLOC_*`).

    It maps memory for everything above 32 MB and gives it back when that is freed. The activations of a large batch are
    larger, and each is then paged in anew: an eighth of a step of DPO. What lies free above 1 GB is still given back.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # another C library has none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_TOP_PAD, 2**26)


def prepare_process() -> None:
    """All of it; before torch is imported."""
    keep_code()
    keep_memory()
    # A thread that spins while it waits takes the core from the one it waits for, on a machine that does anything else
    # beside training; one that sleeps at once is woken thousands of times a step, each time as slowly as an idle core
    # wakes up. So it spins for some microseconds, then sleeps (libgomp's setting, with which torch comes on Linux).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for message in (
        ".*does not have many workers.*",  # rows are tokenised once; collating them is cheap
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*LeafSpec.*deprecated.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",  # ours do resume exactly
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",
        ".*Total length of `list` across ranks is zero.*",  # no validation data
    ):
        warnings.filterwarnings("ignore", message)
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning_utilities.core.rank_zero",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).addFilter(_advice)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _advice(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in ("Tip: For seamless", "`weights_only` was not set"))
