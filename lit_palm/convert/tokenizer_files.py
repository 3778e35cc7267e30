"""A tokeniser as the files that transformers, vLLM and llama.cpp's converter read: `AutoTokenizer` gives the same ids.

`tokenizer.json` encodes as our stages do: with the begin token in front where there is one, and nothing else added.
`lit_palm_tokenizer.json` beside it holds our own description, so that a stage that starts from the folder has the same
tokeniser and not one that is equal to it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from lit_palm.data.templates import render
from lit_palm.data.tokenizers import BackedTokenizer, ByteTokenizer, Tokenizer

__all__ = ["byte_alphabet", "exported_template", "tokenizers_backend", "write_tokenizer"]


def byte_alphabet() -> list[str]:
    """The character that byte-level vocabularies write for each byte (Radford et al. 2019's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def tokenizers_backend(tokenizer: Tokenizer, where: str) -> Any:
    """The `tokenizers.Tokenizer` that gives a text the ids which our stages give it, the begin token included.

    Raises:
        ValueError: the tokeniser is of a kind that has none.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    if isinstance(tokenizer, ByteTokenizer):
        backend = Backend(models.BPE(vocab={char: byte for byte, char in enumerate(byte_alphabet())}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(tokenizer.special_tokens))
    elif isinstance(tokenizer, BackedTokenizer):
        backend = Backend.from_str(tokenizer.backend.to_str())
    else:
        raise ValueError(
            f"{where}: its tokeniser is a {type(tokenizer).__name__}, which cannot be written as a tokenizer.json; "
            "ByteTokenizer, BPETokenizer and HFTokenizer can"
        )
    probe = "a b"
    plain = backend.encode(probe, add_special_tokens=False).ids
    if backend.encode(probe).ids != tokenizer.prefix + plain:
        begin = tokenizer.token(tokenizer.bos_id)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A" if begin else "$A",
            pair=f"{begin} $A {begin}:1 $B:1" if begin else "$A $B:1",
            special_tokens=[(begin, tokenizer.bos_id)] if begin else [],
        )
    return backend


def exported_template(tokenizer: Tokenizer) -> str | None:
    """The chat template, which begins with the begin token where our stages put it in front of what it renders."""
    template, begin = tokenizer.chat_template, tokenizer.token(tokenizer.bos_id)
    if not template or not begin:
        return template
    messages = [{"role": "user", "content": "x"}]
    try:
        text = render(messages, template, add_generation_prompt=True, spans=False, **tokenizer.template_tokens).text
    except ValueError:  # one that refuses so short a conversation; it is not for an export to judge
        return template
    return template if text.startswith(begin) else "{{- bos_token }}" + template


def write_tokenizer(folder: str, tokenizer: Tokenizer, max_length: int, where: str) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja` and our own.

    Args:
        folder: gets the files.
        tokenizer: to be written.
        max_length: longest text in tokens.
        where: the checkpoint, for errors.

    Raises:
        ValueError: the tokeniser is of a kind that these files cannot describe.
    """
    backend = tokenizers_backend(tokenizer, where)
    backend.save(os.path.join(folder, "tokenizer.json"))
    special = {"eos_token": tokenizer.token(tokenizer.eos_id)}
    begin = tokenizer.template_tokens["bos_token"]
    if begin:
        special["bos_token"] = begin
    pad = tokenizer.token(tokenizer.pad_id)
    if pad:  # one that is an ordinary word must not become special
        special["pad_token"] = pad
    template = exported_template(tokenizer)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        "chat_template": template,
    }
    _write_json(folder, "tokenizer_config.json", {k: v for k, v in described.items() if v is not None})
    _write_json(folder, "special_tokens_map.json", special)
    if template:
        with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as file:
            file.write(template)
    tokenizer.save(folder)


def _write_json(folder: str, name: str, data: dict[str, Any]) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)
