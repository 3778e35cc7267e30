"""What the data modules share: sources, the tokenizer, the split by prompt, the cache, the loaders, the position.

A subclass says how rows become samples (`parse`), what in them is text (`texts`), how they are tokenised (`write`) and
what batches are made from (`elements`). The life of a run, with Lightning's hooks in order:

    prepare_data   on one process of each machine: train the tokenizer if need be, tokenise, fill the cache
    setup          on every process: the tokenizer, the columns from the cache, checks against the network
    *_dataloader   a CountedLoader each, resumed where a checkpoint says
    state_dict     {"epoch", "batch"}: with the seed this is the whole position in the data

Constructors read nothing. Without a Trainer: `data.setup("fit")`, then `data.train_dataloader()`.

Of the LightningModule it reads, where they exist: `tokenizer` or `load_tokenizer()` (the tokenizer its network was
trained with), `vocab_size` and `context_length` (what its network can take).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_palm.data.cache import Columns, ColumnWriter, cached
from lit_palm.data.faults import counted, leaver
from lit_palm.data.limits import LimitedData
from lit_palm.data.position import position
from lit_palm.data.readers.base import Reader, View, check_view
from lit_palm.data.sampler import CountedLoader
from lit_palm.data.sources import Row, has_splits, read_rows, source_fingerprint
from lit_palm.data.tokenizers import BPETokenizer, Tokenizer, choose_tokenizer, tokenizer_from_dict
from lit_palm.folders import cache_folder

__all__ = ["Stage", "TokenizedData"]

Stage = Literal["train", "validation", "test", "predict"]
_STAGES: dict[str, tuple[Stage, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class TokenizedData(LimitedData, ABC):
    """Base class of the data modules.

    Args:
        train: training data: a file (jsonl, json, csv, tsv, parquet, txt, arrow), a folder, a glob, an fsspec URL, or a
            hub dataset (`name` or `name:config`); None: where the reader's dataset is, if there is a reader.
        validation: validation data, likewise.
        test: test data, likewise.
        predict: data to predict on, likewise.
        train_split: split of a hub dataset to train on.
        validation_split: split to validate on; without `validation` it is taken from the training source.
        test_split: split to test on; without `test` it is taken from the training source.
        predict_split: split to predict on.
        validation_fraction: share of the training data to validate on instead, chosen by a hash of the prompt (so all
            answers to one prompt stay on one side, and the same ones on every run).
        limit: read at most this many rows of the training data.
        eval_limit: read at most this many rows of the other data.
        batch_size: elements in a batch of one process.
        eval_batch_size: the same for validation, test and prediction; None: as in training.
        tokenizer: a tokenizer, or a name or path for `load_tokenizer`; None takes the network's.
        shuffle: a new order of the training data each epoch.
        length_window: training batches whose elements are sorted by length together, so that a batch holds rows of
            similar length and little padding; 1 leaves the plain shuffle. Packed rows are all of one length.
        seed: chooses the orders.
        cache_dir: where tokenised data is kept; None: $LIT_PALM_CACHE, else ~/.cache/lit_palm.
        reader: makes the columns that this data module takes from the rows of a published dataset, such as OASST or
            HHRLHF; all sources are then read by it. It knows the dataset's name on the hub and its splits.

    Raises:
        ValueError: when arguments are out of range or do not fit together.
    """

    view: ClassVar[View | None] = None
    """What it asks a reader for; None: it takes none."""

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        predict_split: str = "train",
        validation_fraction: float = 0.0,
        limit: int | None = None,
        eval_limit: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        tokenizer: Tokenizer | str | None = None,
        shuffle: bool = True,
        length_window: int = 1,
        seed: int = 0,
        cache_dir: str | None = None,
        reader: Reader | None = None,
    ) -> None:
        super().__init__()
        if reader is not None:
            check_view(reader, self.view, type(self).__name__)
            if train is None:
                train, splits = reader.hub.name, reader.splits(self.view)  # type: ignore[arg-type]
                if not (validation or validation_fraction):
                    validation_split = validation_split or ("validation" if "validation" in splits else None)
                test_split = test_split or ("test" if "test" in splits else None)
        if not 0.0 <= validation_fraction < 1.0:
            raise ValueError(f"data.validation_fraction is {validation_fraction}; it must be in [0, 1)")
        if validation_fraction and (validation or validation_split):
            raise ValueError("data.validation_fraction splits the training data: leave it out, or data.validation")
        _at_least_one(batch_size=batch_size, eval_batch_size=eval_batch_size, limit=limit, eval_limit=eval_limit)
        shared = train if validation_split or validation_fraction else None
        self.sources: dict[Stage, tuple[str | None, str]] = {
            "train": (train, train_split),
            "validation": (validation or shared, validation_split or train_split),
            "test": (test or (train if test_split else None), test_split or train_split),
            "predict": (predict, predict_split),
        }
        self.validation_fraction = validation_fraction
        self.limit, self.eval_limit = limit, eval_limit
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.tokenizer: Any = tokenizer
        """The tokenizer: as given until `setup`, a ready `Tokenizer` afterwards."""
        self.fingerprint: str | None = None
        """Tells the training data and their order from others, after `setup`."""
        self.shuffle = shuffle
        self.length_window = length_window
        self.seed = seed
        self.cache_dir = cache_dir
        self.reader = reader
        self._given_tokenizer = tokenizer
        self.rows_read: dict[Stage, int] = {}
        """Rows of the source that `samples` has read, for each stage."""
        self._elements: dict[Stage, Any] = {}
        self._position: dict[str, int] = {"epoch": 0, "batch": 0}

    # ---- what a subclass says

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """The arguments that tokenised data depends on, as JSON values."""

    @abstractmethod
    def parse(self, rows: Iterator[Row]) -> Iterator[tuple[str, Any]]:
        """Turn rows into (prompt, sample); the prompt decides the side of `validation_fraction`."""

    @abstractmethod
    def texts(self, sample: Any) -> Iterable[str]:
        """The texts in a sample, for training a tokenizer."""

    @abstractmethod
    def write(self, samples: list[Any], tokenizer: Tokenizer, writer: ColumnWriter) -> None:
        """Tokenise samples and append them to the columns."""

    @abstractmethod
    def elements(self, columns: Columns, tokenizer: Tokenizer) -> Any:
        """What batches are made from; it has a length (elements) and `collate(elements, blank)`."""

    def read(self, source: str, split: str, limit: int | None) -> Iterator[Row]:
        """The rows of a source."""
        return read_rows(source, split, limit=limit)

    def identity(self, source: str, split: str) -> str:
        """Changes when the data of a source may have changed."""
        if self.reader is not None and self.view is not None:
            return self.reader.identity(source, split, self.view)
        return source_fingerprint(source, split)

    # ---- Lightning's hooks

    def prepare_data(self) -> None:
        state = self.trainer.state.fn if self.trainer is not None else None
        self.setup("fit" if state is None else state.value)

    def setup(self, stage: str) -> None:
        """Make ready for `fit`, `validate`, `test` or `predict`.

        Raises:
            ValueError: for every fault of data, tokenizer or arguments, naming file and line or the key.
        """
        tokenizer = self.find_tokenizer()
        needed = _STAGES[stage]
        for name in needed:
            if self.sources[name][0] is None and name == needed[0]:
                raise ValueError(f"data.{name} is not set: name a file, folder, glob, URL or hub dataset")
            if self.sources[name][0] is not None and name not in self._elements:
                self._elements[name] = self.ready(name, tokenizer)

    def find_tokenizer(self) -> Tokenizer:
        """The tokenizer that rows are written with, trained and checked against the network."""
        tokenizer = self._ready_tokenizer()
        if isinstance(self.tokenizer, Tokenizer) and self.tokenizer is not tokenizer:
            self._elements.clear()  # used with another network before
        self.tokenizer = tokenizer
        self._check_network()
        return tokenizer

    def ready(self, stage: Stage, tokenizer: Tokenizer) -> Any:
        """What the loader of a stage is made from: tokenised, or found in the cache."""
        columns = self._tokenised(stage, tokenizer)
        left_out = counted(columns.meta.get("left_out", {}))
        if left_out and not (stage == "validation" and self._from_train(stage)):  # the same rows, told already
            rank_zero_warn("\n  ".join([f"{type(self.reader).__name__} left rows out of {stage}", *left_out]))
        elements = self.elements(columns, tokenizer)
        if stage == "train":
            order = [len(elements), self.shuffle, self.length_window, self.seed]
            self.fingerprint = f"{columns.fingerprint()[:32]}-{'-'.join(map(str, order))}"
        return elements

    def train_dataloader(self) -> Any:
        shuffle = self.shuffle and not getattr(self.trainer, "overfit_batches", 0)
        window = {"lengths": self._elements["train"].element_lengths, "length_window": self.length_window}
        return self.loader("train", self.batch_size, shuffle=shuffle, **window, **self._position)

    def val_dataloader(self) -> Any:
        return self.loader("validation", self.eval_batch_size) if "validation" in self._elements else []

    def test_dataloader(self) -> Any:
        return self.loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> Any:
        return self.loader("predict", self.eval_batch_size)

    def loader(self, stage: Stage, batch_size: int, **options: Any) -> CountedLoader:
        """A loader over the elements of a stage that `setup` made ready; options are those of `CountedLoader`."""
        elements = self._elements[stage]
        return CountedLoader(len(elements), batch_size, elements.collate, seed=self.seed, ranks=self._ranks, **options)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training data: the epoch, and the batches of it that were trained on."""
        where = position(self.trainer) if self.trainer is not None else None
        if where is not None:
            self._position = {"epoch": where.epoch, "batch": where.batch}
        size = len(self._elements["train"]) if "train" in self._elements else 0
        return {**self._position, "elements": size, "batch_size": self.batch_size * self._ranks()[1]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        now = self.state_dict()
        self._position = {"epoch": int(state_dict["epoch"]), "batch": int(state_dict["batch"])}
        for name in ("elements", "batch_size"):
            if self._position["batch"] and now[name] and state_dict[name] != now[name]:
                rank_zero_warn(
                    f"the checkpoint was saved in the middle of an epoch with {state_dict[name]} {name} (over all"
                    f" processes), now there are {now[name]}: this epoch will miss or repeat some of the data"
                )

    # ---- from source to columns

    def _source(self, stage: Stage) -> tuple[str, str, int | None]:
        source, split = self.sources[stage]
        assert source is not None
        if stage != "train" and (source, split) != self.sources["train"] and source == self.sources["train"][0]:
            if not (has_splits(source) if self.reader is None else self.reader.has_splits(source)):
                raise ValueError(
                    f"{source}: this is no dataset with splits, so data.{stage}_split={split!r} names nothing; set"
                    f" data.{stage} to a file of its own, or data.validation_fraction"
                )
        return source, split, self.limit if stage == "train" or self._from_train(stage) else self.eval_limit

    def _from_train(self, stage: Stage) -> bool:
        return self.validation_fraction > 0 and stage in ("train", "validation")

    def samples(self, stage: Stage, left_out: dict[str, Any] | None = None) -> Iterator[Any]:
        """The samples of a stage; what the reader leaves out is counted in `left_out`, rows in `rows_read`."""
        tally: dict[str, Any] = {} if left_out is None else left_out
        source, split, limit = self._source(stage)
        if self.reader is not None and self.view is not None:
            drop = leaver(tally)
            rows = self.reader.rows(source, split, self.view, limit, drop, partial(self._counted, stage))
        else:
            rows = self._counted(stage, self.read(source, split, limit))
        found = False
        for prompt, sample in self.parse(rows):
            held_out = self._from_train(stage) and _unit_hash(prompt) < self.validation_fraction
            if not self._from_train(stage) or held_out == (stage == "validation"):
                found = True
                yield sample
        if not found:
            why = f" (data.validation_fraction is {self.validation_fraction})" if self._from_train(stage) else ""
            reasons = "".join(f"; {line}" for line in counted(tally))
            raise ValueError(f"{source}: there is no usable row for {stage}{why}{reasons}")

    def _counted(self, stage: Stage, rows: Iterator[Row]) -> Iterator[Row]:
        for number, row in enumerate(rows, 1):
            self.rows_read[stage] = number
            yield row

    def _key(self, stage: Stage) -> dict[str, Any]:
        source, split, limit = self._source(stage)
        return {
            "kind": type(self).__qualname__,
            "source": self.identity(source, split),
            "side": [stage, self.validation_fraction] if self._from_train(stage) else None,
            "limit": limit,
            "arguments": self.arguments(),
        }

    def _tokenised(self, stage: Stage, tokenizer: Tokenizer) -> Columns:
        def build(writer: ColumnWriter) -> None:
            samples = self.samples(stage, writer.meta.setdefault("left_out", {}))
            while chunk := list(islice(samples, 1000)):
                self.write(chunk, tokenizer, writer)

        key = {**self._key(stage), "tokenizer": tokenizer.fingerprint(), "template": tokenizer.chat_template}
        return cached(cache_folder(self.cache_dir), key, build, f"{stage} data ({self.sources[stage][0]})")

    def _ready_tokenizer(self) -> Tokenizer:
        module = self._module
        brought = getattr(module, "tokenizer", None)
        if brought is None and hasattr(module, "load_tokenizer"):
            brought = module.load_tokenizer()
        given = self._given_tokenizer
        if isinstance(self.tokenizer, Tokenizer) and self.tokenizer.trained and (given is not None or brought is None):
            given = self.tokenizer  # loaded or trained by an earlier setup
        chosen = choose_tokenizer(given, brought)
        if chosen.trained:
            return self.tokenizer if chosen.same_as(self.tokenizer) else chosen
        return self._trained(chosen)

    def _trained(self, tokenizer: Tokenizer) -> Tokenizer:
        """An untrained tokenizer, trained on the training texts or found in the cache."""
        assert isinstance(tokenizer, BPETokenizer)
        if self.sources["train"][0] is None:
            raise ValueError("data.tokenizer is not trained, and without data.train it cannot be; load a trained one")

        def build(writer: ColumnWriter) -> None:
            tokenizer.train(text for sample in self.samples("train") for text in self.texts(sample))
            writer.append_record(tokenizer.to_dict())

        key = {**self._key("train"), "bpe": tokenizer.vocab_size}
        entry = cached(cache_folder(self.cache_dir), key, build, f"tokenizer ({self.sources['train'][0]})")
        return tokenizer_from_dict({**entry.records[0], "chat_template": tokenizer.chat_template})


def _at_least_one(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"data.{name} is {value}; it must be at least 1")


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:8], "big") / 2**64
