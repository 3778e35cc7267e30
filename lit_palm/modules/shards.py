"""Weights as safetensors of at most a given size, with the index that transformers reads when there are several."""

from __future__ import annotations

import json
import os

from lit_palm.foreign.network import Weights
from lit_palm.modules.safetensors_file import write_safetensors

__all__ = ["write_shards"]


def write_shards(folder: str, weights: Weights, max_bytes: int) -> None:
    """Write weights in their order, one in memory at a time.

    Args:
        folder: gets `model.safetensors`, or `model-00001-of-00002.safetensors` and so on with
            `model.safetensors.index.json`.
        weights: by name.
        max_bytes: of one file; a single weight may be larger.
    """
    shapes = weights.shapes
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        if shards[-1] and filled + shape.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += shape.nbytes
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(os.path.join(folder, file), {name: name for name in names}, weights, shapes)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(shape.nbytes for shape in shapes.values())
        with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as out:
            json.dump({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, out, indent=2)
