"""A Hugging Face network as the PaLM that the formulas of a plan are for: the same width, depth and heads, and a
feed-forward as wide as gives it as many parameters."""

from __future__ import annotations

import torch

from lit_palm.models.base import NetworkConfig
from lit_palm.models.flops import palm_parameters
from lit_palm.models.huggingface_config import HuggingFaceConfig
from lit_palm.models.palm import PaLMConfig

__all__ = ["palm_like"]


def palm_like(config: NetworkConfig, notes: list[str]) -> PaLMConfig:
    """The PaLM that a network is counted as.

    Args:
        config: of the network.
        notes: filled with what was assumed.

    Raises:
        ValueError: it is of a kind that says nothing of its shape.
    """
    if isinstance(config, PaLMConfig):
        return config
    if not isinstance(config, HuggingFaceConfig):
        raise ValueError(
            f"model.network is a {type(config).__name__}: the formulas of a plan are those of PaLM; say --network with "
            "a PaLM of its size"
        )
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in config.build().parameters())
    own = config.of_transformers
    sizes = {"d_model": own.hidden_size, "num_layers": config.num_layers, "num_heads": config.num_heads}
    kv_heads = int(getattr(own, "num_key_value_heads", None) or config.num_heads)
    assert config.vocab_size is not None
    sizes |= {"head_dim": config.head_dim, "vocab_size": config.vocab_size, "num_kv_heads": kv_heads}
    narrow = palm_parameters(**sizes, d_ffn=1)
    step = palm_parameters(**sizes, d_ffn=2) - narrow
    width = max(1, 1 + round((parameters - narrow) / step))
    note = f"a {own.model_type} of {parameters:,} parameters, counted as a PaLM of its shape and size"
    if note not in notes:
        notes.append(note)
    return PaLMConfig(
        **sizes,
        d_ffn=width,
        max_length=config.max_length,
        dropout=config.dropout,
        activation_checkpointing=config.activation_checkpointing,
    )
