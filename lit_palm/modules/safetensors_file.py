"""Write a safetensors file one tensor at a time: safetensors' own `save_file` holds all of them in memory at once.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length, little-endian; the
header, JSON that gives type, shape and place of every tensor; then the tensors' bytes, one after the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["TYPES", "write_safetensors"]

TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
"""Names of the types in the format."""


def write_safetensors(
    path: str, names: Mapping[str, str], weights: Mapping[str, Tensor], shapes: Mapping[str, Tensor] | None = None
) -> None:
    """Write tensors; the file appears when it is whole.

    Args:
        path: the file.
        names: name in the file -> key in `weights`.
        weights: the tensors, which are asked for one by one: for their values, and for their shapes without `shapes`.
        shapes: the same tensors without values, on the meta device, where making one takes long.

    Raises:
        ValueError: a tensor is of a type that the format does not know.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    entries = []
    for name in names:
        tensor = (weights if shapes is None else shapes)[names[name]]
        if tensor.dtype not in TYPES:
            raise ValueError(f"{path}: {name} is of type {tensor.dtype}, which safetensors files cannot hold")
        entries.append((-tensor.element_size(), name, tensor.dtype, list(tensor.shape), tensor.nbytes))
    entries.sort()  # the widest first, so that each begins at a multiple of its width
    for _, name, dtype, shape, size in entries:
        header[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    new = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.tmp")
    try:
        with open(new, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, name, *_ in entries:
                tensor = weights[names[name]].detach().cpu().contiguous()
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
        os.replace(new, path)
    except BaseException:
        if os.path.exists(new):
            os.unlink(new)
        raise
