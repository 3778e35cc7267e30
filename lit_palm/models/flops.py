"""Parameters and floating-point operations of a transformer, as pure functions of its shape.

A matrix product with N weights takes 2N operations a token forward and 4N backward. Attention adds, for each of L
layers with H heads of width Q over T tokens, 4HQT forward and 8HQT backward, which leaves causality out as the PaLM
paper does (Chowdhery et al. 2022, appendix B), so that figures compare:

    flops a token = 6N + 12 L H Q T
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lit_palm.models.base import ScalarNetwork

__all__ = [
    "attention_flops",
    "flops_per_token",
    "forward_flops",
    "gpt_parameters",
    "model_flops_utilisation",
    "palm_parameters",
    "training_flops",
]


def palm_parameters(
    *,
    d_model: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    vocab_size: int,
    num_kv_heads: int = 1,
    d_ffn: int = 0,
) -> int:
    """Parameters of a PaLM: tied embedding, and blocks of one norm, q, k, v, two halves of SwiGLU and two outputs."""
    d_ffn = d_ffn or 4 * d_model
    fused = (num_heads + 2 * num_kv_heads) * head_dim + 2 * d_ffn
    block = d_model * (fused + num_heads * head_dim + d_ffn) + d_model
    return vocab_size * d_model + num_layers * block + d_model


def gpt_parameters(*, d_model: int, num_layers: int, vocab_size: int, max_length: int, tied: bool = True) -> int:
    """Parameters of a GPT-2 or GPT-3 (Brown et al. 2020): a block holds 12 d^2 weights, 9 d biases and 4 d of norms."""
    block = 12 * d_model**2 + 13 * d_model
    tables = (vocab_size if tied else 2 * vocab_size) + max_length
    return num_layers * block + tables * d_model + 2 * d_model


def attention_flops(num_layers: int, num_heads: int, head_dim: int, length: int) -> int:
    """Operations a token of attention scores and their weighted sum, forward: 4 L H Q T."""
    return 4 * num_layers * num_heads * head_dim * length


def forward_flops(parameters: float, attention: float = 0.0) -> float:
    """Operations a token of a forward pass; `attention` from `attention_flops`."""
    return 2 * parameters + attention


def training_flops(parameters: float, attention: float = 0.0, recomputed: bool = False) -> float:
    """Operations a token of a forward and a backward pass (6N + 12LHQT), with one forward more where blocks are
    recomputed (8N, as BLOOM counted)."""
    return (4 if recomputed else 3) * forward_flops(parameters, attention)


def model_flops_utilisation(tokens_per_second: float, flops_a_token: float, devices: int, peak_flops: float) -> float:
    """The share of the peak that useful operations take (PaLM, appendix B); recomputation does not count."""
    return tokens_per_second * flops_a_token / (devices * peak_flops)


def flops_per_token(networks: Iterable[nn.Module], length: int) -> float:
    """Operations a token of training the given networks on rows of `length` tokens, recomputation left out.

    For `perf/mfu`: what a LightningModule offers as `flops_per_token`. Parameters that are not trained count a forward
    pass. A network whose configuration does not tell its heads counts without attention.
    """
    total = 0.0
    for network in networks:
        trunk = network.trunk if isinstance(network, ScalarNetwork) else network
        config = getattr(trunk, "config", None)
        layers, heads, width = (getattr(config, name, 0) for name in ("num_layers", "num_heads", "head_dim"))
        attention = attention_flops(layers, heads, width, length)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
        total += training_flops(trained, attention) if trained else forward_flops(0, attention)
        total += forward_flops(frozen)
    return total
