"""Text that streams is the text of all ids at once, whatever the tokeniser, whatever is cut."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from lit_palm.data.streamed_text import StreamedText, token_bytes
from lit_palm.data.tokenizers import BPETokenizer, ByteTokenizer, HFTokenizer, Tokenizer

TEXTS = [
    "naïve café, 3€ - 一二三 😀👍🏽 done",
    "  two  spaces\n\nand lines\t",
    "plain words only and nothing else",
    "é",
    "",
]


def sentencepiece() -> Tokenizer:
    """As Llama's: words begin with a mark, what is not in the vocabulary is written in bytes."""
    words = ["plain", "words", "only", "and", "nothing", "else", "lines", "two", "spaces", "done"]
    pieces = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *(f"▁{word}" for word in words),
        *words,
    ]
    letters = sorted({c for word in words for c in word} | {","})
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *letters]))}
    backend = Backend(models.Unigram([(piece, -float(len(vocab) - i)) for piece, i in vocab.items()], 0, True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = HFTokenizer("made here")
    tokenizer._finish(backend, eos="</s>", bos=None, pad=None, unk="<unk>", template=None)
    return tokenizer


def byte_level() -> Tokenizer:
    tokenizer = BPETokenizer(300)
    tokenizer.train([*TEXTS * 3, "the cat sat"])
    return tokenizer


@pytest.mark.parametrize("make", [ByteTokenizer, byte_level, sentencepiece])
def test_the_pieces_are_the_whole(make: Any) -> None:
    tokenizer, chance = make(), random.Random(0)
    sequences = [tokenizer.encode(text) for text in TEXTS]
    # what a model may write: anything, with halves of characters and special tokens in between; but byte fallback, once
    # a run of bytes is broken, takes back characters of it that it had given, which no stream can do
    first = 258 if make is sentencepiece else 0
    sequences += [[chance.randrange(first, tokenizer.vocab_size) for _ in range(60)] for _ in range(40)]
    for ids in sequences:
        text = StreamedText(tokenizer.decode)
        pieces = [text.push(token) for token in ids]
        assert not any(piece.endswith("\ufffd") for piece in pieces)
        assert "".join([*pieces, text.finish()]) == tokenizer.decode(ids)
        assert text.finish() == ""


@pytest.mark.parametrize("make", [ByteTokenizer, byte_level, sentencepiece])
def test_a_stop_text_is_never_shown_not_even_in_part(make: Any) -> None:
    tokenizer = make()
    ids = tokenizer.encode("plain words only and nothing else")
    whole = tokenizer.decode(ids)
    for stop in (["only and"], ["nothing ", "words only"], ["w"], ["ly an"], ["never"], ["elsewhere", "else"]):
        text = StreamedText(tokenizer.decode, stop)
        shown = ""
        for token in ids:
            shown += text.push(token)
            # never more than what no continuation can take back
            assert not any(s in shown for s in stop)
        shown += text.finish()
        places = [whole.find(s) for s in stop if s in whole]
        assert shown == (whole[: min(places)] if places else whole), stop


def test_what_may_become_a_stop_text_is_held_back_and_no_more() -> None:
    text = StreamedText(ByteTokenizer().decode, ["###", "#!"])
    assert [text.push(ord(c)) for c in "a#b##c##"] == ["a", "", "#b", "", "", "##c", "", ""]
    assert text.finish() == "##"


def test_a_long_completion_costs_no_more_a_token() -> None:
    tokenizer, lengths = ByteTokenizer(), []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return tokenizer.decode(ids)

    text = StreamedText(decode)
    for token in tokenizer.encode("é" * 500 + "plain" * 200):
        text.push(token)
    assert max(lengths) <= 5


def test_tokens_as_bytes() -> None:
    byte = ByteTokenizer()
    assert token_bytes(byte, 0xC3) == ("\ufffd", [0xC3]) and token_bytes(byte, 65) == ("A", [65])
    assert token_bytes(byte, byte.eos_id) == ("<eos>", list(b"<eos>"))
    for make in (byte_level, sentencepiece):
        tokenizer = make()
        for text in TEXTS:
            ids = tokenizer.encode(text)
            spelled = bytes(value for index in ids for value in token_bytes(tokenizer, index)[1])
            assert spelled.decode().lstrip(" ") == tokenizer.decode(ids).lstrip(" ")
    assert token_bytes(sentencepiece(), sentencepiece().encode("two words")[1]) == (" words", list(b" words"))
    assert token_bytes(byte_level(), 100_000) == ("", [])
