"""How data modules use readers: where rows come from, which split they are, what is kept, told and refused."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_palm.data import DemonstrationData, PreferenceData, PromptData, TextData
from lit_palm.data import readers as package
from lit_palm.data.readers import (
    GSM8K,
    HHRLHF,
    OASST,
    Alpaca,
    Drop,
    HelpSteer2,
    HelpSteer2Preference,
    Hub,
    Reader,
    UltraFeedbackBinarized,
)
from lit_palm.data.sources import Row
from tests.data.readers.published import binarized, gsm8k, helpsteer, helpsteer2_preference, hh, oasst

READERS = [
    c
    for n in package.__all__
    if isinstance(c := getattr(package, n), type) and issubclass(c, Reader) and c is not Reader
]


def pair(name: str) -> dict[str, str]:
    return {"chosen": hh(f"question {name}", "good"), "rejected": hh(f"question {name}", "bad")}


def questions(loader: Any, data: Any) -> list[str]:
    texts = [data.tokenizer.decode(t.tolist()) for batch in loader for t in batch.tokens[::2]]
    return sorted(text.split("question ")[1].split("good")[0] for text in texts)


# ------------------------------------------------------------------------------------------ where rows come from


def test_without_a_source_the_readers_dataset_and_its_splits_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str, **options: Any) -> datasets.Dataset:
        asked.append((name, config, split, options))
        return datasets.Dataset.from_list([pair(split)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = PreferenceData(reader=HHRLHF("helpful-base"), tokenizer="bytes")
    data.setup("fit")
    data.setup("test")
    assert questions(data.train_dataloader(), data) == ["train"] and questions(data.val_dataloader(), data) == ["test"]
    assert {a[:3] for a in asked} == {("Anthropic/hh-rlhf", None, "train"), ("Anthropic/hh-rlhf", None, "test")}
    assert all(a[3] == {"data_dir": "helpful-base"} for a in asked)
    asked.clear()
    PreferenceData(reader=HHRLHF(), validation_fraction=0.0, validation="Anthropic/hh-rlhf", validation_split="test",
                   tokenizer="bytes").setup("validate")  # fmt: skip
    assert {a[:3] for a in asked} == {("Anthropic/hh-rlhf", None, "test")}


@pytest.mark.parametrize("cls", READERS, ids=lambda cls: cls.__name__)
def test_every_reader_loads_its_own_dataset_in_each_of_its_views(
    cls: type[Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `load_dataset` is asked for exists in its signature, and every split that a view names is asked for."""
    asked: list[dict[str, Any]] = []

    def load(name: str, config: str | None, split: str, **options: Any) -> datasets.Dataset:
        asked.append({"name": name, "split": split, **options})
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    reader = cls()
    assert reader.views(), "a reader has a view"
    for view in reader.views():
        assert "train" in reader.splits(view)
        with pytest.raises(ValueError, match="a hub dataset of this name could not be loaded"):
            list(reader.rows(reader.hub.name, "train", view, None, lambda row, reason: None))
    owner, _, name = reader.hub.name.partition("/")
    assert owner and name and {a["name"] for a in asked} == {reader.hub.name}
    assert {key for a in asked for key in a} <= {"name", "split", "data_dir", "data_files", "revision"}
    assert "Args:" in (cls.__doc__ or "") or not vars(reader)
    assert f"`{cls.__name__}`" in (package.__doc__ or "")


def test_a_copy_of_the_repository_is_read_split_by_split(tmp_path: Path) -> None:
    """As `git clone` leaves it: parts in folders, splits in names; what is named after no split is not read."""
    for part in ("harmless-base", "helpful-base"):
        for split in ("train", "test"):
            path = tmp_path / "hh" / part / f"{split}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress((json.dumps(pair(f"{part} {split}")) + "\n").encode()))
    (tmp_path / "hh" / "red-team").mkdir()
    (tmp_path / "hh" / "red-team" / "attempts.jsonl").write_text('{"transcript": "x"}\n')
    (tmp_path / "hh" / "README.md").write_text("# hh")
    train = str(tmp_path / "hh")
    data = PreferenceData(train=train, reader=HHRLHF(), validation_split="validation", tokenizer="bytes", shuffle=False)
    data.setup("fit")
    assert questions(data.train_dataloader(), data) == ["harmless-base train", "helpful-base train"]
    assert questions(data.val_dataloader(), data) == ["harmless-base test", "helpful-base test"]
    data = PreferenceData(train=train, reader=HHRLHF("helpful-base"), test_split="test", tokenizer="bytes")
    data.setup("fit")
    data.setup("test")
    assert questions(data.train_dataloader(), data) == ["helpful-base train"]
    assert questions(data.test_dataloader(), data) == ["helpful-base test"]
    with pytest.raises(ValueError, match=r"hh: there is no folder 'helpful-online' in it, and no data file"):
        PreferenceData(train=train, reader=HHRLHF("helpful-online"), tokenizer="bytes").setup("fit")
    with pytest.raises(ValueError, match=r"there is no split 'dev' in this folder; it has train, test"):
        PreferenceData(train=train, train_split="dev", reader=HHRLHF(), tokenizer="bytes").setup("fit")


