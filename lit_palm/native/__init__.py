"""C++ that is compiled where it runs, for processors: torch has no operation that does as much in one pass.

    library = compiled("decoding.cpp")     # a ctypes library, or None
    library.step_float32(...)

A file is compiled the first time that it is needed, in some seconds, for the vectors that torch itself would use, and
kept in the cache folder under a name made of all that it depends on. Without a compiler there is none, and callers do
what it does with torch's operations: slower, the same within rounding. Threads are torch's: both use one libgomp.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lit_palm.folders import cache_folder

__all__ = ["capabilities", "compiled", "find_compiler", "processor"]

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-Wno-psabi")
WIDE = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
VECTORS = {"AVX512_BF16": (*WIDE, "-mavx512bf16"), "AVX512": WIDE, "AVX2": ("-mavx2", "-mfma")}
"""Flags by processor; for others nothing is compiled, since nobody has measured what it gives."""


def capabilities() -> Mapping[str, Any]:
    """What torch tells of the processor's instructions; an older torch nothing."""
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return able


def processor() -> str:
    """What torch takes this one for, and whether it has AVX-512's products of bfloat16 numbers."""
    name: str = torch.backends.cpu.get_cpu_capability()
    return f"{name}_BF16" if name == "AVX512" and capabilities().get("avx512_bf16") else name


def find_compiler() -> str | None:
    """$CXX, g++ or clang++; None where there is none, for other processors, or where threads would not be torch's."""
    if sys.platform != "linux" or processor() not in VECTORS:
        return None
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


@cache
def compiled(name: str) -> ctypes.CDLL | None:
    """A C++ file of this folder, compiled and loaded.

    Args:
        name: its name in this folder.

    Returns:
        None where there is no compiler, or with a warning where it does not take the file.
    """
    compiler = find_compiler()
    if compiler is None:
        return None
    source = Path(__file__).parent / name
    command = [compiler, *FLAGS, *VECTORS[processor()], str(source)]
    texts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = hashlib.sha256(repr((command[:-1], texts)).encode()).hexdigest()[:32]
    place = cache_folder() / "native" / f"{source.stem}-{key}.so"
    try:
        if not place.exists():
            _compile(command, place)
        if place.stat().st_uid != os.getuid():  # code of somebody else's is not run
            raise OSError(f"{place} belongs to another user: remove it, or set LIT_PALM_CACHE to a folder of your own")
        return ctypes.CDLL(str(place))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{source.name} could not be compiled, and is done without, slower. {' '.join(command)}: "
            f"{said.strip().splitlines()[0]}",
            stacklevel=2,
        )
        return None


def _compile(command: list[str], place: Path) -> None:
    """Write a library as a whole or not at all; of several processes each writes the same."""
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        new = Path(folder) / place.name
        subprocess.run([*command, "-o", str(new)], check=True, capture_output=True, text=True)
        new.replace(place)
