"""Checkpoints of tiny networks whose every weight, norms too, differs from what it starts with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_palm.data.tokenizers import BPETokenizer, ByteTokenizer, HFTokenizer, Tokenizer
from lit_palm.models.base import ScalarNetwork
from lit_palm.models.palm import PaLMConfig
from lit_palm.modules.checkpoint import FORMAT, network_to_dict
from tests.support import sentence

SHAPES: dict[str, dict[str, Any]] = {
    "multi-query": {},
    "grouped, wide heads": {"num_kv_heads": 2, "head_dim": 12, "d_ffn": 40},
    "multi-head, norms": {"num_kv_heads": 4, "qk_norm": "layer", "logit_scale": 0.3, "rope_theta": 500.0},
    "grouped, norms": {"num_kv_heads": 2, "qk_norm": "layer", "norm_eps": 1e-3},
}
"""The shapes that Cohere's layout can hold."""


def palm(seed: int = 0, scalar: bool = False, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    sizes = {"vocab_size": 280, "d_model": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8, "max_length": 128}
    torch.manual_seed(seed)
    network: nn.Module = PaLMConfig(**{**sizes, **changes}).build()
    if scalar:
        network = ScalarNetwork(network)  # type: ignore[arg-type]
        network.calibrate(torch.tensor(0.7), torch.tensor(1.9))
        nn.init.constant_(network.head.bias, 0.4)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    return network.to(dtype).eval()


def texts() -> list[str]:
    return [sentence(i) + f" {i}, don't {'éa' * (i % 3)} \U0001f642\n  {i * 37}!" for i in range(40)]


def bpe(size: int = 280) -> BPETokenizer:
    tokenizer = BPETokenizer(size)
    tokenizer.train(texts())
    return tokenizer


def hf(begins: bool) -> HFTokenizer:
    """A tokeniser as the hub serves them, with a begin token that it puts in front itself, or without one."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<s>"] if begins else ["<|endoftext|>"]
    backend.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=275, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = HFTokenizer("made here")
    tokenizer._finish(
        backend,
        eos="<|endoftext|>",
        bos="<s>" if begins else "",
        pad=None,
        unk=None,
        template="{{ messages[0].content }}",
    )
    return tokenizer


def tokenizers() -> dict[str, Tokenizer]:
    return {"bytes": ByteTokenizer(), "bpe": bpe(), "hf": hf(False), "hf, begins": hf(True)}


def save(path: Path, networks: dict[str, nn.Module], tokenizer: Tokenizer | None = None, **header: Any) -> Path:
    """What a module's checkpoint holds, without the optimiser's and Lightning's entries."""
    tokenizer = tokenizer or ByteTokenizer()
    state = {f"networks.{role}.{k}": v for role, network in networks.items() for k, v in network.state_dict().items()}
    own: dict[str, Any] = {
        "format": FORMAT,
        "version": "0.0.0",
        "kind": "reward_model" if "reward" in networks else "language_model",
        "networks": {role: network_to_dict(network) for role, network in networks.items()},
        "tokenizer": tokenizer.to_dict(),
        "num_tokens": 12345,
        "config": {"model": {"class_path": "LitLanguageModel", "init_args": {"optimizer": {"lr": 0.003}}}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"lit_palm": {**own, **header}, "state_dict": state}, path)
    return path
