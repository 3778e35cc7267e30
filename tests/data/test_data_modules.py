"""What all data modules share, seen through Lightning: caching, resuming, shares of processes, faults."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonargparse
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import lit_palm.data
from lit_palm.data import DemonstrationData, PreferenceData, PromptData, TextData, TokenizedData
from lit_palm.data.tokenizers import BPETokenizer, ByteTokenizer
from lit_palm.modules.resume import settle

TEXTS = [f"film {i} is " + "good " * (i % 5) for i in range(23)]
ALL = [TextData, DemonstrationData, PreferenceData, PromptData]


class Recorder(LightningModule):
    """Learns nothing, remembers the batches it was trained and validated on."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[int]]] = []
        self.validated = 0
        self.stop_at = stop_at

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if len(self.seen) == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append([t[m].tolist() for t, m in zip(batch.tokens, batch.mask, strict=True)])
        return self.weight * 0

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated += batch.num_rows

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        settle(self.trainer, checkpoint)  # as lit_palm's own modules do

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters())


def text_data(path: str, **options: Any) -> TextData:
    return TextData(train=path, sequence_length=40, pack=False, **{"batch_size": 4, "tokenizer": "bytes", **options})


def fit(path: str, folder: Path, ckpt: str | None = None, stop_at: int | None = None, **options: Any) -> Recorder:
    checkpoint = ModelCheckpoint(
        folder, filename="{step}", save_top_k=-1, every_n_train_steps=options.pop("save_every", None), save_last=False
    )
    trainer = Trainer(
        callbacks=[checkpoint], logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        num_sanity_val_steps=0, default_root_dir=str(folder), **options,
    )  # fmt: skip
    module = Recorder(stop_at)
    if stop_at is not None:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(module, text_data(path, validation_fraction=0.2))
        trainer.save_checkpoint(folder / "stopped.ckpt")
    else:
        trainer.fit(module, text_data(path, validation_fraction=0.2), ckpt_path=ckpt)
    return module


@pytest.fixture
def path(write: Any) -> str:
    return write("x.jsonl", [{"text": t} for t in TEXTS])


LIMITS = [{"max_epochs": 3}, {"max_steps": 13, "max_epochs": -1}]


@pytest.mark.parametrize("limit", LIMITS, ids=["epochs", "steps"])
def test_resuming_at_any_step_gives_the_batches_of_an_uninterrupted_run(
    path: str, tmp_path: Path, limit: dict[str, int]
) -> None:
    whole = fit(path, tmp_path / "whole", save_every=1, **limit)
    first, second = (sorted(itertools.chain(*whole.seen[i : i + 5])) for i in (0, 5))
    assert first == second and whole.seen[:5] != whole.seen[5:10]  # the same rows in another order
    assert whole.validated > 0
    for step in range(1, len(whole.seen)):
        resumed = fit(path, tmp_path / f"resumed{step}", str(tmp_path / "whole" / f"step={step}.ckpt"), **limit)
        assert resumed.seen == whole.seen[step:], step


@pytest.mark.parametrize("limit", LIMITS, ids=["epochs", "steps"])
def test_resuming_from_the_end_of_an_epoch(path: str, tmp_path: Path, limit: dict[str, int]) -> None:
    whole = fit(path, tmp_path / "whole", **limit)
    steps = [int(saved.stem.split("=")[1]) for saved in (tmp_path / "whole").glob("*.ckpt")]
    assert {5, 10} <= set(steps)
    for step in steps:
        resumed = fit(path, tmp_path / f"resumed{step}", str(tmp_path / "whole" / f"step={step}.ckpt"), **limit)
        assert resumed.seen == whole.seen[step:], step


def test_a_batch_that_an_interruption_lost_is_served_again(path: str, tmp_path: Path) -> None:
    whole = fit(path, tmp_path / "whole", max_epochs=2)
    fit(path, tmp_path / "stopped", stop_at=7, max_epochs=2)
    resumed = fit(path, tmp_path / "resumed", str(tmp_path / "stopped" / "stopped.ckpt"), max_epochs=2)
    assert resumed.seen == whole.seen[7:]


def test_the_position_loads_safely_and_a_changed_dataset_is_told(path: str, tmp_path: Path, write: Any) -> None:
    fit(path, tmp_path, save_every=2, max_steps=2)
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["TextData"]
    assert (state["epoch"], state["batch"]) == (0, 2)
    other = text_data(write("y.jsonl", [{"text": t} for t in TEXTS[:9]]))
    other.setup("fit")
    with pytest.warns(UserWarning, match="elements .* now there are 9"):
        other.load_state_dict(state)


