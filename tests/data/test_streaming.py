"""Streams: the same rows for any number of ranks and workers, from any batch on; every document once; mixtures."""

from __future__ import annotations

import os
import signal
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_palm.data import ByteTokenizer, TextSource
from lit_palm.data.stream_sources import deal
from lit_palm.data.stream_workers import used_rows
from tests.data.stream_files import Row, rows_of, shards, stream, texts

TOKENIZER = ByteTokenizer()
Batches = list[list[Row]]


def global_batches(
    count: int, ranks: int = 1, workers: int = 0, state: dict[str, Any] | None = None, **options: Any
) -> tuple[Batches, dict[str, Any]]:
    """The first `count` global batches, rows in the order of the run, and the state that follows."""
    datas = [stream(rank, ranks, num_workers=workers, **options) for rank in range(ranks)]
    for data in datas:
        if state is not None:
            data.load_state_dict(state)
    iterators = [iter(data.train_dataloader()) for data in datas]
    batches = []
    for _ in range(count):
        parts = [rows_of(next(iterator)) for iterator in iterators]
        batches.append([row for together in zip(*parts, strict=True) for row in together])
    states = [data.state_dict() for data in datas]
    for data in datas:
        data.teardown("fit")
    return batches, {**states[0], "streams": {n: s for state in states for n, s in state["streams"].items()}}


def documents(batches: Any) -> Counter[str]:
    """The documents in batches, whole ones only."""
    found: Counter[str] = Counter()
    for batch in batches:
        for tokens, numbers in zip(batch.tokens, batch.documents, strict=True):
            for number in range(int(numbers.max()) + 1):
                ids = tokens[numbers == number].tolist()
                if ids[0] == TOKENIZER.bos_id and ids[-1] == TOKENIZER.eos_id:
                    found[TOKENIZER.decode(ids)] += 1
    return found


@pytest.fixture
def mixture(tmp_path: Path) -> dict[str, Any]:
    """Three sources of different sizes and formats; some documents are longer than a row."""
    return {
        "sources": [
            TextSource(shards(tmp_path, "a", 60, files=5), weight=0.6),
            TextSource(shards(tmp_path, "b", 30, files=2, suffix=".parquet"), weight=0.3),
            TextSource(shards(tmp_path, "c", 9, suffix=".txt"), weight=0.1),
        ]
    }


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_ranks_and_workers_change_nothing(mixture: dict[str, Any]) -> None:
    expected, _ = global_batches(12, **mixture)
    assert len({row for batch in expected for row in batch}) > 60
    for ranks, workers in [(2, 0), (4, 0), (1, 1), (1, 2), (2, 3), (4, 2)]:
        assert global_batches(12, ranks, workers, **mixture)[0] == expected, (ranks, workers)


@pytest.mark.parametrize("pack", [True, False])
def test_a_resume_at_any_batch_goes_on_exactly(pack: bool, mixture: dict[str, Any]) -> None:
    expected, _ = global_batches(16, pack=pack, **mixture)
    for done in range(16):
        first, state = global_batches(done, 2, pack=pack, **mixture)
        rest, _ = global_batches(16 - done, 1, pack=pack, state=state, **mixture)
        assert first + rest == expected, done


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_resume_with_workers_on_other_ranks_goes_on_exactly(mixture: dict[str, Any]) -> None:
    expected, _ = global_batches(14, **mixture)
    first, state = global_batches(5, 2, 2, **mixture)
    then, state = global_batches(4, 4, 1, state=state, **mixture)
    rest, _ = global_batches(5, 1, 3, state=state, **mixture)
    assert first + then + rest == expected


def test_the_state_is_small_and_plain(mixture: dict[str, Any], tmp_path: Path) -> None:
    _, state = global_batches(5, workers=2, **mixture)
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state
    assert (tmp_path / "state.pt").stat().st_size < 4000


