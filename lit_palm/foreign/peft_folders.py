"""Folders of `peft`: a LoRA adapter and its configuration, read as a checkpoint that names the network it stands on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_palm.foreign.safetensors_files import SafetensorsFiles
from lit_palm.foreign.shapes import Renamed

__all__ = ["adapter_base", "adapter_entry", "adapter_weights", "is_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# what would change what the adapter computes, and what it has to be for ours to be the same
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "lora_bias": (False, None), "modules_to_save": (None, []), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None), "layers_pattern": (None, []), "layer_replication": (None,),
    "use_bdlora": (None, False), "alora_invocation_tokens": (None,), "arrow_config": (None,),
    "target_parameters": (None, []), "trainable_token_indices": (None,),
}  # fmt: skip


def is_adapter(path: str) -> bool:
    """Whether something local is a folder that `peft` saved, and not a whole model with an adapter in it."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").exists()


def _read(path: str) -> dict[str, Any]:
    place = Path(path) / CONFIG
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else None
        raise ValueError(f"{place}: is an adapter of kind {kind!r}, and only LORA can be read")
    if found.get("task_type") not in ("CAUSAL_LM", None):
        raise ValueError(f"{place}: is an adapter for {found['task_type']}, and only those of CAUSAL_LM can be read")
    other = {key: found[key] for key, plain in _PLAIN.items() if key in found and found[key] not in plain}
    if other:
        settings = ", ".join(f"{key}: {value}" for key, value in other.items())
        raise ValueError(f"{place}: has {settings}, which is not supported: merge the adapter with peft, and use that")
    return found


def adapter_base(path: str) -> str:
    """The network that an adapter stands on: a name on the hub, or a folder, which may lie beside it.

    Raises:
        ValueError: the configuration is none of LoRA, or names none.
    """
    named = _read(path).get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{Path(path) / CONFIG}: names no base_model_name_or_path, so what it stands on is not known")
    beside = Path(path).parent / str(named)
    place = beside if not os.path.exists(named) and beside.exists() else Path(named)
    return os.path.abspath(place) if place.exists() else str(named)


def adapter_entry(path: str) -> dict[str, Any]:
    """The `lora` entry of the checkpoint that the folder stands for, without its base.

    Raises:
        ValueError: the configuration is none of LoRA, or has settings that are not supported.
    """
    found = _read(path)
    layers = [key.partition(".lora_")[0] for key in adapter_weights(path)]
    return {
        "rank": found["r"],
        "alpha": float(found["lora_alpha"]),
        "targets": list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers)),
        "dropout": float(found.get("lora_dropout") or 0.0),
        "rslora": bool(found.get("use_rslora")),
        "dora": bool(found.get("use_dora")),
        "quantize": None,
    }


def adapter_weights(path: str) -> Mapping[str, Tensor]:
    """The adapter by the names it has in a checkpoint, as that of the policy.

    Raises:
        ValueError: the file is missing, cut short, or holds something else.
    """
    place = Path(path) / WEIGHTS
    if not place.is_file():
        raise ValueError(
            f"{path}: has no {WEIGHTS}; a pickle (adapter_model.bin) can run any code when it is opened: save it again "
            "with a peft of today"
        )
    files = SafetensorsFiles([place])
    return Renamed(files, {_own(key, place): key for key in files}, prefix="")


def _own(key: str, place: Path) -> str:
    layer, found, part = key.removeprefix(_PREFIX).rpartition(".lora_")
    part = part.removesuffix(".weight")
    if not found or part not in ("A", "B", "magnitude_vector"):
        raise ValueError(f"{place}: holds {key}, and only adapters of linear layers can be read")
    return f"networks.shared.trunk.lm.{layer}.lora_{part}.policy.weight"
