"""Text that does not fit on a disk: read, tokenised, mixed, packed and shuffled while training.

    data = StreamingTextData(train="s3://corpus/*.jsonl.gz", batch_size=16, sequence_length=1024, num_workers=4)
    data = StreamingTextData(sources=[TextSource("books/", weight=0.3), TextSource("allenai/c4:en", weight=0.7)])

Batches look as those of TextData. What is read is divided among `num_streams` streams, and the order of rows is a
function of the seed and of these: neither the number of ranks nor that of workers changes it. The state is a place in
every source for every stream, a few numbers each, so a run resumes with the very batches it would have had, at any
step, on any number of ranks that divides `num_streams`. See stream_sources.py (who reads what), stream_blocks.py (what
a stream is) and stream_loader.py (batches, workers, state).

Validation, test and prediction data are bounded by `eval_limit` and read once into the cache, as TextData does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import torch.distributed
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_palm.data.base import Stage, _at_least_one
from lit_palm.data.position import position
from lit_palm.data.sources import Row, TextUnit
from lit_palm.data.stream_blocks import Mixed, Plan, documents, first_state
from lit_palm.data.stream_loader import StreamLoader, check_streams, check_trainer
from lit_palm.data.stream_sources import StreamSource, TextSource, hub_identity, is_hub
from lit_palm.data.text import Document, TextData
from lit_palm.data.tokenizers import Tokenizer

__all__ = ["StreamingTextData"]


class StreamingTextData(TextData):
    """Documents for pre-training, from sources that are read as training goes on and never copied as a whole.

    Batches: `tokens`, `mask`, `loss_mask` [B, T]; packed also `documents` and `positions`, with T the sequence length.

    An epoch is `batches_per_epoch`. Without that, a stream whose sources are repeated has no end: set
    `trainer.max_steps`, and validate every so many batches (`trainer.val_check_interval` an integer,
    `trainer.check_val_every_n_epoch: null`).

    Args:
        train: the training data, if it is one source.
        sources: the training data, if it is a mixture.
        validation: validation data, a source of its own.
        test: test data, likewise.
        predict: data to predict on, likewise.
        train_split: split of a hub dataset to train on.
        validation_split: split to validate on; without `validation` it is taken from `train`.
        test_split: split to test on; without `test` it is taken from `train`.
        predict_split: split to predict on.
        eval_limit: read at most this many rows of the data that is not trained on.
        exhausted: what happens when a source was read to its end: `repeat` begins it again, in a new order; `stop`
            goes on with the others, and when all are read, the epoch is over.
        batches_per_epoch: batches of one process in an epoch, for sources that are repeated; None: no end.
        batch_size: rows in a batch of one process.
        eval_batch_size: the same for validation, test and prediction; None: as in training.
        sequence_length: length of a row in tokens.
        pack: several documents in one row, none seeing another; off: one document (or piece of one) in each row.
        text_column: the column that holds the text.
        text_unit: what is one document of a `.txt` file: a line, a paragraph, or the file.
        tokenizer: a tokenizer, or a name or path for `load_tokenizer`; None takes the network's.
        tokenizer_rows: rows of the training data, of all sources together, that an untrained tokenizer learns from.
        num_streams: streams that share the data; a multiple of the number of data-parallel ranks. Each reads about as
            many files at a time as there are sources, and gets at least one row of each.
        shuffle: a random order of files and rows; off: streams read in order.
        shuffle_buffer: rows that are shuffled together, of all streams; they are held in memory twice over. A run that
            resumes reads these again.
        num_workers: processes on each rank that read and tokenise; 0: the training process does. At most as many as
            the rank has streams.
        prefetch: batches, about, that each worker has ready.
        pin_memory: put batches where an accelerator copies them from while it computes.
        seed: chooses the orders.
        cache_dir: where validation data and a trained tokenizer are kept; None: $LIT_PALM_CACHE, else
            ~/.cache/lit_palm.

    Raises:
        ValueError: when arguments are out of range or do not fit together.
    """

    def __init__(
        self,
        train: str | None = None,
        sources: list[TextSource] | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        predict_split: str = "train",
        eval_limit: int | None = None,
        exhausted: Literal["repeat", "stop"] = "repeat",
        batches_per_epoch: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        sequence_length: int = 256,
        pack: bool = True,
        text_column: str = "text",
        text_unit: TextUnit = "line",
        tokenizer: Tokenizer | str | None = None,
        tokenizer_rows: int = 100_000,
        num_streams: int = 16,
        shuffle: bool = True,
        shuffle_buffer: int = 8192,
        num_workers: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        if train and sources:
            raise ValueError("data.train is one source, data.sources a mixture: set one of them")
        if sources and (validation_split or test_split) and not (validation and test):
            raise ValueError("data.validation_split and data.test_split are splits of data.train, not of a mixture")
        mixture = sources or ([TextSource(train, split=train_split)] if train else [])
        super().__init__(
            sequence_length, pack, text_column, text_unit, train=train or ", ".join(s.path for s in mixture) or None,
            validation=validation, test=test, predict=predict, train_split=train_split,
            validation_split=validation_split, test_split=test_split, predict_split=predict_split,
            eval_limit=eval_limit, batch_size=batch_size, eval_batch_size=eval_batch_size, tokenizer=tokenizer,
            shuffle=shuffle, seed=seed, cache_dir=cache_dir,
        )  # fmt: skip
        _at_least_one(
            num_streams=num_streams, shuffle_buffer=shuffle_buffer, batches_per_epoch=batches_per_epoch,
            tokenizer_rows=tokenizer_rows, prefetch=prefetch,
        )  # fmt: skip
        if num_workers < 0:
            raise ValueError(f"data.num_workers is {num_workers}; it must be at least 0")
        if batches_per_epoch and exhausted == "stop":
            raise ValueError("with data.exhausted=stop an epoch ends with the data: leave data.batches_per_epoch out")
        for number, source in enumerate(mixture):
            if not (source.weight > 0 and math.isfinite(source.weight)):
                raise ValueError(
                    f"data.sources[{number}].weight ({source.path}) is {source.weight}; weights must be positive: leave"
                    " out a source that is not to be read"
                )
        self.mixture = mixture
        self.exhausted, self.batches_per_epoch = exhausted, batches_per_epoch
        self.tokenizer_rows = tokenizer_rows
        self.num_streams, self.shuffle_buffer = num_streams, shuffle_buffer
        self.num_workers, self.prefetch, self.pin_memory = num_workers, prefetch, pin_memory
        self._located: list[StreamSource] = []
        self._loader: StreamLoader | None = None
        self._trained_before = 0
        self._state: dict[str, Any] = {"epoch": 0, "row": 0, "streams": {}}

    # ---- set-up

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.mixture:
            check_streams(self.num_streams, self._ranks()[1])
            if self.trainer is not None:
                ends = self.exhausted == "stop" or self.batches_per_epoch is not None
                check_trainer(self.trainer, ends)
            self._locate()
        super().setup(stage)
        if stage == "fit":
            self.check_length(self.sequence_length, "sequence_length")

    def ready(self, stage: Stage, tokenizer: Tokenizer) -> Any:
        """Nothing is tokenised beforehand but evaluation data."""
        return self._probe() if stage == "train" else super().ready(stage, tokenizer)

    def _locate(self) -> None:
        self._located = self._located or [StreamSource.look_up(s.path, s.split) for s in self.mixture]

    def _probe(self) -> Plan:
        """The plan of the run, after a look at the first row of every source."""
        plan = self._plan()
        for mixed in plan.sources:
            if next(documents(mixed, self.text_unit, plan.tokenizer.vocab_size), None) is None:
                raise ValueError(f"{mixed.source.name}: there are no rows in it")
        return plan

    def _plan(self) -> Plan:
        mixed = [
            Mixed(located, float(source.weight), source.text_column or self.text_column)
            for located, source in zip(self._located, self.mixture, strict=True)
        ]
        return Plan(
            sources=mixed,
            tokenizer=self.tokenizer,
            sequence_length=self.sequence_length,
            pack=self.pack,
            num_streams=self.num_streams,
            block_rows=-(-self.shuffle_buffer // self.num_streams),
            shuffle=self.shuffle,
            seed=self.seed,
            repeat=self.exhausted == "repeat",
            text_unit=self.text_unit,
        )

    # ---- what the tokenizer is trained on, and evaluation data of a hub dataset

    def samples(self, stage: Stage, left_out: dict[str, Any] | None = None) -> Iterator[Any]:
        if stage != "train":
            yield from super().samples(stage, left_out)
            return
        plan = self._plan()
        total = sum(mixed.weight for mixed in plan.sources)
        for mixed in plan.sources:
            found = documents(mixed, self.text_unit, plan.tokenizer.vocab_size)
            for text in islice(found, math.ceil(self.tokenizer_rows * mixed.weight / total)):
                yield Document(text, None, "") if isinstance(text, str) else Document(None, text, "")

    def _key(self, stage: Stage) -> dict[str, Any]:
        if stage != "train":
            return super()._key(stage)
        return {"kind": "stream", "rows": self.tokenizer_rows, "sources": self._identity()["sources"]}

    def read(self, source: str, split: str, limit: int | None) -> Iterator[Row]:
        if not is_hub(source):
            yield from super().read(source, split, limit)
            return
        located = StreamSource.look_up(source, split)
        parts = (located.part(shard, 0, 1, self.text_unit) for shard in range(located.num_shards))
        rows = (Row(part.where(found.number), found.columns) for part in parts for found in part.read(0))
        yield from islice(rows, limit)

    def identity(self, source: str, split: str) -> str:
        return f"{source}:{split}:{hub_identity(source)}" if is_hub(source) else super().identity(source, split)

    # ---- training

    def train_dataloader(self) -> StreamLoader:
        self._close()
        plan: Plan = self._elements["train"]
        plan.epoch = self._state["epoch"]
        rank, ranks = self._ranks()
        trainer: Any = self.trainer
        where = position(trainer) if trainer is not None else None
        self._trained_before = 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.total.processed
        streams = self._state["streams"]
        nothing = first_state(len(plan.sources), plan.epoch)
        self._loader = StreamLoader(
            plan,
            self.batch_size,
            rank,
            ranks,
            {n: streams.get(n, nothing) for n in range(self.num_streams)},
            row=self._state["row"],
            pad_id=self.tokenizer.pad_id,
            length=self._epoch_length(),
            batch=where.batch if where is not None and where.begun and not where.over else 0,
            num_workers=self.num_workers,
            prefetch=self.prefetch,
            pin_memory=self.pin_memory,
            progress=None if trainer is None else self._progress,
            any_rank=bool if ranks == 1 else self._any_rank,
        )
        return self._loader

    def _epoch_length(self) -> int | None:
        limit = getattr(self.trainer, "limit_train_batches", None)
        if self.batches_per_epoch is None and self.exhausted == "repeat" and isinstance(limit, int):
            return limit
        return self.batches_per_epoch

    def _progress(self) -> tuple[int, int]:
        """Batches of this loader that were trained on, and those of them that are in the weights."""
        trainer: Any = self.trainer
        progress, where = trainer.fit_loop.epoch_loop.batch_progress, position(trainer)
        trained = progress.total.processed - self._trained_before
        waiting = progress.current.processed - where.batch if where is not None and where.begun else 0
        return trained, trained - waiting

    def _any_rank(self, here: bool) -> bool:
        trainer: Any = self.trainer
        return bool(trainer.strategy.reduce_boolean_decision(here, all=False))

    def shares(self) -> dict[str, tuple[int, float]]:
        """For each source: how often it was read to its end, and its share of the tokens, by the streams of this
        rank."""
        names = [source.name or source.path for source in self.mixture]
        cursors = [] if self._loader is None else self._loader.cursors()
        tokens = [sum(stream[i][3] for stream in cursors) for i in range(len(names))]
        epochs = [min((stream[i][0] for stream in cursors), default=0) for i in range(len(names))]
        return {n: (e, t / max(sum(tokens), 1)) for n, e, t in zip(names, epochs, tokens, strict=True)}

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            self._close()

    def _close(self) -> None:
        if self._loader is not None:
            self._state = self._loader.state()
            self._loader.close()
            self._loader = None

    # ---- state

    def _identity(self) -> dict[str, Any]:
        """What the batches depend on, but for the position."""
        return {
            "seed": self.seed,
            "sources": [
                {"data": found.identity, "weight": float(s.weight), "text_column": s.text_column or self.text_column}
                for found, s in zip(self._located, self.mixture, strict=False)
            ],
            "num_streams": self.num_streams,
            "shuffle": self.shuffle,
            "shuffle_buffer": self.shuffle_buffer,
            "exhausted": self.exhausted,
            "sequence_length": self.sequence_length,
            "pack": self.pack,
            "text_unit": self.text_unit,
            "tokenizer": self.tokenizer.fingerprint() if getattr(self.tokenizer, "trained", False) else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """The position of every stream, and what it depends on; every rank must ask for it."""
        own = self._state if self._loader is None else self._loader.state()
        streams = dict(own["streams"])
        if self._ranks()[1] > 1 and torch.distributed.is_initialized():
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, streams)
            streams = {n: state for part in everyone for n, state in part.items()}
        return {**own, "streams": dict(sorted(streams.items())), "identity": self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a position.

        Raises:
            ValueError: it is a position in other data, or in data that is read in another way; names the argument.
        """
        # only a run that trains has looked its data up
        begun = (state_dict["row"] or state_dict["epoch"]) and len(self._located) == len(self.mixture)
        for key, now in self._identity().items():
            then = state_dict["identity"].get(key)
            if begun and then != now:
                what = "is another one" if key in ("sources", "tokenizer") else f"is {now!r}, and was {then!r}"
                raise ValueError(
                    f"data.{key} {what} when the checkpoint was saved: its position in the data would mean nothing now."
                    f" Resume with the former data.{key}, or begin a new run from these weights (model.network)"
                )
        self._close()
        self._state = {key: state_dict[key] for key in ("epoch", "row", "streams")}
        rank_zero_info(f"the training data goes on at row {self._state['row']}")