@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from([4, 12, 20]),
    streams=st.sampled_from([1, 2, 4]),
    buffer=st.sampled_from([1, 7, 40]),
    shuffle=st.booleans(),
    seed=st.integers(0, 3),
    done=st.integers(0, 9),
)
def test_any_settings_resume_exactly(
    tmp_path_factory: pytest.TempPathFactory, batch: int, streams: int, buffer: int, shuffle: bool, seed: int, done: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    options: dict[str, Any] = {
        "train": shards(folder, "x", 31, files=3),
        "num_streams": streams, "shuffle_buffer": buffer, "shuffle": shuffle, "seed": seed,
    }  # fmt: skip
    expected, _ = global_batches(10, batch_size=batch, **options)
    first, state = global_batches(done, streams, batch_size=batch // streams, **options)
    rest, _ = global_batches(10 - done, 1, batch_size=batch, state=state, **options)
    assert first + rest == expected


# ---- what is read


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".txt", ".csv"])
@pytest.mark.parametrize("files", [1, 4, 7])
def test_every_document_is_read_once_in_a_pass(suffix: str, files: int, tmp_path: Path) -> None:
    source = shards(tmp_path, "d", 45, files, suffix)
    options: dict[str, Any] = {"train": source, "exhausted": "stop", "sequence_length": 64, "shuffle_buffer": 8}
    passes = []
    for ranks in (1, 4):
        loaders = [stream(rank, ranks, **options).train_dataloader() for rank in range(ranks)]
        for loader in loaders:  # what a collective would say: the batches of all ranks end together
            loader.any_rank = lambda here: here
        batches = [list(loader) for loader in loaders]
        assert documents(batch for part in batches for batch in part) == Counter(texts("d", 45))
        passes.append(batches)
    loader = stream(**options).train_dataloader()
    first, second = list(loader), list(loader)
    assert documents(second) == documents(first) and [rows_of(b) for b in second] != [rows_of(b) for b in first]


def test_large_files_are_cut_at_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_palm.data.stream_parts.CUT_BY_BYTES", 200)
    source = shards(tmp_path, "d", 90, files=3)
    loader = stream(train=source, exhausted="stop", sequence_length=64, num_streams=8).train_dataloader()
    assert documents(loader) == Counter(texts("d", 90))
    expected, _ = global_batches(12, train=source)
    first, state = global_batches(5, 2, train=source)
    assert first + global_batches(7, 4, state=state, train=source)[0] == expected


def test_one_pass_ends_on_all_ranks_together(tmp_path: Path) -> None:
    source = shards(tmp_path, "d", 37, files=2)
    options: dict[str, Any] = {"train": source, "exhausted": "stop", "sequence_length": 64, "batch_size": 3}
    loaders = [stream(rank, 2, **options).train_dataloader() for rank in range(2)]
    # each rank knows its own; the other's answer is that there is more until both have nothing
    for loader in loaders:
        loader.any_rank = lambda here: True
    taken = [list(islice(loader, 8)) for loader in loaders]
    assert [len(part) for part in taken] == [8, 8]
    assert documents(batch for part in taken for batch in part if batch.loss_mask.any()) == Counter(texts("d", 37))
    assert not taken[0][-1].loss_mask.any() and taken[0][-1].mask.any()  # a row without weight


def test_a_hub_dataset_is_streamed_by_its_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the loading code of the hub, on a folder: a name with a configuration is no path
    shards(tmp_path, "corpus", 40, files=3, suffix=".parquet")
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"train": "corpus:default", "sequence_length": 64}
    loader = stream(exhausted="stop", **options).train_dataloader()
    assert documents(loader) == Counter(texts("corpus", 40))
    expected, _ = global_batches(10, **options)
    first, state = global_batches(4, 2, 2, **options)
    assert first + global_batches(6, state=state, **options)[0] == expected
    data = stream(validation_split="train", eval_limit=7, **options)
    assert documents(data.val_dataloader()).total() == 7
    with pytest.raises(ValueError, match="split 'nothing' of this hub dataset"):
        stream(train_split="nothing", **options)


def test_files_are_dealt_out_evenly_and_once() -> None:
    for shards_, streams in [(1, 4), (3, 4), (4, 4), (9, 8), (10, 4), (12, 8), (5, 1)]:
        dealt = [deal(shards_, streams, stream, seed=3) for stream in range(streams)]
        assert len({len(parts) for parts in dealt}) == 1
        share = Counter(dict.fromkeys(range(shards_), 0.0))
        units = [unit for parts in dealt for unit in parts]
        assert len(units) == len(set(units))
        for shard, _, parts in units:
            share[shard] += 1 / parts
        assert all(abs(total - 1) < 1e-9 for total in share.values())
    # nothing is read by two where there are enough files
    assert all(parts == 1 for s in range(4) for _, _, parts in deal(8, 4, s, None))


def test_rows_are_counted_by_stream() -> None:
    for streams in (1, 3, 4):
        for row in range(20):
            assert [used_rows(row, s, streams) for s in range(streams)] == [
                len([n for n in range(row) if n % streams == s]) for s in range(streams)
            ]


# ---- the mixture


def test_shares_of_tokens_follow_the_weights(tmp_path: Path) -> None:
    # documents of `long` have five times the tokens
    long = tmp_path / "long.txt"
    long.write_text("".join(f"L{i} " + "y" * 100 + "\n" for i in range(300)))
    short = tmp_path / "short.txt"
    short.write_text("".join(f"S{i} " + "x" * 17 + "\n" for i in range(50)))
    sources = [TextSource(str(long), 3.0, name="long"), TextSource(str(short), 1.0, name="short")]
    data = stream(sources=sources, sequence_length=128)
    batches = list(islice(data.train_dataloader(), 60))
    of_long = sum(int(((b.tokens == ord("L")) | (b.tokens == ord("y"))).sum()) for b in batches)
    of_short = sum(int(((b.tokens == ord("S")) | (b.tokens == ord("x"))).sum()) for b in batches)
    assert of_long / (of_long + of_short) == pytest.approx(0.75, abs=0.03)
    shares = data.shares()
    assert shares["long"][1] == pytest.approx(0.75, abs=0.03)
    assert shares["short"][0] >= 5 > shares["long"][0]  # repeated, and counted


