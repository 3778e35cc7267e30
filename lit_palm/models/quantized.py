"""Frozen matrices in 4 or 8 bits, through `bitsandbytes`: what QLoRA (Dettmers et al. 2023) puts adapters on.

The linear layers of the blocks are replaced; embedding, norms and heads stay as they are. What is computed is computed
in the dtype that the matrix had.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lit_palm.models.base import Network
from lit_palm.models.lora import Bits, is_transposed, linear_layers

__all__ = ["quantize"]


def quantize(network: Network, bits: Bits) -> None:
    """Quantise the linear layers in the blocks of a network, in place.

    Args:
        network: with its weights.
        bits: `4bit` is NF4 with quantised scales, `8bit` is LLM.int8.

    Raises:
        ValueError: the network keeps its matrices in a way that `bitsandbytes` does not read.
    """
    for name, layer in linear_layers(network).items():
        if is_transposed(layer):
            raise ValueError(
                f"model.lora.quantize: {name} of a {type(network).__name__} keeps its matrix as [in, out], which "
                "bitsandbytes does not read: leave it out"
            )
        assert isinstance(layer, nn.Linear)
        path, _, own = name.rpartition(".")
        setattr(network.get_submodule(path), own, _quantized(layer, bits))
    # what peft looks at to choose its layers
    setattr(network, f"is_loaded_in_{bits}", True)


def _quantized(layer: nn.Linear, bits: Bits) -> nn.Module:
    from bitsandbytes import nn as bnb

    weight, has_bias = layer.weight.detach(), layer.bias is not None
    made: Any
    with torch.device("meta"):
        if bits == "4bit":
            made = bnb.Linear4bit(layer.in_features, layer.out_features, has_bias, compute_dtype=weight.dtype,
                                  compress_statistics=True, quant_type="nf4")  # fmt: skip
        else:
            made = bnb.Linear8bitLt(layer.in_features, layer.out_features, has_bias, has_fp16_weights=False)
    if bits == "4bit":
        # on a host it would repack the matrix in evaluation, and from then on give no gradients
        made.support_avx512bf16_for_cpu = False
        made.weight = bnb.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
        )
    else:
        made.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to(weight.device)  # type: ignore[no-any-return]  # which quantises
