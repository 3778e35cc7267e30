"""Chat templates: messages to one text, with the characters the assistant wrote marked.

A template is Jinja text that sees `messages`, `add_generation_prompt`, `bos_token` and `eos_token`, as in transformers;
it runs in a sandbox. Which characters are the assistant's comes from `{% generation %}...{% endgeneration %}` in the
template, or, where a template has none, from rendering the conversation up to and including each assistant message.

    text, spans = render([{"role": "user", "content": "hi"}], ROLE_TEMPLATE, eos_token="<eos>", bos_token="<bos>")
    ids, mask = encode_chat(tokenizer, messages)

A template may write special tokens, a message may not: `<eos>` inside a message stays five characters.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

if TYPE_CHECKING:
    from lit_palm.data.tokenizer_base import Tokenizer

__all__ = ["PLAIN_TEMPLATE", "ROLE_TEMPLATE", "Rendered", "check_messages", "encode_chat", "render"]

Message = dict[str, Any]

# for our own tokenizers: one special token for each role, so that a message never merges with its frame
ROLE_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ('system', 'user', 'assistant', 'tool') %}
        {{- raise_exception("a message has the role '" ~ message['role'] ~ "'; use system, user, assistant or tool") }}
    {%- endif %}
    {{- '<' ~ message['role'] ~ '>' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- (message['content'] or '') ~ eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] or '' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant>' }}
{%- endif %}"""

# for tokenizers that bring no template and no role tokens
PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- message['role'] | capitalize ~ ':\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- (message['content'] or '') ~ eos_token }}{%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- (message['content'] or '') ~ '\\n\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:\\n' }}
{%- endif %}"""

# Unicode noncharacters, reserved for use inside a program: they cannot be part of a text that came from outside
_OPEN, _CLOSE, _SPLIT = "\ufdd0", "\ufdd1", "\ufdd2"
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}{_SPLIT}]")


class Rendered(NamedTuple):
    """A rendered conversation: its text, and the assistant's characters as [start, end) spans."""

    text: str
    spans: list[tuple[int, int]]


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what the assistant wrote with noncharacters that `render` takes out again."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from error


def _text(template: str, messages: Sequence[Message], generation: bool, tokens: dict[str, str]) -> str:
    try:
        return _compile(template).render(messages=list(messages), add_generation_prompt=generation, **tokens)
    except Exception as error:  # a template is a program: it may divide by zero
        what = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise ValueError(f"the chat template does not take these messages: {what}{error}") from error


def render(
    messages: Sequence[Message],
    template: str,
    *,
    add_generation_prompt: bool = False,
    bos_token: str = "",
    eos_token: str = "",
    spans: bool = True,
) -> Rendered:
    """Render a conversation.

    Args:
        messages: dicts with `role` and `content`, and whatever else the template reads.
        template: Jinja text.
        add_generation_prompt: end with what precedes the assistant's next turn.
        bos_token: text of the token that begins a document, empty if there is none.
        eos_token: text of the token that ends one.
        spans: also find the assistant's characters (without a `{% generation %}` tag this renders several times).

    Raises:
        ValueError: when the template is broken, refuses the messages, or changes earlier turns as the conversation
            grows so that the assistant's characters cannot be told.
    """
    tokens = {"bos_token": bos_token, "eos_token": eos_token}
    marked = _text(template, messages, add_generation_prompt, tokens)
    if _OPEN in marked:
        return _unmark(marked)
    text = marked
    found: list[tuple[int, int]] = []
    for i, message in enumerate(messages if spans else ()):
        if message.get("role") == "assistant":
            before = _text(template, messages[:i], True, tokens)
            after = _text(template, messages[: i + 1], False, tokens)
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    "the chat template does not tell which characters the assistant wrote: put {% generation %} and"
                    " {% endgeneration %} around the assistant's turn in the template"
                )
            found.append((len(before), len(after)))
    return Rendered(text, found)


