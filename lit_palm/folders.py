"""Where files are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(cache_dir: str | None = None) -> Path:
    """The argument, $LIT_PALM_CACHE, or ~/.cache/lit_palm."""
    return Path(cache_dir or os.environ.get("LIT_PALM_CACHE") or "~/.cache/lit_palm").expanduser()
