"""The formats in which people keep preferences, all turned into groups: a prompt with its judged answers.

| columns                                       | one group is                                                       |
|-----------------------------------------------|--------------------------------------------------------------------|
| prompt, chosen, rejected (margin)             | a pair                                                             |
| chosen, rejected (margin)                     | a pair of whole dialogues (Anthropic hh-rlhf); what they share is   |
|                                               | the prompt                                                         |
| prompt, completions, ranks                    | a ranking, 0 is best, equal ranks are ties                         |
| (prompt) completion or text, rating           | one answer with what people gave it                                |
| prompt, completion, label                     | one answer, and whether people wanted it (unpaired feedback)       |
| message_id, parent_id, text, role, rank, ...  | the ranked replies to one message (OASST), rows flat or trees with |
|                                               | `replies`; also {"prompt": tree}                                   |

A prompt or an answer is a string or a list of messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

from lit_palm.data.conversations import Turn, as_messages, split_key, turn
from lit_palm.data.readers.hh import SPEAKER, hh_messages, shared_turns
from lit_palm.data.sources import Row, column
from lit_palm.data.templates import Message

__all__ = ["Answer", "Group", "groups"]


class Answer(NamedTuple):
    """An answer with what people thought of it.

    Args:
        completion: a string or messages.
        rank: 0 is best.
        rating: a number.
        margin: by how much the chosen answer of the pair was preferred.
        label: whether people wanted it.
        name: the column it comes from, for messages.
    """

    completion: Turn
    rank: int | None = None
    rating: float | None = None
    margin: float | None = None
    label: bool | None = None
    name: str = "completion"


class Group(NamedTuple):
    """A prompt with its answers; `key` is what a split goes by, `where` the place it came from."""

    prompt: Turn
    answers: list[Answer]
    key: str
    where: str


def groups(rows: Iterator[Row]) -> Iterator[Group]:
    """The groups of a source; its first row decides the format.

    Raises:
        ValueError: naming file, line and column.
    """
    first = next(rows, None)
    if first is None:  # a reader left them all out
        return
    has = set(first.columns)
    rows = chain([first], rows)
    read: Callable[[Row], Group]
    if {"message_id", "parent_id"} <= has or isinstance(first.columns.get("prompt"), dict):
        yield from _oasst(rows)
        return
    if "completions" in has:
        read = _ranking
    elif "chosen" in has or "rejected" in has:
        margin = "margin" in has

        def read(row: Row) -> Group:
            return _pair(row, margin)

    elif "rating" in has:
        read = _rating
    elif "label" in has:
        read = _feedback
    else:
        raise ValueError(
            f"{first.where}: these are no preferences: the columns are {', '.join(map(repr, first.columns))}, but there"
            " must be 'chosen' and 'rejected', 'completions' and 'ranks', 'completion' and 'rating', 'completion' and"
            " 'label', or OASST messages"
        )
    for row in rows:
        yield read(row)


def _pair(row: Row, has_margin: bool) -> Group:
    chosen, rejected = turn(row, "chosen"), turn(row, "rejected")
    if type(chosen) is not type(rejected):
        raise ValueError(f"{row.where}: 'chosen' and 'rejected' must both be strings, or both messages")
    prompt: Turn = ""
    whole = "prompt" not in row.columns
    if not whole:
        prompt = turn(row, "prompt")
        # some publish a prompt beside dialogues that repeat it
        whole = isinstance(chosen, list) and chosen[0]["role"] != "assistant" and not isinstance(prompt, list)
    if whole:
        prompt, chosen, rejected = _split_dialogues(row.where, chosen, rejected)
    margin = _number(row, "margin") if has_margin else None
    answers = [
        Answer(chosen, rank=0, margin=margin, name="chosen"),
        Answer(rejected, rank=1, margin=margin, name="rejected"),
    ]
    return Group(prompt, answers, row.group or split_key(prompt, chosen), row.where)


def _split_dialogues(where: str, chosen: Turn, rejected: Turn) -> tuple[Turn, Turn, Turn]:
    """The prompt that two dialogues share, and how each goes on."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not (SPEAKER.match(chosen) and SPEAKER.match(rejected)):
            return "", chosen, rejected
        chosen, rejected = hh_messages(chosen), hh_messages(rejected)
    assert isinstance(chosen, list) and isinstance(rejected, list)
    same = shared_turns(chosen, rejected)
    for name, dialogue in (("chosen", chosen), ("rejected", rejected)):
        if dialogue[-1]["role"] != "assistant":
            raise ValueError(f"{where}: the dialogue {name!r} does not end with what the assistant said")
    return chosen[:same], chosen[same:], rejected[same:]


