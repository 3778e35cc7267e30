"""The text of a completion while its ids still come: whole characters only, and no stop text.

    text = StreamedText(tokenizer.decode, stop=["\\n"])
    for token in tokens:
        print(text.push(token), end="")     # may be empty: half a character, or what may become a stop text
    print(text.finish())

The pieces together are what decoding all ids at once gives, up to the first stop text. Only the last few ids are
decoded at every step, so that a long completion costs no more a token than a short one. (One exception: where byte
fallback meets bytes that are no text, it takes back characters that it has given before; a stream keeps them.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_palm.data.tokenizer_backed import BackedTokenizer
from lit_palm.data.tokenizer_base import ByteTokenizer, Tokenizer

__all__ = ["StreamedText", "token_bytes"]

_BROKEN = "\ufffd"


class StreamedText:
    """Turns ids into text as they come.

    Args:
        decode: ids -> text.
        stop: texts that end the completion, not shown; empty: everything is shown.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decode, list(stop)
        # ids from which on text is decoded: a tokenizer may write the first id of a text in another way than the
        # others (without its space), so those that gave the last piece stay in front
        self.ids: list[int] = []
        self.shown = 0
        """So many characters of their text have been taken."""
        self.fresh = 0
        """So many of `ids` have given no text yet."""
        self.held = ""
        """Text that may become a stop text."""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that one more id makes certain."""
        self.ids.append(token)
        self.fresh += 1
        text = self.decode(self.ids)
        if len(text) <= self.shown or text.endswith(_BROKEN):
            return ""
        piece = text[self.shown :]
        self.ids = self.ids[-self.fresh :]
        self.shown, self.fresh = len(self.decode(self.ids)), 0
        return self._release(piece, self._possible(self.held + piece))

    def finish(self) -> str:
        """What is left when the completion has ended: characters that were never completed, and text held back."""
        piece, self.shown, self.ids = self.decode(self.ids)[self.shown :] if self.ids else "", 0, []
        return self._release(piece, 0)

    def _release(self, piece: str, keep: int) -> str:
        text, self.held = self.held + piece, ""
        if self.stopped:
            return ""
        places = [place for place in (text.find(s) for s in self.stop) if place >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible(self, text: str) -> int:
        """How many characters at its end may be the beginning of a stop text."""
        longest = max(map(len, self.stop), default=0)
        for count in range(min(longest - 1, len(text)), 0, -1):
            end = text[-count:]
            if any(s.startswith(end) for s in self.stop):
                return count
        return 0


def token_bytes(tokenizer: Tokenizer, index: int) -> tuple[str, list[int]]:
    """One id as text and as bytes; of half a character the bytes are its own, though the text is U+FFFD."""
    text = tokenizer.decode([index], skip_special=False)
    if isinstance(tokenizer, ByteTokenizer):
        return text, [index] if index < 256 else list(text.encode())
    if isinstance(tokenizer, BackedTokenizer):
        piece: Any = tokenizer.backend.id_to_token(index)
        if piece is None:  # an id of the network that the tokenizer does not know
            return "", []
        if len(piece) == 6 and piece.startswith("<0x"):
            return text, [int(piece[3:5], 16)]
        if "\u2581" in piece:  # decoded alone, the first word of a text loses its space
            text = piece.replace("\u2581", " ")
        elif _BROKEN in text and all(character in _BYTES for character in piece):
            return text, [_BYTES[character] for character in piece]
    return text, list(text.encode("utf-8", "replace"))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's way to write every byte as a printable character."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_alphabet()