def test_processes_share_the_batches_of_one(path: str) -> None:
    def batches(rank: int, world: int, batch_size: int) -> list[list[list[int]]]:
        data = text_data(path, batch_size=batch_size)
        data.setup("fit")
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            distributed_sampler_kwargs={"rank": rank, "num_replicas": world}
        )
        return [
            [b.tokens[i][b.mask[i]].tolist() for i in range(b.num_rows) if b.loss_mask[i].any()]
            for b in data.train_dataloader()
        ]

    one, first, second = batches(0, 1, 6), batches(0, 2, 3), batches(1, 2, 3)
    assert len(first) == len(second) == len(one)
    assert [a + b for a, b in zip(first, second, strict=True)] == one


@pytest.mark.parametrize("kind", ALL)
def test_the_second_start_does_not_tokenise_again(
    kind: type[TokenizedData], write: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"text": "a b", "prompt": "a", "chosen": "b", "rejected": "c", "completion": "d"}
    path = write("x.jsonl", [row] * 5)
    counts = {"encode": 0, "train": 0}
    encode, train = BPETokenizer.encode_batch, BPETokenizer.train

    def counted_encode(self: BPETokenizer, texts: Any) -> Any:
        counts["encode"] += len(texts)
        return encode(self, texts)

    def counted_train(self: BPETokenizer, texts: Any) -> None:
        counts["train"] += 1
        train(self, texts)

    monkeypatch.setattr(BPETokenizer, "encode_batch", counted_encode)
    monkeypatch.setattr(BPETokenizer, "train", counted_train)

    def start(**options: Any) -> tuple[TokenizedData, dict[str, int]]:
        counts.update(encode=0, train=0)
        data = kind(train=path, tokenizer=BPETokenizer(270), **options)
        data.prepare_data()
        data.setup("fit")
        return data, dict(counts)

    with caplog.at_level("INFO"):
        first, did = start()
        assert did["train"] == 1 and did["encode"] >= 5
        assert "preparing it" in caplog.text
        caplog.clear()
        second, did = start()
        assert did == {"encode": 0, "train": 0}
        assert "taken from the cache" in caplog.text and "preparing it" not in caplog.text
    assert first.tokenizer.same_as(second.tokenizer)
    _, did = start(limit=3)  # other data: prepared anew
    assert did["train"] == 1 and did["encode"] >= 3
    write("x.jsonl", [row] * 6)
    _, did = start()
    assert did["train"] == 1 and did["encode"] >= 6


def test_an_interrupted_preparation_leaves_nothing_behind(write: Any, own_cache: Path) -> None:
    path = write("x.jsonl", [{"text": "a"}] * 1500 + [{"no": "text"}])
    with pytest.raises(ValueError, match=r"x\.jsonl:1501: column 'text' is missing"):
        text_data(path).setup("fit")
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("kind", ALL)
def test_faults_are_found_before_training(kind: type[TokenizedData], write: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a", "prompt": "a", "completion": "a", "chosen": "a", "rejected": "b"}\nnot json\n')
    lacking = write("lacking.jsonl", [{"other": 1, "chosen": "a"}])
    for source, words in {
        str(tmp_path / "missing.jsonl"): r"missing\.jsonl: there is no such file",
        str(tmp_path / "empty.jsonl"): r"empty\.jsonl: there are no rows",
        str(broken): r"broken\.jsonl:2: this line is not JSON",
        lacking: r"lacking\.jsonl:1: column .* is missing",
        "": r"data\.train is not set",
    }.items():
        data = kind(train=source or None, tokenizer="bytes")
        with pytest.raises(ValueError, match=words):
            data.prepare_data()
    with pytest.raises(ValueError, match=r"there is no tokenizer: set data\.tokenizer"):
        kind(train=str(broken)).prepare_data()


def test_a_token_id_outside_the_vocabulary_is_named(write: Any) -> None:
    path = write("x.jsonl", [{"tokens": [1, 2]}, {"tokens": [1, 263]}])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: the token id 263 is outside the vocabulary of 263 ids"):
        text_data(path).setup("fit")


def with_module(data: TokenizedData, **module: Any) -> TokenizedData:
    module_like = SimpleNamespace(**module)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=module_like, distributed_sampler_kwargs=None, overfit_batches=0
    )
    return data