def _ranking(row: Row) -> Group:
    prompt = turn(row, "prompt")
    answers, ranks = row.columns.get("completions"), row.columns.get("ranks")
    if not isinstance(answers, (list, tuple)) or not isinstance(ranks, (list, tuple)):
        raise ValueError(f"{row.where}: 'completions' and 'ranks' must be lists of one length")
    if len(answers) != len(ranks):
        raise ValueError(f"{row.where}: there are {len(answers)} 'completions' but {len(ranks)} 'ranks'")
    if len(answers) < 2:
        raise ValueError(f"{row.where}: a ranking needs at least two answers, this one has {len(answers)}")
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank != int(rank):
            raise ValueError(f"{row.where}: 'ranks' must be whole numbers, 0 for the best answer; one is {rank!r}")
    turns = [turn(Row(row.where, {"completions": answer}), "completions") for answer in answers]
    judged = enumerate(zip(turns, ranks, strict=True))
    ranked = [Answer(turn, rank=int(rank), name=f"completions[{i}]") for i, (turn, rank) in judged]
    return Group(prompt, ranked, row.group or split_key(prompt, turns[0]), row.where)


def _rating(row: Row) -> Group:
    prompt: Turn = turn(row, "prompt") if row.columns.get("prompt") is not None else ""
    completion = turn(row, "text" if "text" in row.columns and "completion" not in row.columns else "completion")
    answer = Answer(completion, rating=_number(row, "rating"))
    return Group(prompt, [answer], row.group or split_key(prompt, completion), row.where)


def _feedback(row: Row) -> Group:
    prompt, completion = turn(row, "prompt"), turn(row, "completion")
    label = column(row, "label")
    if not isinstance(label, bool) and not (isinstance(label, int) and label in (0, 1)):
        raise ValueError(
            f"{row.where}: column 'label' must be true or false (or 1 or 0), not {label!r:.60} of type"
            f" {type(label).__name__}; what people wanted is true. CSV files hold nothing but text: write jsonl"
        )
    return Group(prompt, [Answer(completion, label=bool(label))], split_key(prompt, completion), row.where)


def _number(row: Row, name: str) -> float:
    value = row.columns.get(name)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"{row.where}: column {name!r} must be a number, not {value!r}") from None
    if number != number or abs(number) == float("inf"):
        raise ValueError(f"{row.where}: column {name!r} is {value!r}; it must be finite")
    return number


def _oasst(rows: Iterator[Row]) -> Iterator[Group]:
    """Every message with two or more ranked replies of the assistant is a group; single replies rank nothing."""
    flat: dict[str | None, list[dict[str, Any]]] = {}
    flat_where: dict[str, str] = {}
    for row in rows:
        node = row.columns["prompt"] if isinstance(row.columns.get("prompt"), dict) else row.columns
        for name in ("message_id", "text", "role"):
            if not isinstance(node.get(name), str):
                raise ValueError(f"{row.where}: an OASST message must have a string {name!r}")
        if "replies" in node:
            yield from _ranked_replies(node, [], node["text"], row.where)
        else:
            flat.setdefault(node.get("parent_id"), []).append(dict(node))
            flat_where[node["message_id"]] = row.where
    for root in flat.get(None, []):
        _attach(root, flat)
        yield from _ranked_replies(root, [], root["text"], flat_where[root["message_id"]])


def _attach(root: dict[str, Any], children: dict[str | None, list[dict[str, Any]]]) -> None:
    stack = [root]
    while stack:
        node = stack.pop()
        node["replies"] = children.get(node["message_id"], [])
        stack += node["replies"]


def _ranked_replies(node: dict[str, Any], before: list[Message], key: str, where: str) -> Iterator[Group]:
    role = "assistant" if node["role"] == "assistant" else "user"
    path = [*before, {"role": role, "content": node["text"]}]
    replies = node.get("replies") or []
    ranked = [r for r in replies if r.get("rank") is not None and r["role"] == "assistant"]
    if len(ranked) > 1:
        answers = [
            Answer(as_messages(r["text"], "assistant"), rank=int(r["rank"]), name=f"message {r['message_id']}")
            for r in ranked
        ]
        yield Group(path, answers, key, f"{where} (message {node['message_id']})")
    for reply in replies:
        yield from _ranked_replies(reply, path, key, where)
