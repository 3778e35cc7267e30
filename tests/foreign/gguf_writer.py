"""A tiny Llama as the GGUF file that llama.cpp's own converter would write of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.families import tokenizer


def write_gguf(path: Path, model: Any, quantisation: str = "F32", architecture: str = "llama") -> Path:
    """Write a model of `transformers` with the tokeniser of the tests; matrices in a quantisation of GGUF."""
    import gguf

    config, tok, writer = model.config, tokenizer(), gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)

    backend = json.loads(tok.backend_tokenizer.to_str())
    named = {number: text for text, number in tok.get_vocab().items()}
    texts = [named.get(number, f"[unused{number}]") for number in range(config.vocab_size)]
    special = {token["content"] for token in backend["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in texts])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_eos_token_id(tok.eos_token_id)
    writer.add_pad_token_id(tok.pad_token_id)
    writer.add_chat_template(tok.chat_template)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        array = weight.numpy().astype(np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp rotates neighbours
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType[quantisation if array.ndim == 2 else "F32"]
        there = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(there, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
