"""What the figures were measured on."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.worker import Work

__all__ = ["facts", "instructions", "measured", "versions"]

PACKAGES = ("torch", "lightning", "transformers", "trl", "palm-rlhf-pytorch", "litgpt", "datasets")


def instructions() -> dict[str, bool]:
    """Instruction sets that targets depend on."""
    able = torch.cpu.get_capabilities()
    names = ("avx2", "avx512", "avx512_bf16", "amx_bf16", "avx512_vnni")
    found = {name: bool(able.get(name, False)) for name in names}
    # of other processors torch does not tell, and they are trusted
    found["bf16"] = able.get("architecture") != "x86_64" or found["avx512_bf16"] or found["amx_bf16"]
    return found


def processor() -> str:
    """Its name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of the packages in this environment."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def facts(threads: int) -> dict[str, Any]:
    """Processor, instructions, threads, versions."""
    return {
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "instructions": instructions(),
        "versions": versions(),
    }


def matmul_rate(dtype: torch.dtype, size: int, hot: bool) -> float:
    """FLOPs a second of a square product: `hot`, the same matrices again and again; else a fresh pair each time."""
    count = 1 if hot else 4
    pairs = [(torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)) for _ in range(count)]
    best = float("inf")
    for round_of in range(4):
        a, b = pairs[round_of % count]
        start = time.perf_counter()
        a @ b.t()  # as a linear layer multiplies
        seconds = time.perf_counter() - start
        best = min(best, seconds if round_of else float("inf"))  # the first is the warm-up
    return 2 * size**3 / best


def measured(sizes: list[int], num_bytes: int) -> Work:
    """Peaks of the machine: matrix products by type and size, and reading an array much larger than the caches."""
    from lit_palm.models.hardware import measure_peak_bandwidth

    def run() -> dict[str, Any]:
        host = torch.Generator().device
        # without instructions for it a large product of bfloat16 numbers takes minutes
        asked = {torch.float32: sizes, torch.bfloat16: sizes if instructions()["bf16"] else [min(256, *sizes)]}
        rates = {
            str(dtype).removeprefix("torch."): {
                f"{'hot' if hot else 'cold'} {size}": matmul_rate(dtype, size, bool(hot))
                for size in some
                for hot in (1, 0)
            }
            for dtype, some in asked.items()
        }
        peaks = {name: max(by_size.values()) for name, by_size in rates.items()}
        bandwidth = measure_peak_bandwidth(host, num_bytes)
        return {"matmul_flops": rates, "peak_flops": peaks, "peak_bandwidth": bandwidth}

    return run
