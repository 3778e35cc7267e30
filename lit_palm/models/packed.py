"""Products with weights in the layout of oneDNN, which torch is built with: quickest for the few rows of decoding."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["multiplies_quickly", "pack", "packed_product", "packs"]


@cache
def multiplies_quickly() -> bool:
    """Whether oneDNN has AVX-512 to multiply float32 numbers with, in this build of torch."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and packs(torch.float32)


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's product of packed weights of a type, and it is right."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:  # numbers so small that no sum of theirs is rounded
        x, weight = (torch.arange(n).remainder(3).to(dtype).view(-1, 8) for n in (16, 32))
        packed = pack(weight)
        with torch.autocast(x.device.type, enabled=False):  # under which torch's would have another type
            expected = x @ weight.t()
        products = packed_product(x, packed), packed_product(x, packed, expected) / 2
    except (AttributeError, RuntimeError):
        return False
    return all(torch.equal(result, expected) for result in products)


def pack(weight: Tensor) -> Tensor:
    """A weight [O, I] in oneDNN's own layout."""
    # those for 16 rows and more are the same, and good for fewer
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 16)
    return result


def packed_product(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x [N, I] times weight [O, I] transposed, of which the weight may be packed, and a residual [N, O] added to it."""
    # overloads by name: to find one takes as long as a small product
    result: Tensor
    if residual is None:
        result = torch.ops.mkldnn._linear_pointwise.default(x, weight, None, "none", [], "")
    else:
        result = torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, None, "add")
    return result
