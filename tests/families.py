"""Tiny random models of nine Hugging Face families in folders as their makers publish them, with a tokeniser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAMILIES = ("llama", "qwen2", "mistral", "gpt2", "gpt_neox", "bloom", "opt", "falcon", "cohere")


def tokenizer(size: int = 320) -> Any:
    """A byte-level BPE of `transformers`, with a padding token, an end token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(["the cat sat on a warm mat and saw nine small birds fly over tall trees"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def architecture(family: str, vocab_size: int = 320, **changes: Any) -> Any:
    """The configuration of a tiny model of a family; Mistral's window is shorter than the texts of the tests."""
    import transformers as t

    sizes: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    gated = {"num_key_value_heads": 2, "intermediate_size": 48}
    known = {
        "llama": (t.LlamaConfig, usual | gated),
        "qwen2": (t.Qwen2Config, usual | gated | {"tie_word_embeddings": True}),
        "mistral": (t.MistralConfig, usual | gated | {"sliding_window": 16}),
        "gpt2": (t.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
        "gpt_neox": (t.GPTNeoXConfig, usual | {"intermediate_size": 64}),
        "bloom": (t.BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        "opt": (t.OPTConfig, usual | {"ffn_dim": 64, "word_embed_proj_dim": 16}),
        "falcon": (t.FalconConfig, {k: v for k, v in usual.items() if k != "max_position_embeddings"}),
        "cohere": (t.CohereConfig, usual | gated | {"use_qk_norm": True}),
    }
    cls, own = known[family]
    return cls(**sizes | own | changes)


def random_model(config: Any, cls: Any = None) -> Any:
    """A model with weights that are nothing special: no bias is zero and no norm one."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = (cls or AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.08)
    return model.eval()


def write_family(folder: Path, family: str, **changes: Any) -> Path:
    """A folder with weights, configuration and tokeniser."""
    random_model(architecture(family, **changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
