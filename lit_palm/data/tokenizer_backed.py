"""Tokenizers of the `tokenizers` library: what they share, and byte-level BPE that we train.

They are described by the library's own JSON, so a checkpoint holds the whole vocabulary and needs no other file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_palm.data.templates import ROLE_TEMPLATE
from lit_palm.data.tokenizer_base import SPECIAL_TOKENS, Tokenizer

__all__ = ["BPETokenizer", "BackedTokenizer"]


class BackedTokenizer(Tokenizer):
    """What tokenizers of the `tokenizers` library share; subclasses provide `_backend`."""

    _backend: Any  # tokenizers.Tokenizer

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` underneath."""
        return self._backend

    @property
    def special_tokens(self) -> dict[str, int]:
        return self._special

    @cached_property
    def _special(self) -> dict[str, int]:
        added = self.backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.backend.encode_special_tokens = True  # meaning: special tokens in the text are ordinary characters
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_offsets(self, text: str, *, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
        self.backend.encode_special_tokens = not special
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def num_bytes(self) -> Tensor:
        return torch.tensor(_bytes_of_tokens(self.backend, self.vocab_size))


class BPETokenizer(BackedTokenizer):
    """Byte-level byte pair encoding, trained by the `tokenizers` library.

    A data module that is given an untrained one trains it on its training texts and keeps the result in its cache.
    Digits are tokens of their own, as in PaLM (Chowdhery et al. 2022, section 2).

    Args:
        vocab_size: number of ids to learn, at least 263 (256 bytes and the special tokens); small texts may give fewer.
        chat_template: Jinja text for messages; None takes the default, which marks roles with special tokens.

    Raises:
        ValueError: when `vocab_size` leaves no room for the bytes.
    """

    def __init__(self, vocab_size: int = 2048, chat_template: str | None = None) -> None:
        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"tokenizer.vocab_size is {vocab_size}; byte-level BPE needs at least {smallest}")
        self.vocab_size = vocab_size
        self.chat_template = ROLE_TEMPLATE if chat_template is None else chat_template
        self.pad_id, self.eos_id, self.bos_id = 0, 1, 2
        self._backend = None

    @property
    def trained(self) -> bool:
        return self._backend is not None

    @property
    def backend(self) -> Any:
        if self._backend is None:
            raise ValueError(
                "this BPETokenizer is not trained: give it to a data module with training texts, call"
                " train(texts), or load a trained one with load_tokenizer(path)"
            )
        return self._backend

    def train(self, texts: Iterable[str]) -> None:
        """Learn the vocabulary from texts."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=2,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(_batched(texts), trainer)
        self._set_backend(backend)

    def _set_backend(self, backend: Any) -> None:
        self._backend = backend
        self.vocab_size = backend.get_vocab_size()
        self.__dict__.pop("_special", None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "class_path": "lit_palm.data.tokenizers.BPETokenizer",
            "chat_template": self.chat_template,
            "json": self.backend.to_str(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BPETokenizer:
        from tokenizers import Tokenizer as Backend

        tokenizer = cls(chat_template=data["chat_template"])
        tokenizer._set_backend(Backend.from_str(data["json"]))
        return tokenizer


def _batched(texts: Iterable[str], size: int = 1000) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _bytes_of_tokens(backend: Any, size: int) -> list[int]:
    """Bytes of text that each id stands for: exact for byte-level vocabularies, by the decoder's rules for others."""
    spec = json.loads(backend.to_str())
    parts = json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    byte_level, word_pieces = '"ByteLevel"' in parts, '"WordPiece"' in parts
    added = backend.get_added_tokens_decoder()
    lengths = [0] * size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode())
        elif byte_level:
            lengths[index] = len(token)  # one character of the byte alphabet stands for one byte
        elif len(token) == 6 and token.startswith("<0x"):
            lengths[index] = 1
        elif word_pieces:
            lengths[index] = len(token[2:].encode()) if token.startswith("##") else len(token.encode()) + 1
        else:
            lengths[index] = len(token.replace("\u2581", " ").encode())
    return lengths
