"""From sampled tokens to OpenAI's answers: one `Choice` a row, one object or a stream of chunks a request."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from lit_palm.data.streamed_text import StreamedText, token_bytes
from lit_palm.data.tokenizers import Tokenizer
from lit_palm.rollout.requests import Token
from lit_palm.serve.worker import Event

__all__ = ["Choice", "Reply", "sse"]

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


def sse(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


class Choice:
    """One completion of a reply, as it comes.

    Args:
        tokenizer: for decoding only.
        stop: stop texts.
        logprobs: keep what `logprobs` shows.
    """

    def __init__(self, tokenizer: Tokenizer, stop: list[str], logprobs: bool) -> None:
        self.tokenizer, self.text = tokenizer, StreamedText(tokenizer.decode, stop)
        self.logprobs = logprobs
        self.num_tokens = 0
        self.finish: str | None = None
        self.length = 0
        """Characters shown, for `text_offset`."""

    def take(self, events: Iterable[Event]) -> tuple[str, list[Token], str | None]:
        """New text and tokens, and the finish reason when this is the end."""
        pieces, tokens = [], []
        for event in events:
            if event.token is not None:
                self.num_tokens += 1
                pieces.append(self.text.push(event.token.id))
                tokens.append(event.token)
            elif event.reason in FINISH:
                pieces.append(self.text.finish())
                self.finish = FINISH[event.reason]
        text = "".join(pieces)
        return text, tokens, self.finish


class Reply:
    """What one request is answered with.

    Args:
        kind: "chat" or "text".
        model: name of the model.
        tokenizer: for decoding only.
        stop: stop texts.
        count: number of choices.
        prompt_tokens: ids that were read.
        num_top: None: no log-probabilities are shown; else of so many of the likeliest tokens too.
        echo: what stands before each choice's text.
        token_ids: whether choices show their ids, and log-probabilities are those of all of them, EOS included.
        versions: asked for what names the weights that the choices come from; None: nothing is said of it.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        tokenizer: Tokenizer,
        stop: list[str],
        count: int,
        prompt_tokens: int,
        num_top: int | None,
        echo: list[str],
        token_ids: bool,
        versions: Callable[[], str | None] | None = None,
    ) -> None:
        self.versions = versions
        self.chat = kind == "chat"
        self.tokenizer, self.num_top, self.echo, self.token_ids = tokenizer, num_top, echo, token_ids
        self.choices = [Choice(tokenizer, stop, num_top is not None) for _ in range(count)]
        self.prompt_tokens = prompt_tokens
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._spelled: dict[int, tuple[str, list[int]]] = {}

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        written = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
        }

    # ------------------------------------------------------------------------------ chunks

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        if self.chat:
            delta = {"role": "assistant", "content": ""}
            return [self._chunk(row, {"delta": delta}) for row in range(len(self.choices))]
        return [self._chunk(row, {"text": text}) for row, text in enumerate(self.echo) if text]

    def chunks(self, events: list[Event]) -> list[dict[str, Any]]:
        """The chunks that these events make; none when they show nothing new."""
        by_row: dict[int, list[Event]] = {}
        for event in events:
            by_row.setdefault(event.row, []).append(event)
        made = []
        for row, own in by_row.items():
            text, tokens, finish = self.choices[row].take(own)
            told = tokens if self.token_ids else [t for t in tokens if t.id != self.tokenizer.eos_id]
            shown = bool(told) and (self.num_top is not None or self.token_ids)
            if text or shown:
                content: dict[str, Any] = {"delta": {"content": text}} if self.chat else {"text": text}
                made.append(self._chunk(row, content, tokens if shown else None, text))
            if finish is not None:
                made.append(self._chunk(row, {"delta": {}} if self.chat else {"text": ""}, finish=finish))
        return made

    def closing(self) -> dict[str, Any]:
        """The last chunk for who asked for usage."""
        return {**self._head(), "choices": [], "usage": self.usage()}

    def _head(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk"} if self.chat else self.head

    def _chunk(
        self,
        row: int,
        content: dict[str, Any],
        tokens: list[Token] | None = None,
        text: str = "",
        finish: str | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": row, **content, "logprobs": None, "finish_reason": finish}
        if tokens is not None:
            choice["logprobs"] = self._logprobs(row, tokens)
            if self.token_ids:
                choice["token_ids"] = [token.id for token in tokens]
        return {**self._head(), "choices": [choice]}

    # ------------------------------------------------------------------------------ whole

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """The answer at once, from all events."""
        choices = []
        for row, choice in enumerate(self.choices):
            text, tokens, finish = choice.take(event for event in events if event.row == row)
            shown: dict[str, Any] = {"index": row}
            if self.chat:
                shown["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                shown["text"] = self.echo[row] + text
            shown |= {"logprobs": self._logprobs(row, tokens), "finish_reason": finish}
            if self.token_ids:
                shown["token_ids"] = [token.id for token in tokens]
            choices.append(shown)
        version = {} if self.versions is None else {"weights_version": self.versions()}
        return {**self.head, "choices": choices, "usage": self.usage(), **version}

    # ------------------------------------------------------------------------------ log-probabilities

    def _logprobs(self, row: int, tokens: list[Token]) -> dict[str, Any] | None:
        if self.num_top is None:
            return None
        # EOS has no text, so that it is told only where every id has its log-probability
        told = [token for token in tokens if self.token_ids or token.id != self.tokenizer.eos_id]
        if self.chat:
            return {"content": [self._spell(t.id, t.logp) | {"top_logprobs": self._top(t)} for t in told]}
        choice, offsets = self.choices[row], []
        for token in told:
            offsets.append(choice.length)
            choice.length += len(self._name(token.id)[0])
        return {
            "tokens": [self._label(token.id) for token in told],
            "token_logprobs": [_json(token.logp) for token in told],
            "top_logprobs": [{self._label(i): _json(logp) for i, logp in token.top} for token in told]
            if self.num_top
            else None,
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> list[dict[str, Any]]:
        return [self._spell(index, logp) for index, logp in token.top]

    def _spell(self, index: int, logp: float) -> dict[str, Any]:
        text, values = self._name(index)
        return {"token": text, "logprob": _json(logp), "bytes": values}

    def _label(self, index: int) -> str:
        """A token as the older interface names it: what is no text is spelt as bytes."""
        text, values = self._name(index)
        return "bytes:" + "".join(f"\\x{value:02x}" for value in values) if "\ufffd" in text else text

    def _name(self, index: int) -> tuple[str, list[int]]:
        if index not in self._spelled:
            self._spelled[index] = token_bytes(self.tokenizer, index)
        return self._spelled[index]


def _json(logp: float) -> float:
    """A log-probability that JSON can hold; OpenAI's own value for what can hardly be drawn."""
    return max(logp, -9999.0)
