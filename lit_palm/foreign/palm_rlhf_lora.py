"""LoRA scopes of palm-rlhf-pytorch: `finetune_modules.SCOPE.LAYER.{0..3}.{A,B}` for q, k, v and the output.

There y = W x + (A B)^T x with A [D, r], B [r, out] and alpha = r. Queries, keys and values are rows of one weight here,
so their three adapters are one of rank 3r whose B is block-diagonal: exactly the same function. The output's is given
the same rank, with columns of zeros in B, because adapters here have one rank. It is kept in the layout of `peft`, on
`attn_ffn_in` and `attn_out`, with alpha = rank.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_palm.foreign.network import Recipe
from lit_palm.foreign.tensors import Tensors
from lit_palm.models.palm import PaLMConfig

__all__ = ["adapter", "merged", "scopes"]


def scopes(tensors: Tensors) -> list[str]:
    """The names of the scopes, in order."""
    found = (re.match(r"finetune_modules\.(.+)\.\d+\.[0-3]\.[AB]$", name) for name in tensors)
    return list(dict.fromkeys(m[1] for m in found if m))


def _factors(tensors: Tensors, config: PaLMConfig, scope: str, layer: int) -> list[tuple[Tensor, Tensor]]:
    """A and B of q, k, v and the output.

    Raises:
        ValueError: one is missing, or has another shape.
    """
    inner, dh, d = config.num_heads * config.head_dim, config.head_dim, config.d_model
    pairs = []
    for place, (rows, columns) in enumerate(((d, inner), (d, dh), (d, dh), (inner, d))):
        stem = f"finetune_modules.{scope}.{layer}.{place}"
        if f"{stem}.A" not in tensors or f"{stem}.B" not in tensors:
            raise ValueError(f"{tensors.where}: lacks {stem}.A or .B of LoRA scope {scope}")
        a, b = tensors[f"{stem}.A"], tensors[f"{stem}.B"]
        if a.shape != (rows, b.shape[0]) or b.shape[1] != columns:
            raise ValueError(
                f"{tensors.where}: {stem}.A {tuple(a.shape)} and .B {tuple(b.shape)} do not fit the network"
            )
        pairs.append((a, b))
    return pairs


def _update(a: Tensor, b: Tensor) -> Tensor:
    """What a pair adds to a weight, [out, in], in float32 or wider."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) @ b.to(wide)).t()


def merged(tensors: Tensors, config: PaLMConfig, scope: str, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """The weights that a scope changes, with it added.

    Raises:
        ValueError: the scope does not fit the network.
    """

    def qkv(layer: int, base: Recipe) -> Tensor:
        weight = base.make()
        delta = torch.cat([_update(*pair) for pair in _factors(tensors, config, scope, layer)[:3]])
        weight[: len(delta)] = (weight[: len(delta)] + delta).to(weight.dtype)
        return weight

    def out(layer: int, base: Recipe) -> Tensor:
        return base.make() + _update(*_factors(tensors, config, scope, layer)[3])

    changed: dict[str, Recipe] = {}
    for layer in range(config.num_layers):
        _factors(tensors, config, scope, layer)  # refuses before anything is written
        for name, make in (("attn_ffn_in", qkv), ("attn_out", out)):
            base = recipes[f"layers.{layer}.{name}.weight"]
            changed[f"layers.{layer}.{name}.weight"] = dataclasses.replace(base, make=partial(make, layer, base))
    return changed


def adapter(tensors: Tensors, config: PaLMConfig, scope: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A scope as `peft` would have saved it from our PaLM: configuration and weights.

    Raises:
        ValueError: the scope does not fit the network.
    """
    weights: dict[str, Tensor] = {}
    rank = 0
    for layer in range(config.num_layers):
        *qkv, (a_out, b_out) = _factors(tensors, config, scope, layer)
        rank = a_out.shape[1]
        stem = f"base_model.model.layers.{layer}"
        block = torch.block_diag(*(b.t() for _, b in qkv))
        rest = 2 * (config.d_ffn or 4 * config.d_model)
        weights[f"{stem}.attn_ffn_in.lora_A.weight"] = torch.cat([a.t() for a, _ in qkv])
        weights[f"{stem}.attn_ffn_in.lora_B.weight"] = torch.cat((block, block.new_zeros(rest, block.shape[1])))
        # what is added to A is read by zeros of B; were it zero too, neither would ever get a gradient
        weights[f"{stem}.attn_out.lora_A.weight"] = torch.cat([a_out.t()] * 3)
        weights[f"{stem}.attn_out.lora_B.weight"] = torch.cat((b_out.t(), b_out.new_zeros(b_out.shape[1], 2 * rank)), 1)
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "target_modules": ["attn_ffn_in", "attn_out"],
        "r": 3 * rank,
        "lora_alpha": 3 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    return described, weights
