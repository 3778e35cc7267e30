"""Prompts and completions as token ids: what demonstrations, preferences and prompts have in common.

A prompt or completion is a string or a list of messages. Strings are encoded apart from each other, so that a prompt
has the same ids alone (when the model writes) and with its completion (when it learns). Messages go through the chat
template. Either way the ids begin with BOS, if there is one, and a completion ends with EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lit_palm.data.sources import Row, column
from lit_palm.data.templates import Message, check_messages, encode_chat
from lit_palm.data.tokenizers import Tokenizer

__all__ = [
    "Conversation",
    "Encoded",
    "Turn",
    "as_messages",
    "encode",
    "encode_prompts",
    "split_key",
    "turn",
    "turn_texts",
]

Turn = str | list[Message]


class Conversation(NamedTuple):
    """A prompt with a completion.

    Args:
        prompt: may be empty.
        completion: what follows it.
        where: the place it came from, for messages.
    """

    prompt: Turn
    completion: Turn
    where: str


class Encoded(NamedTuple):
    """Ids of a conversation, and which of them are the completion's (EOS included)."""

    tokens: list[int]
    targets: list[bool]


def turn(row: Row, name: str) -> Turn:
    """A column that holds a string or messages.

    Raises:
        ValueError: naming file, line and column.
    """
    value = column(row, name, (str, list, tuple))
    return value if isinstance(value, str) else check_messages(value, row.where, name)


def turn_texts(value: Turn) -> list[str]:
    """The texts in a string or in messages."""
    if isinstance(value, str):
        return [value]
    return [m["content"] for m in value if isinstance(m["content"], str)]


def split_key(prompt: Turn, completion: Turn = "") -> str:
    """What decides the side of `validation_fraction`: the prompt up to the assistant's first turn, or, where it is
    empty, what follows it. (A system message alone would not do: it may be the same everywhere.)"""
    value = prompt or completion
    if isinstance(value, str):
        return value
    first = next((i for i, m in enumerate(value) if m["role"] == "assistant"), len(value))
    return "\n".join(str(m["content"]) for m in value[: first or None])


def as_messages(value: Turn, role: str) -> list[Message]:
    """Messages; a string becomes one message of the role, an empty string none."""
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    return value


def encode(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> list[Encoded]:
    """Ids of conversations.

    Raises:
        ValueError: when the chat template refuses one, naming its place.
    """
    plain = [c for c in conversations if isinstance(c.prompt, str) and isinstance(c.completion, str)]
    parts = iter(tokenizer.encode_batch([str(text) for c in plain for text in (c.prompt, c.completion)]))
    return [
        _encode_plain(tokenizer, next(parts), next(parts))
        if isinstance(c.prompt, str) and isinstance(c.completion, str)
        else _encode_messages(tokenizer, c)
        for c in conversations
    ]


def _encode_plain(tokenizer: Tokenizer, prompt: list[int], completion: list[int]) -> Encoded:
    prompt = tokenizer.prefix + prompt
    completion = [*completion, tokenizer.eos_id]
    return Encoded(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _encode_messages(tokenizer: Tokenizer, conversation: Conversation) -> Encoded:
    prompt = as_messages(conversation.prompt, "user")
    messages = prompt + as_messages(conversation.completion, "assistant")
    turns = sum(m["role"] == "assistant" for m in prompt)
    try:
        return Encoded(*encode_chat(tokenizer, messages, skip_turns=turns))
    except ValueError as error:
        raise ValueError(f"{conversation.where}: {error}") from error


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[tuple[Turn, str]]) -> list[list[int]]:
    """Ids of prompts alone, ready to be continued.

    Args:
        tokenizer: whose ids.
        prompts: each a prompt and the place it came from.

    Raises:
        ValueError: naming the place, when the chat template refuses one, or one is empty and there is no BOS.
    """
    plain = iter(tokenizer.encode_batch([p for p, _ in prompts if isinstance(p, str)]))
    result = []
    for prompt, where in prompts:
        ids: Any
        if isinstance(prompt, str):
            ids = tokenizer.prefix + next(plain)
        else:
            try:
                ids, _ = encode_chat(tokenizer, prompt, add_generation_prompt=True)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        if not ids:
            raise ValueError(f"{where}: the prompt is empty, and the tokenizer has no BOS token to begin with")
        result.append(ids)
    return result
