"""A PaLM as the architecture that transformers, vLLM and llama.cpp know it by: Cohere.

See `lit_palm.foreign.cohere` for what the two have in common. A scalar network becomes a sequence classifier of the
same trunk. xPos and the l2 norm of queries and keys have no counterpart there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_palm.data.tokenizers import Tokenizer
from lit_palm.foreign.cohere import interleaved
from lit_palm.foreign.network import Recipe, Weights
from lit_palm.models.palm import PaLMConfig

__all__ = ["CLASSIFIER", "cohere_architecture", "cohere_weights", "scalar_head"]

CLASSIFIER = "CohereForSequenceClassification"
"""The class is transformers' generic one over Cohere's trunk; the model card has its two lines."""


def cohere_architecture(config: PaLMConfig, tokenizer: Tokenizer, dtype: torch.dtype, where: str) -> dict[str, Any]:
    """The `config.json` of transformers.

    Args:
        config: of the network.
        tokenizer: gives the special ids.
        dtype: of the weights.
        where: the checkpoint, for errors.

    Raises:
        ValueError: the network has what Cohere's has not.
    """
    without = {
        "xpos: true (attention that decays with distance)": config.xpos,
        'qk_norm: "l2"': config.qk_norm == "l2",
    }
    wrong = [text for text, there in without.items() if there]
    if wrong:
        raise ValueError(
            f"{where}: its network has {' and '.join(wrong)}, which no architecture of transformers has: --format "
            "lit-palm keeps it as it is"
        )
    return {
        "architectures": ["CohereForCausalLM"],
        "model_type": "cohere",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ffn or 4 * config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_length,
        "layer_norm_eps": config.norm_eps,
        "logit_scale": config.d_model**-0.5 if config.logit_scale is None else config.logit_scale,
        "use_qk_norm": config.qk_norm == "layer",
        "rope_theta": config.rope_theta,  # vLLM, llama.cpp's converter and transformers 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # transformers 5
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def fused_parts(config: PaLMConfig) -> Iterator[tuple[str, int, int, int]]:
    """What is one matrix here (`attn_ffn_in`) and five there: name, first row, number of rows, and the heads whose rows
    are turned from half-split to interleaved pairs, 0 for none."""
    heads, kv_heads, dh = config.num_heads, config.num_kv_heads, config.head_dim
    d_ffn = config.d_ffn or 4 * config.d_model
    row = 0
    for name, rows, turned in (
        ("self_attn.q_proj", heads * dh, heads),
        ("self_attn.k_proj", kv_heads * dh, kv_heads),
        ("self_attn.v_proj", kv_heads * dh, 0),
        ("mlp.gate_proj", d_ffn, 0),
        ("mlp.up_proj", d_ffn, 0),
    ):
        yield name, row, rows, turned
        row += rows


def cohere_weights(config: PaLMConfig, weights: Mapping[str, Tensor], prefix: str, dtype: torch.dtype) -> Weights:
    """The weights by their names there, made when they are asked for.

    Args:
        config: of the network.
        weights: of the checkpoint, read when they are asked for.
        prefix: of the network's names in it.
        dtype: they are given this type.
    """
    heads, kv_heads, dh, d = config.num_heads, config.num_kv_heads, config.head_dim, config.d_model
    d_ffn = config.d_ffn or 4 * d
    recipes: dict[str, Recipe] = {}
    last: list[tuple[str, Tensor]] = []

    def read(name: str) -> Tensor:
        if not last or last[0][0] != name:  # five of theirs are parts of one of ours, which is put together once
            last[:] = [(name, weights[prefix + name])]
        return last[0][1]

    def give(theirs: str, ours: str, shape: tuple[int, ...], start: int | None = None, turned: int = 0) -> None:
        def make() -> Tensor:
            tensor = read(ours)
            tensor = tensor if start is None else tensor[start : start + shape[0]]
            return interleaved(tensor, turned) if turned else tensor

        recipes[theirs] = Recipe(shape, dtype, make)

    give("model.embed_tokens.weight", "embedding.weight", (config.vocab_size or 0, d))
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        give(f"{theirs}.input_layernorm.weight", f"{ours}.norm.weight", (d,))
        for name, row, rows, turned in fused_parts(config):
            give(f"{theirs}.{name}.weight", f"{ours}.attn_ffn_in.weight", (rows, d), row, turned)
        give(f"{theirs}.self_attn.o_proj.weight", f"{ours}.attn_out.weight", (d, heads * dh))
        give(f"{theirs}.mlp.down_proj.weight", f"{ours}.ffn_out.weight", (d, d_ffn))
        if config.qk_norm == "layer":
            for side, count in (("q", heads), ("k", kv_heads)):
                give(f"{theirs}.self_attn.{side}_norm.weight", f"{ours}.{side}_norm.weight", (count, dh), None, count)
    give("model.norm.weight", "norm.weight", (d,))
    return Weights(recipes)


def scalar_head(weights: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Recipe, float]:
    """The weight of a sequence classifier's score, which has no bias, and the bias that is left out with it.

    (w h + b - offset) / scale is one weight and one constant, and a constant changes no comparison of two scores.
    """
    bias, offset, scale = (float(weights[name]) for name in ("head.bias", "offset", "scale"))

    def make() -> Tensor:
        return weights["head.weight"] / scale

    shape = tuple(weights["head.weight"].shape)
    return Recipe(shape, dtype, make), (bias - offset) / scale
