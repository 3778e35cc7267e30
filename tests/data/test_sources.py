"""Sources: every format gives the rows that were written into it, and says where each came from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_palm.data.sources import read_rows, source_fingerprint

ROWS = [{"prompt": "a, b", "answer": "007"}, {"prompt": 'say "é"\ntwice', "answer": ""}]


def fill(url: str, suffix: str) -> str:
    """Write ROWS into a file of the format; url may be any fsspec path without its suffix."""
    name = url + suffix
    fs, path = fsspec.core.url_to_fs(name)
    lines = "".join(json.dumps(r) + "\n" for r in ROWS)
    if suffix == ".parquet":
        with fs.open(path, "wb") as file:
            pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif suffix == ".arrow":
        table = pa.Table.from_pylist(ROWS)
        with fs.open(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        text = {
            ".jsonl": lines,
            ".json": json.dumps(ROWS, indent=1),
            ".csv": 'prompt,answer\n"a, b",007\n"say ""é""\ntwice",\n',
            ".tsv": 'prompt\tanswer\na, b\t007\n"say ""é""\ntwice"\t\n',
        }.get(suffix.removesuffix(".gz"), lines)
        data = text.encode()
        with fs.open(path, "wb") as file:
            file.write(gzip.compress(data) if suffix.endswith(".gz") else data)
    return name


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".csv.gz", ".tsv", ".parquet", ".arrow"])
@pytest.mark.parametrize("where", ["local", "memory"])
def test_every_format_gives_its_rows(suffix: str, where: str, tmp_path: Path) -> None:
    name = fill(str(tmp_path / "x") if where == "local" else "memory://sources/x", suffix)
    assert [row.columns for row in read_rows(name)] == ROWS
    assert [row.columns for row in read_rows(name, limit=1)] == ROWS[:1]


def test_rows_know_their_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('\ufeff{"a": 1}\n\n{"a": 2}\n', encoding="utf-8")
    assert [(r.where[-7:], r.columns["a"]) for r in read_rows(str(tmp_path / "x.jsonl"))] == [
        ("jsonl:1", 1),
        ("jsonl:3", 2),
    ]
    (tmp_path / "x.txt").write_text("one\n\ntwo\n")
    assert [(r.where[-5:], r.columns["text"]) for r in read_rows(str(tmp_path / "x.txt"))] == [
        ("txt:1", "one"),
        ("txt:2", ""),
        ("txt:3", "two"),
    ]
    whole = [r.columns["text"] for r in read_rows(str(tmp_path / "x.txt"), text_unit="document")]
    assert whole == ["one\n\ntwo\n"]
    paragraphs = [r.columns["text"].strip() for r in read_rows(str(tmp_path / "x.txt"), text_unit="paragraph")]
    assert paragraphs == ["one", "two"]


def test_folders_globs_and_saved_datasets(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    for i in (2, 1):
        (tmp_path / "f" / f"{i}.jsonl").write_text(json.dumps({"a": i}) + "\n")
    (tmp_path / "f" / "notes.md").write_text("no data")
    for source in (str(tmp_path / "f"), str(tmp_path / "f" / "*.jsonl"), f"file://{tmp_path}/f/[12].jsonl"):
        assert [r.columns["a"] for r in read_rows(source)] == [1, 2]
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    assert [r.columns for r in read_rows(str(tmp_path / "one"))] == ROWS
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "many"))
    assert [r.columns for r in read_rows(str(tmp_path / "many"), "test")] == ROWS[1:]
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        list(read_rows(str(tmp_path / "many"), "dev"))


def test_hub_names_go_to_load_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [r.columns for r in read_rows("someone/things:small", "test")] == ROWS
    assert next(iter(read_rows("things"))).where == "things (train), row 1"
    assert asked == [("someone/things", "small", "test"), ("things", None, "train")]


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n')
    before = source_fingerprint(str(path), "train")
    assert source_fingerprint(str(path), "train") == before
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert source_fingerprint(str(path), "train") != before
    name = fill("memory://sources/y", ".jsonl")
    before = source_fingerprint(name, "train")
    with fsspec.open(name, "a") as file:
        file.write("{}\n")
    assert source_fingerprint(name, "train") != before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', r"x\.jsonl:2: this line is not JSON"),
        ("x.jsonl", b'{"a": 1}\n\n[1]\n', r"x\.jsonl:3: this line is JSON but no object"),
        ("x.jsonl", b"", "there are no rows"),
        ("x.jsonl", b"\n\n", "there are no rows"),
        ("x.jsonl", b'{"a": 1}\n\xff\xfe{}\n', r"x\.jsonl: this file is not UTF-8"),
        ("x.jsonl.gz", b"no gzip", r"x\.jsonl\.gz: this file cannot be read"),
        ("x.json", b"[{}, 3]", r"x\.json, item 2: each item must be a JSON object"),
        ("x.json", b"[{}, ", r"x\.json: this file is not JSON"),
        ("x.csv", b"a,b\n1,2\n3\n", r"x\.csv:3: this line has another number of columns"),
        ("x.csv", b"a,b\n", "there are no rows"),
        ("x.parquet", b"PAR?", r"x\.parquet: this file cannot be read"),
        ("x.parquet", b"", "there are no rows"),
        ("x.txt", b"", "there are no rows"),
        ("x.bin", b"data", r"x\.bin: this is no data file; its name must end in"),
    ],
)
def test_faulty_files_are_named_with_the_line(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        list(read_rows(str(tmp_path / name)))


def test_missing_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    (tmp_path / "empty").mkdir()
    for source, words in {
        str(tmp_path / "no.jsonl"): r"no\.jsonl: there is no such file",
        str(tmp_path / "no" / "folder"): "there is no such file",
        str(tmp_path / "*.jsonl"): "no file matches",
        str(tmp_path / "empty"): "no data file in this folder",
        "memory://sources/none.jsonl": "there is no such file",
        "nosuchprotocol://x.jsonl": "cannot be opened here",
        "someone/things": "split 'train' of a hub dataset",
        "": "empty string",
    }.items():
        with pytest.raises(ValueError, match=words):
            list(read_rows(source))