def test_a_part_without_splits_is_read_alone(tmp_path: Path) -> None:
    """A copy of nvidia/HelpSteer2 has the ratings' splits beside the folder of preferences, which has none."""
    (tmp_path / "preference").mkdir()
    rows = [helpsteer2_preference(1), helpsteer2_preference(-2, "val")]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "preference" / "preference.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(json.dumps(helpsteer("p", "r", 1, 1, 1, 1, 1)).encode()))
    data = PreferenceData(
        train=str(tmp_path), validation_split="validation", reader=HelpSteer2Preference(), tokenizer="bytes"
    )
    data.setup("fit")
    ((train,), (validation,)) = data.train_dataloader(), data.val_dataloader()
    assert train["margin"].tolist() == [1, 1] and validation["margin"].tolist() == [2, 2]
    assert len(list(HelpSteer2().open(str(tmp_path), "train", None))) == 1


def test_parquet_shards_of_splits_with_names_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train_prefs", "test_prefs", "train_sft"):
        table = pa.Table.from_pylist([binarized(f"good {split}", "bad")])
        pq.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    data = PreferenceData(
        train=str(tmp_path), reader=UltraFeedbackBinarized(), validation_split="validation", tokenizer="bytes"
    )
    data.setup("fit")
    texts = [
        data.tokenizer.decode(next(iter(x)).tokens[0].tolist())
        for x in (data.train_dataloader(), data.val_dataloader())
    ]
    assert ["train_prefs" in texts[0], "test_prefs" in texts[1]] == [True, True]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "arrow", "saved", "folder", "glob"])
