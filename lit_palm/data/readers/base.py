"""What a reader is: rows as a published dataset has them in, the columns that data modules take out.

    data = PreferenceData(reader=OASST(lang=["en"]))                      # the hub's dataset, its own splits
    data = PreferenceData(reader=OASST(), train="2023-04-12_oasst_ready.trees.jsonl.gz")

A reader knows where its dataset is (`hub`, `splits`), and gives one or several views of a row: `demonstrations`
(messages, or prompt and completion), `preferences` (prompt with chosen and rejected, or with completions and ranks, or
with a completion and its rating) and `prompts` (a prompt, with whatever a reward needs to know). The data module asks
for the view that it trains on. A view is a method; a reader has those that it defines.

What a view leaves out it says with `drop(row, reason)`; reasons are counted, kept with the tokenised data and reported.
What is off the schema is an error that names file, line and key: `self.field(row, "info.post", str)`.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal

from lit_palm.data.readers.places import Hub, open_rows, place_fingerprint, place_has_splits
from lit_palm.data.sources import Row
from lit_palm.data.templates import Message

__all__ = ["MODULES", "Drop", "Reader", "View", "check_view", "distinct", "user"]

View = Literal["demonstrations", "preferences", "prompts"]
Drop = Callable[[Row, str], None]
"""drop(row, reason): counts a row that is left out, or of which a part is."""

MODULES: dict[View, str] = {  # which data module takes which view
    "demonstrations": "DemonstrationData",
    "preferences": "PreferenceData",
    "prompts": "PromptData",
}
_KINDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}


class Reader(ABC):
    """Base class of readers; subclass it, say where the data is, and define the views that it has.

    Arguments of a reader become attributes of the same name: they, the class and `VERSION` tell its tokenised data from
    others in the cache.
    """

    VERSION: ClassVar[int] = 1
    """Raise it when the reader makes something else of the same rows, so that nothing old is taken from the cache."""

    @property
    @abstractmethod
    def hub(self) -> Hub:
        """Where the hub has the dataset."""

    def splits(self, view: View) -> Mapping[str, str]:
        """What the dataset calls `train`, `validation` and `test`; a split that it lacks is left out."""
        return {"train": "train", "validation": "validation"}

    # ---- views; each yields rows with the columns that the data module of the same kind takes

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        """Rows of `messages`, or of `prompt` and `completion`."""
        raise self._lacks("demonstrations")

    def preferences(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        """Rows of `prompt`, `chosen`, `rejected`; of `prompt`, `completions`, `ranks`; or of `prompt`, `completion`,
        `rating`: the same columns in all rows."""
        raise self._lacks("preferences")

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        """Rows of `prompt` and anything that rewards read."""
        raise self._lacks("prompts")

    def _lacks(self, view: View) -> NotImplementedError:
        """A view is a reader's own choice; data modules ask `views` before they ask for one."""
        return NotImplementedError(f"{type(self).__name__} gives no {view}")

    @classmethod
    def views(cls) -> tuple[View, ...]:
        """The views that this reader defines."""
        return tuple(view for view in MODULES if getattr(cls, view) is not getattr(Reader, view))

    # ---- what data modules call

    def rows(
        self,
        source: str,
        split: str,
        view: View,
        limit: int | None,
        drop: Drop,
        through: Callable[[Iterator[Row]], Iterator[Row]] = iter,
    ) -> Iterator[Row]:
        """The rows of a source as a view of them.

        Args:
            source: the name of a hub dataset, or a file, folder, glob or URL that holds what the hub does.
            split: `train`, `validation`, `test`, or a split's own name.
            view: one of `views()`.
            limit: read at most this many rows of the source.
            drop: told of every row that is left out.
            through: what the rows pass as they are read, such as a counter.

        Raises:
            ValueError: naming file, line and key, for a row off the schema.
        """
        return getattr(self, view)(through(self.open(source, self.splits(view).get(split, split), limit)), drop)

    def open(self, source: str, split: str, limit: int | None) -> Iterator[Row]:
        """The rows of a source as they are; `split` is a name of the dataset's own."""
        return open_rows(self.hub, source, split, limit)

    def has_splits(self, source: str) -> bool:
        """Whether `split` chooses among the rows of a source."""
        return place_has_splits(self.hub, source)

    def identity(self, source: str, split: str, view: View) -> str:
        """Changes when the rows may have changed, or what is made of them."""
        made = json.dumps([f"{type(self).__module__}.{type(self).__qualname__}", self.VERSION, view, vars(self)],
                          sort_keys=True, default=repr)  # fmt: skip
        place = place_fingerprint(self.hub, source, self.splits(view).get(split, split))
        return hashlib.sha256(f"{made}\n{split}\n{place}".encode()).hexdigest()

    # ---- for subclasses

    def field(self, row: Row, path: str, kind: Any = object, null: bool = False) -> Any:
        """A value inside a row.

        Args:
            row: as read.
            path: keys from the outside in: "info.post", "summaries[0].text".
            kind: str, int, float (whole numbers too), bool, list, or a tuple of these.
            null: None on the way, and the last key missing, are fine and give None.

        Raises:
            ValueError: naming file, line, key and what is expected there.
        """
        value: Any = row.columns
        parts = _parts(path)
        for number, part in enumerate(parts, 1):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, (list, tuple)) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            elif null and (value is None or (number == len(parts) and isinstance(value, Mapping))):
                return None
            else:
                keys = ", ".join(map(repr, value)) if isinstance(value, Mapping) else "none"
                raise self.off(row, path, kind, f"is missing (the keys there are {keys})")
        if isinstance(value, float) and value != value:
            value = None  # how pandas writes what is missing
        if value is None and null:
            return None
        if value is None:
            raise self.off(row, path, kind, "is null")
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wider = {float: (float, int), list: (list, tuple)}
        allowed = tuple(k for known in kinds for k in wider.get(known, (known,)))
        flag = isinstance(value, bool) and not {bool, object} & {*kinds}  # which Python takes for a number
        if flag or not isinstance(value, allowed):
            raise self.off(row, path, kind, f"is {type(value).__name__} ({value!r:.60})")
        return value

    def off(self, row: Row, path: str, kind: Any, found: str) -> ValueError:
        """The error for a row off the schema."""
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = "" if kind is object else ", " + " or ".join(_KINDS.get(k, str(k)) for k in kinds)
        return ValueError(
            f"{row.where}: the key {path!r} {found}; {type(self).__name__} reads rows as {self.hub.name} has them, and"
            f" expects {path!r}{wanted}"
        )


@lru_cache(maxsize=4096)
def _parts(path: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", path)


def check_view(reader: Reader, view: View | None, module: str) -> None:
    """Refuse a reader that has not what a data module trains on.

    Raises:
        ValueError: naming the data modules that it is for.
    """
    if view not in reader.views():
        name, others = type(reader).__name__, " or ".join(f"{MODULES[v]} ({v})" for v in reader.views())
        why = "takes no reader" if view is None else f"trains on {view}, which {name} does not have"
        way_out = f"use {others}" if others else "it defines no view: demonstrations, preferences or prompts"
        raise ValueError(f"data.reader {name}: {module} {why}; {way_out}")


def distinct(rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
    """Rows whose prompt did not occur before."""
    seen: set[bytes] = set()
    for row in rows:
        digest = hashlib.sha256(json.dumps(row.columns["prompt"]).encode()).digest()[:16]
        if digest in seen:
            drop(row, "the prompt occurred before")
        else:
            seen.add(digest)
            yield row


def user(text: str, system: str | None = None) -> list[Message]:
    """What a user said, as messages."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]
