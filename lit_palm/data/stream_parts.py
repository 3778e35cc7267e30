"""Parts of files that are read while training, from any place on.

A part is one file, or one of `parts` that it is cut into. It is read from any *place*, a number that `read` gave with
the row before it:

    for place, number, columns in part.read(0): ...        # place: where the row after this one begins
    part.where(number)                                     # "reviews.jsonl:12", for messages

Lines are cut at byte offsets and parquet at row numbers, so that a part is found without reading what comes
before; compressed files and the other formats are cut by taking every k-th row, and skipped through.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import fsspec

from lit_palm.data import sources
from lit_palm.data.sources import TextUnit

__all__ = ["AnyPart", "Found", "LinesPart", "ParquetPart", "Part"]

CUT_BY_BYTES = 2**20  # smaller parts are cut by rows: byte offsets would leave some of them without a line


class Found(NamedTuple):
    """A row: where the next one begins, its own number (for `Part.where`), its columns."""

    place: int
    number: int
    columns: dict[str, Any]


class Part(ABC):
    """A part of one file or shard."""

    @abstractmethod
    def read(self, place: int) -> Iterator[Found]:
        """The rows from a place on; 0 is the beginning.

        Raises:
            ValueError: when a row is not as it should be, or the file cannot be read; names file and line.
        """

    @abstractmethod
    def where(self, number: int) -> str:
        """The place of a row, for messages."""


class AnyPart(Part):
    """Every k-th row of a file in any format; places count rows of the whole file."""

    def __init__(self, file: str, split: str, text_unit: TextUnit, part: int, parts: int) -> None:
        self.file, self.split, self.text_unit = file, split, text_unit
        self.part, self.parts = part, parts
        self._where = ""

    def read(self, place: int) -> Iterator[Found]:
        rows = sources._from_file(self.file, self.split, self.text_unit)
        for number, row in enumerate(islice(rows, place, None), place):
            if number % self.parts == self.part:
                self._where = row.where
                yield Found(number + 1, number, row.columns)

    def where(self, number: int) -> str:
        return self._where  # the row that was read last is the one that is asked about


class LinesPart(Part):
    """Lines of JSON or text, perhaps compressed: a range of bytes, or every k-th line where ranges would be small.

    Places are byte offsets, and line numbers in a compressed file.
    """

    def __init__(self, file: str, part: int, parts: int, text: bool = False) -> None:
        self.file, self.part, self.parts, self.text = file, part, parts, text
        self.compressed = file.endswith(sources._COMPRESSED)
        fs, path = sources._open_fs(file)
        size = None if self.compressed else fs.size(path)
        self.begin, self.end = 0, size
        self.stride = 1 if parts == 1 else parts
        if size is not None and size >= parts * CUT_BY_BYTES:
            self.begin, self.end = size * part // parts, size * (part + 1) // parts
            self.stride = 1

    def read(self, place: int) -> Iterator[Found]:
        number = 0
        try:
            with fsspec.open(self.file, "rb", compression="infer") as file:
                for number, after, line in self._lines(file, place):
                    if line.strip():
                        yield Found(after, number, self._columns(number, line))
        except (OSError, EOFError) as error:
            where = self.where(number)
            raise ValueError(f"{where}: this file cannot be read after this line ({error})") from error

    def _columns(self, number: int, line: bytes) -> dict[str, Any]:
        if self.text:
            try:
                return {"text": line.decode().rstrip("\r\n")}
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.where(number)}: this line is not UTF-8 text ({error})") from error
        try:
            columns = sources.json.loads(line)
        except ValueError:
            columns = None
        if not isinstance(columns, dict):  # again, for the reason with its place
            return sources._parse(self.where(number), line.decode("utf-8", "replace"))
        return columns

    def _lines(self, file: Any, place: int) -> Iterator[tuple[int, int, bytes]]:
        """(number for `where`, place after it, line) of the part's lines."""
        if self.compressed or self.stride > 1:
            yield from self._every(file, place)
            return
        assert self.end is not None
        offset = max(place, self.begin)
        if 0 < offset == self.begin:
            file.seek(offset - 1)
            offset += len(file.readline()) - 1  # the rest of a line that began in the part before
        else:
            file.seek(offset)
        while offset < self.end:
            line = file.readline()
            if not line:
                return
            after = offset + len(line)
            yield offset, after, line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line
            offset = after

    def _every(self, file: Any, place: int) -> Iterator[tuple[int, int, bytes]]:
        for number, line in enumerate(islice(file, place, None), place):
            if number % self.stride == (self.part if self.stride > 1 else 0):
                yield number, number + 1, line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line

    def where(self, number: int) -> str:
        if not self.compressed and self.stride == 1:  # an offset: count the lines before it
            with fsspec.open(self.file, "rb") as file:
                left, lines = number, 0
                while left > 0 and (block := file.read(min(left, 2**20))):
                    lines, left = lines + block.count(b"\n"), left - len(block)
            number = lines
        return f"{self.file}:{number + 1}"


class ParquetPart(Part):
    """A range of a parquet file's rows; places are row numbers, and row groups before a place are not read."""

    columns: Sequence[str] = ()
    """Read these only, those of them that there are; empty: all."""

    def __init__(self, file: str, part: int, parts: int) -> None:
        self.file, self.part, self.parts = file, part, parts

    def read(self, place: int) -> Iterator[Found]:
        with fsspec.open(self.file, "rb") as raw:
            yield from self._rows(raw, place)

    def _rows(self, raw: Any, place: int) -> Iterator[Found]:
        import pyarrow.parquet

        file = sources._reading(self.file, lambda: pyarrow.parquet.ParquetFile(raw))
        total = file.metadata.num_rows
        first, last = max(place, total * self.part // self.parts), total * (self.part + 1) // self.parts
        names = [name for name in self.columns if name in file.schema_arrow.names] or None
        begin = 0
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            if begin + size > first and begin < last:
                batches = file.iter_batches(batch_size=256, row_groups=[group], columns=names, use_threads=False)
                yield from self._in_group(batches, begin, first, last)
            begin += size

    def _in_group(self, batches: Any, number: int, first: int, last: int) -> Iterator[Found]:
        while number < last:
            batch = sources._reading(self.where(number), lambda: next(batches, None))
            if batch is None:
                return
            if number + len(batch) > first:
                for at, columns in enumerate(batch.to_pylist(), number):
                    if first <= at < last:
                        yield Found(at + 1, at, columns)
            number += len(batch)

    def where(self, number: int) -> str:
        return f"{self.file}, row {number + 1}"