def _unmark(marked: str) -> Rendered:
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    length = start = 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", marked):
        if piece == _OPEN:
            start = length
        elif piece == _CLOSE:
            spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return Rendered("".join(pieces), spans)


def check_messages(messages: Any, where: str, column: str) -> list[Message]:
    """The messages of a data row, checked.

    Raises:
        ValueError: naming `where` ("file:line") and the column, when they are not messages.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{where}: {column!r} must be a non-empty list of messages with 'role' and 'content'")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise ValueError(f"{where}: message {i} of {column!r} must have a 'role' and a 'content'")
    return list(messages)


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False, skip_turns: int = 0
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them the assistant wrote.

    The ids begin with the tokenizer's BOS, if it has one, whether or not the template writes it. When the last turn is
    the assistant's and the template does not end it with EOS, one is appended: otherwise nothing would learn to stop.

    Args:
        tokenizer: whose ids and template.
        messages: the conversation.
        add_generation_prompt: end with what precedes the assistant's next turn.
        skip_turns: so many of the assistant's turns, from the first, are left out of the mask (they are the prompt's).

    Returns:
        ids and a mask of the same length.

    Raises:
        ValueError: see `render`.
    """
    special = sorted(tokenizer.special_tokens, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, special))) if special else None
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    try:
        rendered = render(
            _literal(list(messages), pattern),
            template,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.template_tokens,
            spans=not add_generation_prompt,
        )
    except ValueError as error:
        name = getattr(tokenizer, "name", type(tokenizer).__name__)
        raise ValueError(f"{error} (the template of {name}, {template.strip()[:40]!r}...)") from error
    ids, mask = _encode_rendered(tokenizer, Rendered(rendered.text, rendered.spans[skip_turns:]), pattern)
    if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        ids, mask = [tokenizer.bos_id, *ids], [False, *mask]
    if messages[-1].get("role") == "assistant" and not add_generation_prompt:
        first = len(mask)  # of the last turn
        while first > 0 and (mask[first - 1] or True not in mask[first:]):
            first -= 1
        if tokenizer.eos_id not in ids[first:]:
            ids, mask = [*ids, tokenizer.eos_id], [*mask, True]
    return ids, mask


def _literal(value: Any, pattern: re.Pattern[str] | None) -> Any:
    """The messages with every special token in their text broken in two by a mark."""
    if isinstance(value, str):
        text = _MARKS.sub("", value)
        return text if pattern is None else pattern.sub(lambda m: f"{m[0][:1]}{_SPLIT}{m[0][1:]}", text)
    if isinstance(value, list):
        return [_literal(v, pattern) for v in value]
    if isinstance(value, dict):
        return {k: v if k == "role" else _literal(v, pattern) for k, v in value.items()}
    return value


def _encode_rendered(
    tokenizer: Tokenizer, rendered: Rendered, pattern: re.Pattern[str] | None
) -> tuple[list[int], list[bool]]:
    text = rendered.text
    if _SPLIT not in text:
        ids, offsets = tokenizer.encode_offsets(text, special=True)
    else:  # rare: a message contains a special token as text; encode piece by piece
        assert pattern is not None
        ids, offsets = [], []
        position = 0
        for match in [*pattern.finditer(text), None]:
            end = match.start() if match else len(text)
            kept = [i for i in range(position, end) if text[i] != _SPLIT]
            piece_ids, piece_offsets = tokenizer.encode_offsets("".join(text[i] for i in kept), special=False)
            ids += piece_ids
            offsets += [(kept[a], kept[b - 1] + 1) if b > a else (position, position) for a, b in piece_offsets]
            if match:
                ids.append(tokenizer.special_tokens[match[0]])
                offsets.append(match.span())
                position = match.end()
    mask = [False] * len(ids)
    spans = iter(rendered.spans)
    span = next(spans, None)
    for i, (start, end) in enumerate(offsets):
        while span is not None and start >= span[1]:
            span = next(spans, None)
        mask[i] = span is not None and start >= span[0] and end > start
    return ids, mask
