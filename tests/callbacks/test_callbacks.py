"""Every callback under a real Trainer, by what it leaves in the log, in the checkpoint and on the screen."""

from __future__ import annotations

import csv
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_palm import callbacks
from lit_palm.callbacks import LearningRate, ProgressBar, SampleLogger, Throughput, progress
from lit_palm.callbacks.samples import format_samples
from lit_palm.testing.processes import warm_context

TOKENS_A_BATCH = 32


class BoringModule(LightningModule):
    """Trains one linear layer in two named groups, and counts its tokens as the real modules do."""

    def __init__(self, on_device: bool = True) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)
        self.num_tokens_seen: int | Tensor = torch.zeros((), dtype=torch.long) if on_device else 0
        self.samples: list[dict[str, Any]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.num_tokens_seen = self.num_tokens_seen + TOKENS_A_BATCH
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> Any:
        spare = nn.Parameter(torch.zeros(1))
        groups = [
            {"params": self.layer.parameters(), "name": "policy"},
            {"params": [spare], "lr": 0.5, "name": "value"},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(8, 4), batch_size=1)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.ones(2, 4), batch_size=1)  # type: ignore[arg-type]


@pytest.fixture
def make_trainer(tmp_path):
    """Trainer(...) on the CPU that writes to a temporary folder, quietly."""

    def make(**flags: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "logger": False,
        }
        return Trainer(**{**defaults, **flags})

    return make


def logged(folder: Path, name: str) -> dict[int, float]:
    """step -> value of a metric in a CSVLogger's file."""
    with open(folder / "metrics.csv") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


# ---------------------------------------------------------------------------------------------------- learning rate


