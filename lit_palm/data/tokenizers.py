"""Tokenizers: text to token ids and back, described by plain data so that a checkpoint can carry them.

    tokenizer = ByteTokenizer()                         # nothing to train: 256 bytes and a few special tokens
    tokenizer = BPETokenizer(vocab_size=2048)           # trained by the data module on its own training texts
    tokenizer = HFTokenizer("EleutherAI/gpt-neox-20b")  # any tokenizer of transformers
    tokenizer = load_tokenizer("runs/pretrain/last.ckpt")

In YAML either form of `tokenizer:` works: a name or path for `load_tokenizer`, or `class_path` with `init_args`.
"""

from __future__ import annotations

import json
import re
from typing import Any

import fsspec

from lit_palm.data.tokenizer_backed import BackedTokenizer, BPETokenizer
from lit_palm.data.tokenizer_base import TOKENIZER_FILE, ByteTokenizer, Tokenizer, tokenizer_from_dict
from lit_palm.data.tokenizer_hf import HFTokenizer

__all__ = [
    "BPETokenizer",
    "BackedTokenizer",
    "ByteTokenizer",
    "HFTokenizer",
    "Tokenizer",
    "choose_tokenizer",
    "load_tokenizer",
    "tokenizer_from_dict",
]


_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that a name or path stands for.

    Args:
        name: `bytes`; a `tokenizer.json` or `lit_palm_tokenizer.json`; a folder that holds one; a lit_palm checkpoint
            (`.ckpt`, a file or a sharded folder); any of these as an fsspec URL; or the name of a tokenizer on the
            Hugging Face hub.

    Raises:
        ValueError: when nothing is there, or what is there holds no tokenizer.
    """
    if name == "bytes":
        return ByteTokenizer()
    fs, path = fsspec.core.url_to_fs(name)
    if fs.isdir(path):
        return _from_folder(name, fs, path.rstrip("/"))
    if fs.exists(path):
        if path.endswith(".json"):
            return _from_json(name, fs, path)
        return _from_checkpoint(name, fs, path)
    if not _HUB_NAME.match(name) or path.endswith((".json", ".ckpt")):
        raise ValueError(f"there is no tokenizer at {name!r}: the file does not exist")
    return _loaded(HFTokenizer(name))


def choose_tokenizer(given: Tokenizer | str | None, brought: Tokenizer | None) -> Tokenizer:
    """The tokenizer of a run: what the data names, or what the network brings; a mismatch is refused.

    Args:
        given: the data module's argument; it may be untrained. It may differ from `brought` in its chat template only.
        brought: the tokenizer that the network was trained with, None for a new network.

    Raises:
        ValueError: when there is none, or when both are there and do not mean the same ids.
    """
    if isinstance(given, str):
        given = load_tokenizer(given)
    chosen = brought if given is None else given
    if chosen is None:
        raise ValueError(
            "there is no tokenizer: set data.tokenizer (`bytes`, a file, a folder, a checkpoint, a hub name, or a"
            " class_path such as BPETokenizer), or start from a network that brings one"
        )
    if brought is not None and (not chosen.trained or chosen.fingerprint() != brought.fingerprint()):
        raise ValueError(
            "data.tokenizer is another tokenizer than the one the network was trained with, so its ids would mean other"
            " text: leave data.tokenizer out to use the network's"
        )
    return chosen


def _loaded(tokenizer: HFTokenizer) -> HFTokenizer:
    tokenizer.load()
    return tokenizer


def _from_folder(name: str, fs: Any, path: str) -> Tokenizer:
    if fs.exists(f"{path}/{TOKENIZER_FILE}"):
        return _from_json(name, fs, f"{path}/{TOKENIZER_FILE}")
    if fs.exists(f"{path}/meta.pt"):  # Lightning's sharded checkpoints keep everything but tensors here
        return _from_checkpoint(name, fs, f"{path}/meta.pt")
    if "file" in fs.protocol:
        return _loaded(HFTokenizer(path))
    if fs.exists(f"{path}/tokenizer.json"):
        return _from_json(name, fs, f"{path}/tokenizer.json")
    raise ValueError(f"the folder {name!r} holds no {TOKENIZER_FILE} and no tokenizer.json")


def _from_json(name: str, fs: Any, path: str) -> Tokenizer:
    try:
        with fs.open(path, "r", encoding="utf-8") as file:
            text = file.read()
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the tokenizer file {name!r} is not JSON: {error}") from error
    if "class_path" in data:
        return tokenizer_from_dict(data)
    if "model" in data:
        return HFTokenizer.from_json(text, name)
    raise ValueError(f"{name!r} is neither a lit_palm tokenizer nor a tokenizer.json of the tokenizers library")


def _from_checkpoint(name: str, fs: Any, path: str) -> Tokenizer:
    import torch

    try:
        if "file" in fs.protocol:  # mapped: the weights are not read
            header = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("lit_palm", {})
        else:
            with fs.open(path, "rb") as file:
                header = torch.load(file, map_location="cpu", weights_only=True).get("lit_palm", {})
    except Exception as error:
        raise ValueError(f"{name!r} is not a checkpoint that can be read safely: {error}") from error
    if not header.get("tokenizer"):
        raise ValueError(f"the checkpoint {name!r} carries no tokenizer; name one with data.tokenizer")
    return tokenizer_from_dict(header["tokenizer"])