def test_the_network_has_a_say(path: str) -> None:
    tokenizer = ByteTokenizer()
    data = with_module(text_data(path, tokenizer=None), load_tokenizer=lambda: tokenizer)
    data.setup("fit")
    assert data.tokenizer is tokenizer
    data = with_module(text_data(path, tokenizer=None), tokenizer=tokenizer, load_tokenizer=None)
    data.setup("fit")
    assert data.tokenizer is tokenizer
    for fault, words in (
        ({"load_tokenizer": lambda: tokenizer}, "data.tokenizer is another tokenizer"),
        ({"vocab_size": 200}, "ids, the network's vocab_size is 200"),
        ({"context_length": 20}, "data.sequence_length is 40, but the network's context is 20"),
    ):
        with pytest.raises(ValueError, match=words):
            with_module(text_data(path, tokenizer=BPETokenizer(270)), **fault).setup("fit")
    demos = DemonstrationData(train=path, tokenizer="bytes")
    with_module(demos, context_length=12).setup("fit")  # max_length follows the network
    assert max(b.tokens.shape[1] for b in demos.train_dataloader()) == 12
    with pytest.raises(ValueError, match=r"data\.max_length is 50"):
        with_module(DemonstrationData(train=path, tokenizer="bytes", max_length=50), context_length=12).setup("fit")


def test_a_reused_data_module_follows_another_network(path: str) -> None:
    data = text_data(path, tokenizer=None)
    with_module(data, tokenizer=ByteTokenizer()).setup("fit")
    before = data.train_dataloader().num_elements
    bpe = BPETokenizer(300)
    bpe.train(TEXTS)
    with_module(data, tokenizer=bpe).setup("fit")
    assert data.tokenizer is bpe
    data.trainer = None
    tokens = torch.cat([b.tokens[b.mask] for b in data.train_dataloader()])
    assert int(tokens.max()) >= 263 and data.train_dataloader().num_elements <= before


def test_stages_and_splits(path: str, write: Any, tmp_path: Path) -> None:
    other = write("y.jsonl", [{"text": "other"}] * 3)
    data = text_data(path, validation=other, test=other, predict=other, eval_limit=2, eval_batch_size=1)
    for stage, loader in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        data.setup(stage)
        assert len(getattr(data, f"{loader}_dataloader")()) == 2
    data = text_data(path, validation_fraction=0.3, limit=20)
    data.setup("fit")
    sizes = [data.train_dataloader().num_elements, data.val_dataloader().num_elements]
    assert sum(sizes) == 20 and min(sizes) > 0
    data = text_data(path)
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"data\.validation is not set"):
        data.setup("validate")
    with pytest.raises(ValueError, match=r"no dataset with splits, so data\.validation_split='dev'"):
        text_data(path, validation_split="dev").setup("fit")
    with pytest.raises(ValueError, match="no usable row for validation"):
        text_data(path, validation_fraction=1e-9).setup("fit")
    for wrong in ({"batch_size": 0}, {"limit": 0}, {"validation_fraction": 1.0}):
        with pytest.raises(ValueError, match=f"data.{next(iter(wrong))} is"):
            text_data(path, **wrong)
    with pytest.raises(ValueError, match="leave it out"):
        text_data(path, validation=other, validation_fraction=0.1)


def test_the_command_line_shows_every_argument() -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    for kind in ALL:
        config = parser.parse_args(
            [f"--data={kind.__name__}", "--data.train=x.jsonl", "--data.batch_size=7", "--data.tokenizer=BPETokenizer",
             "--data.tokenizer.vocab_size=500", "--data.cache_dir=null"]
        )  # fmt: skip
        data = parser.instantiate_classes(config).data
        assert type(data) is kind and data.batch_size == 7
        assert isinstance(data.tokenizer, BPETokenizer) and data.tokenizer.vocab_size == 500
    config = parser.parse_args(["--data=TextData", "--data.tokenizer=bytes", "--data.sequence_length=9"])
    assert parser.instantiate_classes(config).data.tokenizer == "bytes"
    with pytest.raises(jsonargparse.ArgumentError, match="batch_size"):
        parser.parse_args(["--data=TextData", "--data.batch_size=many"])


def test_public_names_exist() -> None:
    for name in lit_palm.data.__all__:
        assert getattr(lit_palm.data, name)
