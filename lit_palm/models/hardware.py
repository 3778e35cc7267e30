"""What a device can do: whether it multiplies 16-bit numbers, and its measured peaks.

A rate means something beside the fastest that the device can do. Training is bound by matrix products
(`measure_peak_flops`), decoding by reading the weights once a token (`measure_peak_bandwidth`). Both time a bare torch
kernel for a fraction of a second; what runs is never chosen by them, so that a run can be repeated bit by bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from lit_palm.models.products import product
from lit_palm.native import capabilities

__all__ = ["is_host", "measure_peak_bandwidth", "measure_peak_flops", "multiplies", "useful_dtype"]


def _host_multiplies(dtype: torch.dtype) -> bool:
    """Whether the host's processor has instructions for dot products of a 16-bit type.

    An x86 processor without them converts every number on its way into each product, which here took 6 times as long
    as float32 (AVX2) and 2 times (AVX-512). Of other architectures torch does not tell, nor does an older torch; they
    are trusted.
    """
    if dtype in _KNOWN:
        return _KNOWN[dtype]
    able = capabilities()
    names = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
    foreign = able.get("architecture") != "x86_64"
    _KNOWN[dtype] = foreign or any(able.get(name, False) for name in names[dtype])
    return _KNOWN[dtype]


_KNOWN: dict[torch.dtype, bool] = {}
"""What has been found out; a plain table, which compiled code reads."""


def multiplies(tensor_or_device: Tensor | torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products of a type are at least as quick as float32 ones, by what the device is, not by timing.

    Args:
        tensor_or_device: where; every accelerator is taken to have them.
        dtype: of both factors.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    device = tensor_or_device.device if isinstance(tensor_or_device, Tensor) else tensor_or_device
    return not is_host(device) or _host_multiplies(dtype)


def is_host(device: torch.device) -> bool:
    """Whether a device is the processor that Python runs on."""
    return device.type == _HOST.type


_HOST = torch.Generator().device


def useful_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The type that products of `dtype` are best computed in: float32 where the device does not multiply 16 bits."""
    return dtype if multiplies(device, dtype) else torch.float32


def measure_peak_flops(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOPs a second of the fastest large matrix product on a device: what a perfect step could reach.

    Of a 16-bit type that the device does not multiply, that of float32, which such a step had better use; in float32
    the quicker of torch's own product and of that which networks are given.
    """
    best, seconds, size = 0.0, 0.0, 256
    while seconds < 0.02 and size <= 16384:
        matrix = torch.ones(size, size, device=device, dtype=useful_dtype(device, dtype))
        # the first is the warm-up; reading one element waits for the device
        for _ in range(3):
            seconds = min(_seconds(lambda m=matrix: m @ m), _seconds(lambda m=matrix: product(m, m)))  # type: ignore[misc]
            best = max(best, 2 * size**3 / seconds)
        size *= 2
    return best


def measure_peak_bandwidth(device: torch.device, num_bytes: int = 2**28, repeats: int = 5) -> float:
    """Bytes a second that a device reads from memory, as the weights of a decoding step are read.

    The best of several sums over one large tensor, which must not fit the caches.

    Args:
        device: which one.
        num_bytes: of the tensor.
        repeats: times it is read; the first read is a warm-up too.
    """
    values = torch.ones(num_bytes // 4, device=device)
    return num_bytes / min(_seconds(values.sum) for _ in range(repeats))


def _seconds(work: Callable[[], Tensor]) -> float:
    """Wall time until the result of some work is there."""
    start = time.perf_counter()
    float(work().view(-1)[0])
    return max(time.perf_counter() - start, 1e-9)
