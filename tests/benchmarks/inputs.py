"""The sizes and the random inputs that all sides share; torch alone, since the peers' environment has no lit_palm."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Size", "dtype_of", "lengths_of_documents", "parameters", "preference_pairs", "text", "token_ids", "vowels"]


@dataclass(frozen=True)
class Size:
    """A network. The defaults are those of palm-rlhf-pytorch's own example: about 30M parameters."""

    d_model: int = 512
    num_layers: int = 8
    num_heads: int = 8
    vocab_size: int = 263
    """Bytes and the special ids of `ByteTokenizer`."""
    max_length: int = 2048

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads


def parameters(size: Size) -> int:
    """Weights that a token is multiplied with: queries, one key and value, output, a gated layer of 4 d, the head."""
    attention = size.d_model * (2 * size.d_model + 2 * size.head_dim)
    return size.num_layers * (attention + 12 * size.d_model**2) + size.vocab_size * size.d_model


def dtype_of(precision: str) -> torch.dtype:
    """The type of the weights under a Trainer's precision."""
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def token_ids(seed: int, rows: int, length: int, vocab_size: int = 256) -> Tensor:
    """[rows, length] ids from 1 on."""
    return torch.randint(1, vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def lengths_of_documents(count: int, low: int, high: int) -> list[int]:
    """Log-normal: the middle of the range on a logarithmic scale, spread so that 8% lie outside and are cut to it."""
    scale = torch.tensor([low, high], dtype=torch.float64).log()
    normal = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = (scale.mean() + normal * (scale[1] - scale[0]) / 3.5).exp()
    return [int(length) for length in drawn.round().clamp(low, high)]


def text(number: int, length: int) -> str:
    """Letters that depend on the number: one byte, one token each."""
    generator = torch.Generator().manual_seed(number)
    return "".join(string.ascii_lowercase[i] for i in torch.randint(26, (length,), generator=generator).tolist())


def preference_pairs(count: int, prompt: int, answer: int) -> list[dict[str, str]]:
    """Pairs of answers to a prompt they share, in tokens; an EOS is added to each answer."""
    return [
        {
            "prompt": text(3 * i, prompt),
            "chosen": text(3 * i + 1, answer - 1),
            "rejected": text(3 * i + 2, answer - 1),
        }
        for i in range(count)
    ]


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between completions and costs nothing."""
    return [sum(text.count(vowel) for vowel in "aeiou") / 8 for text in completions]
