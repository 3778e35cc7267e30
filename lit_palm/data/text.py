"""Text for language modelling: documents in packed windows.

    data = TextData(train="reviews.jsonl", batch_size=16, sequence_length=256, tokenizer=BPETokenizer(2048))

Each row of the source is a document: its `text` column (or `tokens`, a list of ids without BOS and EOS, where the text
was tokenised before). A document is BOS (if the tokenizer has one), its ids, EOS. Windows hold whole documents; what
does not fit into a window is split, and a token is never cut from the loss (packing.py says how).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lit_palm.data.base import TokenizedData
from lit_palm.data.cache import Columns, ColumnWriter
from lit_palm.data.packing import Windows, split_documents
from lit_palm.data.sources import Row, TextUnit, column, read_rows
from lit_palm.data.tokenizers import Tokenizer

__all__ = ["Document", "TextData", "checked"]


class Document(NamedTuple):
    """A document: its text, or its ids where it comes tokenised; and its place."""

    text: str | None
    tokens: list[int] | None
    where: str


class TextData(TokenizedData):
    """Documents for pre-training.

    Batches: `tokens`, `mask`, `loss_mask` [B, T]; packed also `documents` and `positions`, with T the sequence length.

    Args:
        sequence_length: length of a window in tokens; also the longest row when `pack` is off.
        pack: several documents in one window, none seeing another; off: one document (or piece of one) in each row.
        text_column: the column that holds the text.
        text_unit: what is one document of a `.txt` file: a line, a paragraph, or the file.
        kwargs: the arguments of `TokenizedData`.

    Raises:
        ValueError: when an argument is out of range.
    """

    def __init__(
        self,
        sequence_length: int = 256,
        pack: bool = True,
        text_column: str = "text",
        text_unit: TextUnit = "line",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if sequence_length < 2:
            raise ValueError(f"data.sequence_length is {sequence_length}; it must be at least 2")
        self.sequence_length = sequence_length
        self.pack = pack
        self.text_column = text_column
        self.text_unit: TextUnit = text_unit

    def arguments(self) -> dict[str, Any]:
        return {"text_column": self.text_column, "text_unit": self.text_unit}

    def read(self, source: str, split: str, limit: int | None) -> Iterator[Row]:
        return read_rows(source, split, limit=limit, text_unit=self.text_unit)

    def parse(self, rows: Iterator[Row]) -> Iterator[tuple[str, Document]]:
        for row in rows:
            if "tokens" in row.columns and self.text_column not in row.columns:
                tokens = column(row, "tokens", (list, tuple))
                yield str(tokens), Document(None, list(tokens), row.where)
            else:
                text = column(row, self.text_column, str)
                if text.strip():  # an empty line is no document
                    yield text, Document(text, None, row.where)

    def texts(self, sample: Document) -> Iterable[str]:
        return () if sample.text is None else (sample.text,)

    def write(self, samples: list[Document], tokenizer: Tokenizer, writer: ColumnWriter) -> None:
        encoded = iter(tokenizer.encode_batch([s.text for s in samples if s.text is not None]))
        for sample in samples:
            ids = next(encoded) if sample.tokens is None else checked(sample, tokenizer.vocab_size)
            document = [*tokenizer.prefix, *ids, tokenizer.eos_id]
            writer.append("tokens", document, np.int32)
            writer.append("lengths", [len(document)], np.int64)

    def elements(self, columns: Columns, tokenizer: Tokenizer) -> Windows:
        self.check_length(self.sequence_length, "sequence_length")
        starts, lengths = split_documents(np.asarray(columns.arrays["lengths"]), self.sequence_length)
        return Windows(
            columns.arrays["tokens"],
            starts,
            lengths,
            tokenizer.pad_id,
            room=self.sequence_length if self.pack else None,
        )


def checked(sample: Document, size: int) -> list[int]:
    """The ids of a document that came tokenised, for a vocabulary of `size` ids.

    Raises:
        ValueError: naming file and line, when one is outside the vocabulary.
    """
    tokens = sample.tokens or []
    wrong = next((t for t in tokens if not isinstance(t, int) or not 0 <= t < size), None)
    if wrong is not None:
        raise ValueError(
            f"{sample.where}: the token id {wrong!r} is outside the vocabulary of {size} ids; the file was tokenised"
            " with another tokenizer"
        )
    return tokens