def test_shuffling_mixes_and_seeds_differ(tmp_path: Path) -> None:
    source = shards(tmp_path, "a", 200, files=4)
    plain, _ = global_batches(6, train=source, shuffle=False)
    one, _ = global_batches(6, train=source, shuffle_buffer=400)
    other, _ = global_batches(6, train=source, shuffle_buffer=400, seed=1)
    assert plain != one != other
    again, _ = global_batches(6, train=source, shuffle_buffer=400)
    assert again == one


# ---- faults


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_line_in_the_middle_is_named(workers: int, tmp_path: Path) -> None:
    source = shards(tmp_path, "a", 40)
    path = Path(source) / "000.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    for bad, message in [("{nothing\n", "this line is not JSON"), ('{"txt": "x"}\n', "column 'text' is missing")]:
        path.write_text("".join([*lines[:20], bad, *lines[20:]]))
        for streams in (1, 4):
            loader = stream(train=source, num_streams=streams, num_workers=workers).train_dataloader()
            with pytest.raises(ValueError, match=rf"^{path}:21: .*{message}"):
                list(islice(loader, 50))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    loader = stream(train=shards(tmp_path, "a", 40), num_workers=1).train_dataloader()
    iterator = iter(loader)
    next(iterator)
    (worker,) = loader._messages._workers  # type: ignore[attr-defined]
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="a worker process that reads the training data died"):
        list(islice(iterator, 100))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"num_streams": 4, "ranks": 3},
            r"num_streams is 4, which 3 .* \(such as 3 or 6\), or go on with 1, 2, 4 ranks",
        ),
        ({"sources": "zero"}, r"data.sources\[1\].weight .* is 0.0; weights must be positive"),
        ({"train": "nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
        ({"train": "empty"}, "there are no rows in it"),
        ({"text_column": "body"}, "column 'body' is missing"),
        ({"num_streams": 64}, "fewer than data.num_streams 64; lower that"),
        ({"batches_per_epoch": 3, "exhausted": "stop"}, "leave data.batches_per_epoch out"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"shuffle_buffer": 0}, "data.shuffle_buffer is 0"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = shards(tmp_path, "a", 40)
    if options.get("sources"):
        options = {"sources": [TextSource(source), TextSource(source, 0.0)]}
    elif options.get("train") == "empty":
        (tmp_path / "empty.jsonl").write_text("\n")
        options = {"train": str(tmp_path / "empty.jsonl")}
    else:
        options = {"train": source, **options}
    with pytest.raises(ValueError, match=message):
        next(iter(stream(**options).train_dataloader()))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 5}, "data.seed is 5, and was 0"),
        ({"num_streams": 2}, "data.num_streams is 2, and was 4"),
        ({"sequence_length": 32}, "data.sequence_length is 32, and was 24"),
        ({"shuffle_buffer": 48}, "data.shuffle_buffer is 48"),
        ({"train": "b"}, "data.sources is another one"),
        ({"tokenizer": "other"}, "data.tokenizer is another one"),
    ],
)
def test_a_resume_in_other_data_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = shards(tmp_path, "a", 40)
    _, state = global_batches(3, train=source)
    if "train" in change:
        change = {"train": shards(tmp_path, "b", 41)}
    if "tokenizer" in change:
        from lit_palm.data import BPETokenizer

        change = {"tokenizer": BPETokenizer(270)}
    with pytest.raises(ValueError, match=message):
        stream(**{"train": source, **change}).load_state_dict(state)


def test_an_untrained_tokenizer_learns_from_the_first_rows(tmp_path: Path, own_cache: Path) -> None:
    from lit_palm.data import BPETokenizer

    source = shards(tmp_path, "a", 60, files=2)
    data = stream(train=source, tokenizer=BPETokenizer(300), tokenizer_rows=20)
    again = stream(train=source, tokenizer=BPETokenizer(300), tokenizer_rows=20)
    assert data.tokenizer.trained and data.tokenizer.fingerprint() == again.tokenizer.fingerprint()
    other = stream(train=source, tokenizer=BPETokenizer(300), tokenizer_rows=2)
    assert other.tokenizer.fingerprint() != data.tokenizer.fingerprint()
    assert len(list(own_cache.iterdir())) == 2  # nothing but the two tokenizers
