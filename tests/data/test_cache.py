"""Records of an entry come back as they were written, in order, without being held as objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_palm.data import cache


@pytest.mark.parametrize("block", [1, 7, 2**24])
def test_records_are_read_when_they_are_asked_for(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_BLOCK", block)
    rows: list[dict[str, Any]] = [{"text": "a\nb é \u2028"}, {}, {"n": [1, {"x": None}]}]

    def build(writer: cache.ColumnWriter) -> None:
        for row in rows:
            writer.append_record(row)

    records = cache.cached(tmp_path, {"block": block}, build, "records").records
    assert len(records) == 3 and list(records) == rows
    assert (records[-1], records[1:]) == (rows[2], rows[1:])
    with pytest.raises(IndexError):
        records[3]
    assert len(cache.cached(tmp_path, {"empty": block}, lambda writer: None, "none").records) == 0