def test_learning_rate_is_called_lr(make_trainer, tmp_path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    make_trainer(logger=logger, callbacks=[LearningRate()], log_every_n_steps=2).fit(BoringModule())
    # steps 0 to 7, schedule 1 / (1 + step); Lightning writes every second
    assert logged(tmp_path, "lr") == pytest.approx({1: 0.1 / 2, 3: 0.1 / 4, 5: 0.1 / 6, 7: 0.1 / 8})
    assert logged(tmp_path, "lr/value") == pytest.approx({1: 0.5 / 2, 3: 0.5 / 4, 5: 0.5 / 6, 7: 0.5 / 8})


def test_learning_rate_under_accumulation_is_the_steps(make_trainer, tmp_path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    make_trainer(logger=logger, callbacks=[LearningRate()], accumulate_grad_batches=4).fit(BoringModule())
    assert logged(tmp_path, "lr") == pytest.approx({0: 0.1, 1: 0.05})


# ---------------------------------------------------------------------------------------------------- throughput


class Reads(Callback):
    """Counts how often the token counter is turned into a number, that is how often the host waits for the device."""

    def __init__(self) -> None:
        self.count = 0

    def setup(self, trainer, pl_module, stage) -> None:
        callback = self

        class Counter(torch.Tensor):
            def __int__(self) -> int:
                callback.count += 1
                return super().__int__()

        pl_module.num_tokens_seen = torch.zeros((), dtype=torch.long).as_subclass(Counter)


@pytest.mark.parametrize("on_device", [True, False])
def test_throughput_counts_tokens_and_reads_them_only_to_log(make_trainer, tmp_path, on_device: bool) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    throughput, reads = Throughput(peak_flops=1e9), Reads()
    extra = [reads] if on_device else []
    make_trainer(logger=logger, callbacks=[*extra, throughput], log_every_n_steps=4).fit(BoringModule(on_device))
    assert logged(tmp_path, "num_tokens") == {3: 4 * TOKENS_A_BATCH, 7: 8 * TOKENS_A_BATCH}
    if on_device:
        assert 2 <= reads.count <= 3 * 2 + 1  # at the start and at two of eight steps
    rate, utilisation = logged(tmp_path, "perf/tokens_per_s"), logged(tmp_path, "perf/mfu")
    assert rate.keys() == utilisation.keys() == {3, 7}
    for step, value in rate.items():
        # 6 FLOPs for each of the 4 parameters; CSV keeps float32
        assert utilisation[step] == pytest.approx(value * 6 * 4 / 1e9, rel=1e-5)


def test_throughput_takes_the_modules_flops_and_leaves_validation_out(make_trainer, tmp_path, monkeypatch) -> None:
    """A clock that only validation moves by much: 1,000 ticks a validation, 1 tick a reading elsewhere."""
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    class SlowValidation(Callback):
        def on_validation_epoch_start(self, trainer, pl_module) -> None:
            clock[0] += 1000.0

    monkeypatch.setattr("lit_palm.callbacks.throughput.time.perf_counter", tick)
    logger = CSVLogger(tmp_path, name="", version="")
    module = BoringModule()
    module.flops_per_token = 100.0
    make_trainer(
        logger=logger,
        callbacks=[SlowValidation(), Throughput(peak_flops=1e6)],
        log_every_n_steps=4,
        val_check_interval=2,
    ).fit(module)
    rates = logged(tmp_path, "perf/tokens_per_s")
    # 128 tokens in the ticks of the readings alone: one at the end, and two or three around each validation
    assert all(128 / 5 <= rate <= 128 for rate in rates.values()) and len(rates) == 2
    assert logged(tmp_path, "perf/mfu")[7] == pytest.approx(rates[7] * 100 / 1e6, rel=1e-5)


def test_tokens_continue_after_resume_also_between_two_logs(make_trainer, tmp_path) -> None:
    first = Throughput(peak_flops=1e9)
    trainer = make_trainer(callbacks=[first], max_steps=3, max_epochs=-1, log_every_n_steps=2)
    trainer.fit(BoringModule())
    trainer.save_checkpoint(tmp_path / "three.ckpt")  # step 3 was not logged

    logger = CSVLogger(tmp_path / "log", name="", version="")
    second = Throughput(peak_flops=1e9)
    trainer = make_trainer(callbacks=[second], max_steps=6, max_epochs=-1, log_every_n_steps=2, logger=logger)
    trainer.fit(BoringModule(), ckpt_path=tmp_path / "three.ckpt", weights_only=True)
    assert logged(tmp_path / "log", "num_tokens") == {3: 4 * TOKENS_A_BATCH, 5: 6 * TOKENS_A_BATCH}


def test_tokens_are_not_counted_twice_when_the_module_restores_its_own(make_trainer, tmp_path) -> None:
    class Restoring(BoringModule):
        def on_save_checkpoint(self, checkpoint) -> None:
            checkpoint["seen"] = int(self.num_tokens_seen)

        def on_load_checkpoint(self, checkpoint) -> None:
            self.num_tokens_seen = checkpoint["seen"]

    trainer = make_trainer(callbacks=[Throughput(peak_flops=1e9)], max_steps=4, max_epochs=-1)
    trainer.fit(Restoring())
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    second = Throughput(peak_flops=1e9)
    trainer = make_trainer(callbacks=[second], max_steps=6, max_epochs=-1)
    trainer.fit(Restoring(), ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    assert second.num_tokens == 6 * TOKENS_A_BATCH


class OneGroup(BoringModule):
    """Nothing of it is left without a gradient, which data parallelism would complain about."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_tokens_of_all_ranks_are_counted(make_trainer, tmp_path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    throughput = Throughput(peak_flops=1e9)
    warm_context()
    strategy = DDPStrategy(start_method="forkserver")
    flags = {"devices": 2, "strategy": strategy, "log_every_n_steps": 2, "limit_val_batches": 0}
    make_trainer(logger=logger, callbacks=[throughput], **flags).fit(OneGroup())
    assert logged(tmp_path, "num_tokens") == {1: 2 * 2 * TOKENS_A_BATCH, 3: 2 * 4 * TOKENS_A_BATCH}


def test_peak_is_measured_when_it_is_not_given(make_trainer) -> None:
    throughput = Throughput()
    make_trainer(callbacks=[throughput], max_steps=1).fit(BoringModule())
    assert throughput.peak_flops is not None and throughput.peak_flops > 1e6
    with pytest.raises(ValueError, match="peak_flops"):
        Throughput(peak_flops=0)


def test_a_run_ends_with_its_speed(make_trainer, caplog) -> None:
    with caplog.at_level(logging.INFO):
        make_trainer(callbacks=[Throughput(peak_flops=2e9)], max_steps=3).fit(BoringModule())
    (line,) = [message for message in caplog.messages if "tokens at" in message]
    assert line.startswith(f"{3 * TOKENS_A_BATCH} tokens at ") and line.endswith("% of 2e+09 FLOP/s a device")


# ---------------------------------------------------------------------------------------------------- samples


def test_samples_are_text_in_tensorboard(make_trainer, tmp_path) -> None:
    class Sampling(BoringModule):
        def on_validation_epoch_end(self) -> None:
            step = self.trainer.global_step
            self.samples = [
                {"prompt": f"at {step}", "completion": "good", "rewards": {"judge": 0.5}, "reward": 1.25},
                {"prompt": "The film", "completion": "not shown", "rewards": {}},
            ]

    logger = TensorBoardLogger(tmp_path, name="", version="run")
    make_trainer(logger=logger, callbacks=[SampleLogger(num_samples=1)], val_check_interval=4).fit(Sampling())
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (tag,) = events.Tags()["tensors"]
    texts = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}
    assert tag.startswith("samples") and texts.keys() == {4, 8}  # and nothing from the sanity check
    assert texts[4].splitlines() == [
        "| prompt | completion | reward | judge |",
        "| --- | --- | ---: | ---: |",
        "| at 4 | good | 1.250 | 0.500 |",
    ]


def test_nothing_to_show_and_loggers_without_text_are_passed_over(make_trainer, tmp_path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    module = BoringModule()
    make_trainer(logger=logger, callbacks=[SampleLogger()]).fit(module)
    module.samples = [{"prompt": "a", "completion": "b"}]
    make_trainer(logger=logger, callbacks=[SampleLogger()]).validate(module, verbose=False)
    with pytest.raises(ValueError, match="num_samples"):
        SampleLogger(num_samples=0)


def test_what_a_model_writes_cannot_break_the_table() -> None:
    nasty = "a | b\n<script>x</script> **bold** `code` [link](x) \\"
    table = format_samples([{"prompt": nasty, "completion": nasty, "reward": None, "rewards": {"r|1": 1}}])
    header, _, row = table.splitlines()
    assert row.count("|") == header.count("|") == 4
    assert "<script>" not in row and "<br>" in row and not re.search(r"[*`\[\]\\]", row)


def test_rewards_may_differ_between_samples() -> None:
    samples = [{"prompt": "p", "completion": "c", "rewards": {"a": 1}}, {"prompt": "p", "completion": "c", "reward": 2}]
    assert format_samples(samples).splitlines()[2:] == ["| p | c | 1.000 |  |", "| p | c |  | 2.000 |"]


# ---------------------------------------------------------------------------------------------------- progress bar


def test_progress_bar_names_the_stage(make_trainer, tmp_path, capsys) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version=7)
    module = BoringModule()
    module.stage_name = "reward model"
    make_trainer(logger=logger, enable_progress_bar=True, callbacks=[ProgressBar()], max_epochs=2).fit(module)
    screen = "".join(capsys.readouterr())
    for text in ("reward model 1/2", "reward model 2/2", "reward model: validation", "trying out validation"):
        assert text in screen
    assert "v_num" not in screen and "Epoch" not in screen and "DataLoader" not in screen


@pytest.mark.parametrize("seconds, looks", [(0.0, 8), (1e9, 0)])
def test_the_bar_reads_metrics_no_oftener_than_it_says(make_trainer, monkeypatch, seconds: float, looks: int) -> None:
    """To read them means to wait for the device; with the end of the epoch it reads them in any case."""
    read = []
    real = progress.TQDMProgressBar.get_metrics
    monkeypatch.setattr(progress, "EVERY", seconds)
    monkeypatch.setattr(
        progress.TQDMProgressBar, "get_metrics", lambda bar, *given: read.append(bar._may_lag) or real(bar, *given)
    )
    make_trainer(enable_progress_bar=True, callbacks=[ProgressBar()], limit_val_batches=0).fit(BoringModule())
    assert sum(read) == looks and len(read) > sum(read)


def test_progress_bar_has_a_name_of_its_own_or_none(make_trainer, capsys) -> None:
    make_trainer(enable_progress_bar=True, callbacks=[ProgressBar("tuning")], max_steps=2, max_epochs=-1).fit(
        BoringModule()
    )
    assert re.search(r"tuning 1[^/]", capsys.readouterr().out)
    bar = ProgressBar(refresh_rate=0)
    make_trainer(enable_progress_bar=True, callbacks=[bar], max_steps=2).fit(BoringModule())
    assert bar.stage == "training" and bar.is_disabled and capsys.readouterr().out == ""


def test_defaults_are_added_once_and_make_themselves() -> None:
    """What the CLI relies on: every default is made without arguments and says which callback takes its place."""
    from lightning.pytorch.callbacks import RichProgressBar

    made = [kind() for kind in callbacks.DEFAULTS]
    assert all(isinstance(callback, kind.replaces()) for callback, kind in zip(made, callbacks.DEFAULTS, strict=True))
    assert set(callbacks.NEED_LOGGER) < set(callbacks.DEFAULTS)
    assert issubclass(RichProgressBar, ProgressBar.replaces())
