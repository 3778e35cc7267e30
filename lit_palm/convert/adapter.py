"""The adapter of a LoRA checkpoint in the layout of `peft`, to be loaded over the frozen network in transformers.

Of a network of transformers the names are the same but for a prefix. Of a PaLM the frozen network is in Cohere's layout
there (export the base beside it), where q, k, v, gate and up are five weights and not one: an update B A of the one is
five updates with the same A and each its rows of B, those of q and k in the order of Cohere's rotary pairs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lit_palm.convert.card import adapter_card
from lit_palm.convert.chosen import Chosen
from lit_palm.convert.folder import new_folder
from lit_palm.convert.tokenizer_files import write_tokenizer
from lit_palm.foreign.as_cohere import cohere_architecture, fused_parts, scalar_head
from lit_palm.foreign.cohere import interleaved
from lit_palm.models.base import NetworkConfig
from lit_palm.models.palm import PaLMConfig
from lit_palm.modules.safetensors_file import write_safetensors
from lit_palm.modules.weights import blueprint
from lit_palm.modules.whole import WholeWeights

__all__ = ["adapter_weights", "export_adapter"]

_HEAD = ("head.weight", "head.bias", "offset", "scale")


def adapter_weights(adapted: Any, config: NetworkConfig) -> dict[str, Tensor]:
    """The adapter by the names that `peft` saves it under, and of a reward model its score.

    Args:
        adapted: of the blueprint of a LoRA checkpoint.
        config: of the network.
    """
    found: dict[str, Tensor] = {}
    for name in adapted.weights.names():
        if name in _HEAD:
            continue
        layer, _, part = name.rpartition(".lora_")
        tensor = _whole(adapted.weights, name)
        # peft leaves out of a magnitude's name that it is the weight of a module
        part = f"lora_{part}".replace("magnitude_vector.weight", "magnitude_vector")
        places = _cohere(layer, part, tensor, config) if isinstance(config, PaLMConfig) else [(layer[3:], tensor)]
        for place, weight in places:
            found[f"base_model.model.{place}.{part}"] = weight.contiguous()
    return found


def _cohere(layer: str, part: str, tensor: Tensor, config: PaLMConfig) -> Iterable[tuple[str, Tensor]]:
    """Where a part of the adapter of one of our layers goes in Cohere's layout."""
    _, index, own = layer.split(".")
    place = f"model.layers.{index}"
    if own != "attn_ffn_in":
        yield f"{place}.{'self_attn.o_proj' if own == 'attn_out' else 'mlp.down_proj'}", tensor
        return
    for name, row, rows, turned in fused_parts(config):
        if part.startswith("lora_A"):
            yield f"{place}.{name}", tensor
        else:
            mine = tensor[row : row + rows]
            yield f"{place}.{name}", interleaved(mine, turned) if turned else mine


def export_adapter(chosen: Chosen, target: str, base: str | None = None, name: str | None = None) -> None:
    """Write a folder that `peft` loads: adapter, its configuration, tokeniser and model card.

    Args:
        chosen: a network of a LoRA checkpoint.
        target: the folder, path or fsspec URL.
        base: folder or hub name of the frozen network in transformers; None: where a network of transformers was read.
        name: what the model card calls it; None: as the folder.

    Raises:
        ValueError: it is no LoRA checkpoint, transformers has no layout for it, or `peft` is missing.
    """
    path, config = chosen.checkpoint.path, chosen.config
    found = blueprint(path, chosen.role)
    adapted: Any = getattr(found, "adapted", None)
    if adapted is None:
        raise ValueError(f"{path}: its {chosen.role} network has no adapter: leave --lora adapter out")
    try:
        from peft import LoraConfig, TaskType
    except ImportError as error:
        raise ValueError("writing an adapter takes a package: pip install 'lit-palm[lora]'") from error
    if isinstance(config, PaLMConfig):
        cohere_architecture(config, chosen.tokenizer, torch.float32, path)  # or why there is none
    elif base is None:
        base = adapted.base.path
    weights = adapter_weights(adapted, config)
    targets = sorted({key.rpartition(".lora_")[0].rpartition(".")[2] for key in weights})
    scalar, bias = found.pooling is not None, 0.0
    if scalar:
        recipe, bias = scalar_head(WholeWeights(path, chosen.role), _whole(adapted.weights, "head.weight").dtype)
        weights["base_model.model.score.weight"] = recipe.make()
    lora, layers = adapted.lora, {key.rpartition(".lora_")[0] for key in adapted.weights.names() if ".lora_" in key}
    described = LoraConfig(
        task_type=TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        # GPT-2's layers keep their matrices as [in, out]
        fan_in_fan_out=any(type(adapted.trunk.empty.get_submodule(layer)).__name__ == "Conv1D" for layer in layers),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=["score"] if scalar else None,
        inference_mode=True,
    )
    with new_folder(target) as folder:
        write_tokenizer(folder, chosen.tokenizer, config.max_length, path)
        write_safetensors(os.path.join(folder, "adapter_model.safetensors"), {key: key for key in weights}, weights)
        with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
            name = name or os.path.basename(target.rstrip("/"))
            file.write(adapter_card(chosen.checkpoint.header, name, base, scalar, bias))
        described.save_pretrained(folder)  # last: it says what the folder is


def _whole(source: Any, name: str) -> Tensor:
    shape = source.shape(name)
    rows: Tensor = source.rows(name, 0, shape[0])
    return rows
