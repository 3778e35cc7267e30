"""Cohere's first models (Command-R, Aya 23; `CohereForCausalLM`) as PaLMs of ours: the same block under other names.

Both are parallel attention and SwiGLU under one bias-free LayerNorm with tied embeddings. Two things differ: q, k, v,
gate and up are weights of their own there and rows of one here, and rotary pairs lie side by side there (2i, 2i + 1)
and half a head apart here (i, i + Dh/2), which is a permutation of the rows of q and k and of their norms.

Cohere2 has sliding windows in three of four blocks and is no PaLM.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor

from lit_palm.foreign.network import ForeignNetwork, Recipe, Weights, check_floating
from lit_palm.foreign.tensors import Tensors, open_tensors
from lit_palm.models.palm import PaLMConfig

__all__ = ["half_split", "interleaved", "read_architecture", "read_cohere"]


def half_split(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of q or k [H * Dh, ...], or weights of their norm [H, Dh]: pairs side by side -> half a head apart."""
    return _turned(weight, num_heads, (-1, 2))


def interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """The inverse of `half_split`."""
    return _turned(weight, num_heads, (2, -1))


def _turned(weight: Tensor, num_heads: int, pairs: tuple[int, int]) -> Tensor:
    rest = weight.shape[2:] if weight.dim() > 1 and weight.shape[0] == num_heads else weight.shape[1:]
    head_dim = weight.numel() // (num_heads * max(rest.numel(), 1))
    outer, inner = (n if n > 0 else head_dim // 2 for n in pairs)
    return weight.reshape(num_heads, outer, inner, *rest).transpose(1, 2).reshape(weight.shape)


def read_architecture(folder: str) -> dict[str, Any]:
    """The `config.json` of a transformers folder.

    Raises:
        ValueError: there is none, or it names no architecture.
    """
    path = os.path.join(folder, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise ValueError(f"{folder}: the folder has no config.json") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise ValueError(f"{path}: has no `model_type`, so it is no folder of transformers")
    return found


def read_cohere(folder: str, max_length: int | None = None) -> ForeignNetwork:
    """Read a folder of `CohereForCausalLM`, or of a sequence classifier that `lit-palm export` made.

    Args:
        folder: with config.json and safetensors or PyTorch shards.
        max_length: longest sequence in tokens; None: its `max_position_embeddings`.

    Raises:
        ValueError: it is another architecture, has what a PaLM has not, or misses weights.
    """
    found = read_architecture(folder)
    _check(folder, found)
    config = _config(folder, found, max_length)
    tensors = open_tensors(folder)
    check_floating(tensors)
    reward = any(str(name).endswith("ForSequenceClassification") for name in found.get("architectures") or [])
    recipes, used = _language_model(tensors, config)
    if "lm_head.weight" in tensors:
        used.add("lm_head.weight")
        if not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
            raise ValueError(
                f"{folder}: lm_head.weight differs from model.embed_tokens.weight, and a PaLM has one weight for both"
            )
    result = ForeignNetwork(folder, config, Weights(recipes))
    if reward:
        used.add("score.weight")
        _scalar_head(tensors, found, result)
    unknown = sorted(name for name in tensors if name not in used and not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        names = f"{', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}"
        raise ValueError(f"{folder}: has {names}, which a PaLM has no place for")
    return result


def _check(folder: str, found: dict[str, Any]) -> None:
    """Refuse what a PaLM cannot be.

    Raises:
        ValueError: naming what differs.
    """
    where, kind = f"{folder}/config.json", found["model_type"]
    if kind == "cohere2" or kind.startswith("cohere2"):
        raise ValueError(
            f"{where}: {kind} attends through a sliding window in most blocks and without positions in the others, "
            "which PaLM does not: only the first Cohere models (model_type cohere: Command-R, Aya 23) are PaLMs"
        )
    if kind != "cohere":
        raise ValueError(
            f"{where}: {kind} is another architecture than PaLM's (parallel attention and SwiGLU under one bias-free "
            "LayerNorm, tied embeddings). Name the folder itself as the `network` to train it as it is"
        )
    rope = {**(found.get("rope_scaling") or {}), **(found.get("rope_parameters") or {})}
    kind_of_rope = rope.get("rope_type", rope.get("type", "default")) or "default"
    differs = {
        f"attention_bias is {found.get('attention_bias')}": found.get("attention_bias", False),
        f"hidden_act is {found.get('hidden_act')}": found.get("hidden_act", "silu") not in ("silu", "swish"),
        "tie_word_embeddings is false": not found.get("tie_word_embeddings", True),
        f"rope_type is {kind_of_rope}": kind_of_rope != "default",
        f"partial_rotary_factor is {rope.get('partial_rotary_factor')}": rope.get("partial_rotary_factor", 1) != 1,
        "it is quantised (quantization_config)": found.get("quantization_config"),
    }
    wrong = [text for text, bad in differs.items() if bad]
    if wrong:
        raise ValueError(f"{where}: {', '.join(wrong)}, which a PaLM has no counterpart for")


def _config(folder: str, found: dict[str, Any], max_length: int | None) -> PaLMConfig:
    rope = found.get("rope_parameters") or {}
    try:
        width, heads = int(found["hidden_size"]), int(found["num_attention_heads"])
        return PaLMConfig(
            vocab_size=int(found["vocab_size"]),
            d_model=width,
            num_layers=int(found["num_hidden_layers"]),
            num_heads=heads,
            head_dim=int(found.get("head_dim") or width // heads),
            num_kv_heads=int(found.get("num_key_value_heads") or heads),
            d_ffn=int(found["intermediate_size"]),
            max_length=max_length or int(found.get("max_position_embeddings", 8192)),
            rope_theta=float(rope.get("rope_theta", found.get("rope_theta", 500000.0))),
            qk_norm="layer" if found.get("use_qk_norm") else "none",
            norm_eps=float(found.get("layer_norm_eps") or 1e-5),
            logit_scale=float(found["logit_scale"] if found.get("logit_scale") is not None else 0.0625),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json: lacks or misstates {error}") from error


def _language_model(tensors: Tensors, config: PaLMConfig) -> tuple[dict[str, Recipe], set[str]]:
    """Our weights by name, made from theirs, and the names of theirs.

    Raises:
        ValueError: one is missing or has another shape.
    """
    heads, kv_heads, dh, d = config.num_heads, config.num_kv_heads, config.head_dim, config.d_model
    d_ffn = config.d_ffn or 4 * d
    recipes: dict[str, Recipe] = {}
    used: set[str] = set()

    def take(name: str, shape: tuple[int, ...], *parts: tuple[str, tuple[int, ...], int]) -> None:
        """`parts`: name there, shape there, heads whose pairs are to be turned."""
        for theirs, expected, _ in parts:
            if theirs not in tensors:
                raise ValueError(f"{tensors.where}: lacks {theirs}")
            if tensors.shape(theirs) != expected:
                raise ValueError(
                    f"{tensors.where}: {theirs} has shape {tensors.shape(theirs)}, {expected} by its config"
                )
            used.add(theirs)
        dtype = tensors.dtype(parts[0][0])

        def make() -> Tensor:
            if len(parts) == 1:
                theirs, _, turned = parts[0]
                return half_split(tensors[theirs], turned) if turned else tensors[theirs]
            joined, row = torch.empty(shape, dtype=dtype), 0
            for theirs, (rows, *_), turned in parts:  # one of theirs at a time beside the result
                tensor = tensors[theirs]
                joined[row : row + rows] = half_split(tensor, turned) if turned else tensor
                row += rows
            return joined

        recipes[name] = Recipe(shape, dtype, make)

    vocabulary = (config.vocab_size or 0, d)
    take("embedding.weight", vocabulary, ("model.embed_tokens.weight", vocabulary, 0))
    take("norm.weight", (d,), ("model.norm.weight", (d,), 0))
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        attention, ffn = f"{theirs}.self_attn", f"{theirs}.mlp"
        take(f"{ours}.norm.weight", (d,), (f"{theirs}.input_layernorm.weight", (d,), 0))
        take(
            f"{ours}.attn_ffn_in.weight",
            ((heads + 2 * kv_heads) * dh + 2 * d_ffn, d),
            (f"{attention}.q_proj.weight", (heads * dh, d), heads),
            (f"{attention}.k_proj.weight", (kv_heads * dh, d), kv_heads),
            (f"{attention}.v_proj.weight", (kv_heads * dh, d), 0),
            (f"{ffn}.gate_proj.weight", (d_ffn, d), 0),
            (f"{ffn}.up_proj.weight", (d_ffn, d), 0),
        )
        take(f"{ours}.attn_out.weight", (d, heads * dh), (f"{attention}.o_proj.weight", (d, heads * dh), 0))
        take(f"{ours}.ffn_out.weight", (d, d_ffn), (f"{ffn}.down_proj.weight", (d, d_ffn), 0))
        if config.qk_norm == "layer":
            for side, count in (("q", heads), ("k", kv_heads)):
                shape = (count, dh)
                take(f"{ours}.{side}_norm.weight", shape, (f"{attention}.{side}_norm.weight", shape, count))
    return recipes, used


def _scalar_head(tensors: Tensors, found: dict[str, Any], result: ForeignNetwork) -> None:
    """Put the scalar head of a sequence classifier on; what its score leaves out of ours is in the configuration."""
    d, folder = result.config.d_model, tensors.where
    if "score.weight" not in tensors or tensors.shape("score.weight") != (1, d):
        raise ValueError(f"{folder}: has no score.weight of shape (1, {d}); a reward model scores with one number")
    recipes = {f"trunk.{name}": recipe for name, recipe in result.weights.recipes.items()}
    dtype = tensors.dtype("score.weight")
    bias = float((found.get("lit_palm") or {}).get("score_bias", 0.0))
    recipes["head.weight"] = Recipe((1, d), dtype, lambda: tensors["score.weight"])
    recipes["head.bias"] = Recipe((1,), dtype, lambda: torch.full((1,), bias))
    recipes["offset"] = Recipe((), torch.float32, lambda: torch.zeros(()))
    recipes["scale"] = Recipe((), torch.float32, lambda: torch.ones(()))
    result.weights, result.role, result.pooling = Weights(recipes), "reward", "last"