def test_local_files_of_every_kind(form: str, tmp_path: Path) -> None:
    rows = [gsm8k(f"q{i}", str(i)) for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / f"x.{form}"
    if form == "jsonl":
        path.write_text(lines)
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "arrow":
        table = pa.Table.from_pylist(rows)
        with open(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif form == "saved":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
    else:
        path.mkdir()
        (path / "part.jsonl").write_text(lines)
    source = str(path / "*.jsonl") if form == "glob" else str(path)
    data = PromptData(train=source, reader=GSM8K(), tokenizer="bytes")
    data.setup("fit")
    assert [row["columns"]["answer"] for row in data.prompts()] == ["0", "1", "2"]


# ------------------------------------------------------------------------------------------ what is kept and told


@pytest.fixture
def trees(write: Any) -> str:
    rows = []
    for i in range(4):
        lang = {"lang": "en" if i else "de"}
        rows += [oasst(f"q{i}", None, "Q", tree=str(i), **lang)]
        rows += [oasst(f"{a}{i}", f"q{i}", a, rank=r, tree=str(i), **lang) for r, a in enumerate("ab")]
    return write("x.jsonl", rows)


def told(data: Any) -> Iterator[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup("fit")
    return (str(w.message) for w in caught if "left rows out" in str(w.message))


def test_what_was_left_out_is_told_again_from_the_cache_and_options_are_part_of_its_key(
    trees: str, own_cache: Path
) -> None:
    def data(**options: Any) -> PreferenceData:
        return PreferenceData(train=trees, reader=OASST(**options), tokenizer="bytes")

    expected = (
        f"OASST left rows out of train\n  the message is not in en (data.reader.lang): 1 row left out ({trees}:1)"
    )
    assert [message.splitlines()[:2] for message in told(data(lang=["en"]))] == [expected.splitlines()]
    entries = sorted(own_cache.iterdir())
    assert len(list(told(data(lang=["en"])))) == 1 and sorted(own_cache.iterdir()) == entries, "not made again"
    assert list(told(data())) == [] and len(list(own_cache.iterdir())) == len(entries) + 1


def test_data_of_which_nothing_is_left_says_why(trees: str) -> None:
    with pytest.raises(
        ValueError, match=r"there is no usable row for train; the message is not in fr .*: 4 rows left out"
    ):
        PreferenceData(train=trees, reader=OASST(lang=["fr"]), tokenizer="bytes").setup("fit")


def test_a_split_by_fraction_tells_once(trees: str) -> None:
    data = PreferenceData(train=trees, reader=OASST(lang=["en"]), validation_fraction=0.5, tokenizer="bytes")
    try:
        messages = list(told(data))
    except ValueError as error:  # three trees may all fall on one side
        assert "no usable row" in str(error)
    else:
        assert len(messages) == 1


# ------------------------------------------------------------------------------------------ what is refused


def test_a_view_that_a_reader_lacks_names_the_modules_that_it_is_for() -> None:
    with pytest.raises(
        ValueError, match=r"PreferenceData trains on preferences, which Alpaca does not have; use Demons"
    ):
        PreferenceData(reader=Alpaca())
    with pytest.raises(
        ValueError, match=r"TextData takes no reader; use DemonstrationData \(demonstrations\) or Prefer"
    ):
        TextData(reader=OASST())


def test_a_split_of_a_single_file_is_refused(trees: str) -> None:
    with pytest.raises(ValueError, match=r"x\.jsonl: this is no dataset with splits, so data\.validation_split='test'"):
        PreferenceData(train=trees, validation_split="test", reader=OASST(), tokenizer="bytes").setup("fit")


# ------------------------------------------------------------------------------------------ a reader of one's own


class Proverbs(Reader):
    """As the README shows it.

    Args:
        longest: proverbs of more characters are left out.
    """

    def __init__(self, longest: int = 100) -> None:
        self.longest = longest

    @property
    def hub(self) -> Hub:
        return Hub("someone/proverbs")

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row in rows:
            first, second = self.field(row, "halves[0]", str), self.field(row, "halves[1]", str)
            if len(first + second) > self.longest:
                drop(row, f"longer than {self.longest} characters (data.reader.longest)")
            else:
                yield Row(row.where, {"prompt": first, "completion": " " + second})


def test_a_reader_of_ones_own_needs_one_method(write: Any) -> None:
    path = write("x.jsonl", [{"halves": ["a stitch in time", "saves nine"]}, {"halves": ["x" * 60, "y" * 60]}])
    data = DemonstrationData(train=path, reader=Proverbs(), tokenizer="bytes")
    assert len(list(told(data))) == 1
    (batch,) = data.train_dataloader()
    assert data.tokenizer.decode(batch.tokens[0].tolist()) == "a stitch in time saves nine"
    with pytest.raises(ValueError, match=r"y\.jsonl:1: the key 'halves\[1\]' is missing .*someone/proverbs"):
        DemonstrationData(train=write("y.jsonl", [{"halves": ["a"]}]), reader=Proverbs(), tokenizer="bytes").setup(
            "fit"
        )


# ------------------------------------------------------------------------------------------ the same as `datasets`

LAYOUTS: dict[str, list[str]] = {
    "names": ["train.jsonl", "test.jsonl"],
    "compressed": ["train.jsonl.gz", "validation.jsonl.gz"],
    "shards": [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
        "data/dev_x-00000-of-00001.parquet",
    ],
    "folders": ["train/0000.parquet", "validation/0000.parquet"],
    "prefixed": ["my_train_data.jsonl", "my_test_data.jsonl"],
    "part": ["helpful-base/train.jsonl", "helpful-base/test.jsonl", "harmless-base/train.jsonl"],
    "no splits": ["a.jsonl", "b.jsonl"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_is_split_as_datasets_splits_it(layout: str, tmp_path: Path) -> None:
    """Each file holds a row with its own name; `load_dataset` on the folder says which rows a split has."""
    (tmp_path / "copy").mkdir()
    for name in LAYOUTS[layout]:
        path, row = tmp_path / "copy" / name, pair(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist([row]), path)
        else:
            line = (json.dumps(row) + "\n").encode()
            path.write_bytes(gzip.compress(line) if name.endswith("gz") else line)
    reader = HHRLHF("helpful-base") if layout == "part" else HHRLHF()
    folder = str(tmp_path / "copy")
    options = {"data_dir": "helpful-base"} if layout == "part" else {}
    theirs = datasets.load_dataset(folder, cache_dir=str(tmp_path / "hf"), **options)
    for split in theirs:
        ours = [row.columns for row in reader.open(folder, split, None)]
        assert ours == list(theirs[split]), split
    assert reader.has_splits(folder) == (layout != "no splits")
