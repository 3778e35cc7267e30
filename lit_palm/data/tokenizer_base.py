"""What a tokenizer is: the interface every stage knows, and the smallest implementation of it.

What a stage needs to know about a tokenizer is small: ids, three special ids, a chat template, how many bytes each id
stands for (bits per byte), and a fingerprint that tells whether two of them mean the same ids. `to_dict` gives plain
strings and numbers, which go into every checkpoint, and `tokenizer_from_dict` brings the tokenizer back without the
files it came from. The public door is tokenizers.py.

Text is always encoded literally: `<eos>` typed by a user is five characters, never the token. Only chat templates may
write special tokens (see templates.py).
"""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import fsspec
import torch
from torch import Tensor

from lit_palm.data.templates import ROLE_TEMPLATE

__all__ = ["SPECIAL_TOKENS", "ByteTokenizer", "Tokenizer", "tokenizer_from_dict"]

TOKENIZER_FILE = "lit_palm_tokenizer.json"

# what ByteTokenizer and BPETokenizer reserve; the roles are what the default chat template writes
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<system>", "<user>", "<assistant>", "<tool>")


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        vocab_size: number of ids; every id is below it.
        pad_id: fills rows up; batches carry explicit masks, so nothing is ever recognised as padding by this id.
        eos_id: ends a document, a completion, an assistant's turn.
        bos_id: begins every document and prompt, so that text can be generated from an empty one; None: there is none.
        chat_template: Jinja text that turns messages into one string.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    bos_id: int | None
    chat_template: str | None

    @property
    def trained(self) -> bool:
        """False while the vocabulary still has to be learned with `train`."""
        return True

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, int]:
        """Ids of the strings that a chat template may write as single tokens."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; nothing is added, and special tokens in the text stay ordinary characters."""

    @abstractmethod
    def encode_offsets(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of one text with the characters [start, end) that each id came from.

        Args:
            text: what to encode.
            special: True turns the strings of `special_tokens` into their ids (text written by a template).

        Raises:
            ValueError: when the tokenizer cannot tell offsets.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of the ids; bytes that are no valid UTF-8 become U+FFFD."""

    @abstractmethod
    def num_bytes(self) -> Tensor:
        """[V] long, bytes of text that each id stands for, 0 for special tokens: what bits per byte divide by."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything needed to rebuild the tokenizer, as str, int and None; holds `class_path` and `chat_template`."""

    @classmethod
    @abstractmethod
    def from_dict(cls, data: dict[str, Any]) -> Tokenizer:
        """Rebuild what `to_dict` described."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text; nothing is added, and special tokens in the text stay ordinary characters."""
        return self.encode_batch([text])[0]

    def token(self, index: int | None) -> str:
        """The string of a special id, empty for None."""
        return next((text for text, i in self.special_tokens.items() if i == index), "")

    @property
    def template_tokens(self) -> dict[str, str]:
        """What chat templates know as `bos_token` and `eos_token`."""
        return {"bos_token": self.token(self.bos_id), "eos_token": self.token(self.eos_id)}

    @property
    def prefix(self) -> list[int]:
        """The ids that every document and prompt starts with: `[bos_id]`, or nothing."""
        return [] if self.bos_id is None else [self.bos_id]

    def fingerprint(self) -> str:
        """sha256 of `to_dict` without the chat template: equal fingerprints mean that ids mean the same text."""
        data = {key: value for key, value in self.to_dict().items() if key != "chat_template"}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def same_as(self, other: object) -> bool:
        """Whether the other is a tokenizer with the same ids and the same chat template."""
        if self is other:
            return True
        if not isinstance(other, Tokenizer) or not (self.trained and other.trained):
            return False
        return self.fingerprint() == other.fingerprint() and self.chat_template == other.chat_template

    def save(self, folder: str) -> None:
        """Write `lit_palm_tokenizer.json` into a folder (any fsspec path); `load_tokenizer(folder)` reads it back."""
        fs, path = fsspec.core.url_to_fs(folder)
        fs.makedirs(path, exist_ok=True)
        with fs.open(f"{path}/{TOKENIZER_FILE}", "w", encoding="utf-8") as file:
            json.dump(self.to_dict(), file, ensure_ascii=False)


def tokenizer_from_dict(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_dict` described.

    Raises:
        ValueError: when the description names no class that is a tokenizer.
    """
    path = str(data.get("class_path", ""))
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the saved tokenizer is a {path or 'nameless class'!r}, which cannot be imported ({error}); install the"
            " package it comes from"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Tokenizer)):
        raise ValueError(f"the saved tokenizer names {path!r}, which is not a lit_palm Tokenizer")
    return cls.from_dict(data)


class ByteTokenizer(Tokenizer):
    """Every byte of the UTF-8 text is a token: nothing to train, nothing out of vocabulary.

    Ids 0 to 255 are the bytes, the special tokens follow.

    Args:
        chat_template: Jinja text for messages; None takes the default, which marks roles with special tokens.
    """

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = ROLE_TEMPLATE if chat_template is None else chat_template
        self.vocab_size = 256 + len(SPECIAL_TOKENS)
        self.pad_id, self.eos_id, self.bos_id = 256, 257, 258

    @property
    def special_tokens(self) -> dict[str, int]:
        return {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode("utf-8", "replace")) for text in texts]

    def encode_offsets(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        while position < len(text):
            token = next((t for t in SPECIAL_TOKENS if special and text.startswith(t, position)), None)
            end = position + (len(token) if token else 1)
            new = [self.special_tokens[token]] if token else list(text[position].encode("utf-8", "replace"))
            ids += new
            offsets += [(position, end)] * len(new)
            position = end
        return ids, offsets

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        pieces = bytearray()
        for i in ids:
            if i < 256:
                pieces.append(i)
            elif not skip_special:
                pieces += SPECIAL_TOKENS[i - 256].encode()
        return pieces.decode("utf-8", "replace")

    def num_bytes(self) -> Tensor:
        return torch.tensor([1] * 256 + [0] * len(SPECIAL_TOKENS))

    def to_dict(self) -> dict[str, Any]:
        return {"class_path": "lit_palm.data.tokenizers.ByteTokenizer", "chat_template": self.chat_template}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ByteTokenizer:
        return cls(chat_template=data["chat_template"])
