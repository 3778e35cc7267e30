"""Open Assistant's trees of messages (Köpf et al. 2023, "OpenAssistant Conversations")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lit_palm.data.readers.base import Drop, Reader
from lit_palm.data.readers.places import Hub
from lit_palm.data.sources import Row
from lit_palm.data.templates import Message

__all__ = ["OASST"]

_ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass
class _Node:
    """A message of a tree, with those that answer it."""

    row: Row
    id: str
    parent: str | None
    text: str
    role: str
    lang: str | None
    rank: int | None
    fault: str | None
    replies: list[_Node] = field(default_factory=list)

    @property
    def message(self) -> Message:
        return {"role": self.role, "content": self.text}


class OASST(Reader):
    """OpenAssistant/oasst1 and oasst2: trees of messages, each with the rank that people gave it.

    Read are messages in rows of their own, which the hub serves, and the nested files `*.trees.jsonl.gz`.

    demonstrations: the threads of a tree, from its root along the best replies to the last one of the assistant.
    preferences: the ranked replies to a message, 0 is best. prompts: every message of a prompter on these threads, with
    what was said before. A tree stays on one side of `validation_fraction`.

    What is left out takes along everything that was answered to it.

    Args:
        version: 1 or 2.
        lang: languages of the messages, such as [en, de]; None: all.
        top_k: threads and prompts follow so many of the best replies of the assistant to a message; None: all.
        synthetic: take also what a model wrote.
        state: trees that are not in this state are left out; empty: none are. The hub's rows are all ready_for_export,
            the files `*_all.*` are not.

    Raises:
        ValueError: when `top_k` is below 1.
    """

    def __init__(
        self,
        version: Literal[1, 2] = 1,
        lang: list[str] | None = None,
        top_k: int | None = 1,
        synthetic: bool = True,
        state: str = "ready_for_export",
    ) -> None:
        if top_k is not None and top_k < 1:
            raise ValueError(f"data.reader.top_k is {top_k}; it must be at least 1")
        self.version, self.lang, self.top_k = version, lang, top_k
        self.synthetic, self.state = synthetic, state

    @property
    def hub(self) -> Hub:
        return Hub(f"OpenAssistant/oasst{self.version}")

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for root in self._trees(rows, drop, self.top_k):
            for path in _paths(root):
                if path[-1].role == "user":  # nobody answered
                    leaf, path = path[-1], path[:-1]
                    if not path:
                        drop(leaf.row, "nobody answers the message")
                        continue
                    answered = any(reply.replies for reply in path[-1].replies)
                    if answered or leaf is not path[-1].replies[0]:  # another path goes on, or ends here too
                        continue
                yield Row(path[-1].row.where, {"messages": [node.message for node in path]}, root.id)

    def preferences(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for root in self._trees(rows, drop, None):
            for path in _paths(root, every=True):
                node = path[-1]
                if node.role != "user" or not node.replies:
                    continue
                ranked = [reply for reply in node.replies if reply.rank is not None]
                if len(ranked) < 2:
                    drop(node.row, "a message has fewer than two ranked replies")
                    continue
                columns = {
                    "prompt": [n.message for n in path],
                    "completions": [reply.text for reply in ranked],
                    "ranks": [reply.rank for reply in ranked],
                }
                yield Row(f"{node.row.where} (message {node.id})", columns, root.id)

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for root in self._trees(rows, drop, self.top_k):
            for path in _paths(root, every=True):
                node = path[-1]
                if node.role == "user":
                    columns = {"prompt": [n.message for n in path], "lang": node.lang, "message_id": node.id}
                    yield Row(node.row.where, columns, root.id)

    # ---- trees

    def _trees(self, rows: Iterator[Row], drop: Drop, top_k: int | None) -> Iterator[_Node]:
        """Roots of trees without what is left out."""
        flat: dict[str, _Node] = {}
        for row in rows:
            if isinstance(row.columns.get("prompt"), Mapping):
                root = self._nested(row, "prompt.", self.field(row, "tree_state", str, null=True))
                yield from self._pruned(root, drop, top_k)
            else:
                node = self._node(row, "", self.field(row, "tree_state", str, null=True))
                flat[node.id] = node
        roots = []
        for node in flat.values():
            if node.parent is None:
                roots.append(node)
            elif node.parent in flat:
                flat[node.parent].replies.append(node)
            else:
                drop(node.row, "the message that is answered is not in the data")
        for root in roots:
            yield from self._pruned(root, drop, top_k)

    def _nested(self, row: Row, at: str, state: str | None) -> _Node:
        node = self._node(row, at, state)
        replies = self.field(row, f"{at}replies", list, null=True) or []
        node.replies = [self._nested(row, f"{at}replies[{i}].", state) for i in range(len(replies))]
        return node

    def _node(self, row: Row, at: str, state: str | None) -> _Node:
        def get(name: str, kind: Any, null: bool = False) -> Any:
            return self.field(row, at + name, kind, null)

        role = get("role", str)
        if role not in _ROLES:
            raise self.off(row, f"{at}role", str, f"is {role!r}, neither 'prompter' nor 'assistant'")
        lang, fault = get("lang", str, null=True), None
        if self.state and state is not None and state != self.state:
            fault = f"the tree is not {self.state} (data.reader.state)"
        elif get("deleted", bool, null=True):
            fault = "the message was deleted"
        elif get("review_result", bool, null=True) is False:
            fault = "the message did not pass review"
        elif self.lang is not None and lang not in self.lang:
            fault = f"the message is not in {' or '.join(self.lang)} (data.reader.lang)"
        elif not self.synthetic and get("synthetic", bool, null=True):
            fault = "a model wrote the message (data.reader.synthetic)"
        identity, parent, text = get("message_id", str), get("parent_id", str, null=True), get("text", str)
        place = Row(row.where, {})  # the rest of a hundred thousand rows would take half a gigabyte
        return _Node(place, identity, parent, text, _ROLES[role], lang, get("rank", int, null=True), fault)

    def _pruned(self, root: _Node, drop: Drop, top_k: int | None) -> Iterator[_Node]:
        """The tree without what is left out, if its root stays."""
        stack: list[tuple[_Node, str | None]] = [(root, root.fault)]
        while stack:
            node, fault = stack.pop()
            if fault is not None:
                drop(node.row, fault)
            below = fault and "a message is left out that this one follows"
            best: list[_Node] = [reply for reply in node.replies if reply.fault is None]
            if top_k is not None and node.role == "user":
                best = sorted(best, key=lambda reply: (reply.rank is None, reply.rank or 0))[:top_k]
            for reply in reversed(node.replies):
                beyond = None if reply in best else f"a reply is not among the {top_k} best (data.reader.top_k)"
                stack.append((reply, below or reply.fault or beyond))
            node.replies = best
        if root.fault is None:
            yield root


def _paths(root: _Node, every: bool = False) -> Iterator[list[_Node]]:
    """The paths from the root to the leaves, or to every message."""
    stack = [[root]]
    while stack:
        path = stack.pop()
        if every or not path[-1].replies:
            yield path
        stack += [[*path, reply] for reply in reversed(path[-1].replies)]
