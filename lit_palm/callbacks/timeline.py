"""Where the seconds of a run go: `time/*` metrics in every run, and a Chrome trace by a flag.

    lit-palm fit --config configs/ppo.yaml --trainer.callbacks+=Timeline --trainer.callbacks.trace=runs/ppo/trace.json

Lightning's own actions (waiting for data, the step, a checkpoint, every hook) become spans beside those that a policy
has for sampling, scoring and the other passes of a collection.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_palm.callbacks.learning_rate import is_log_step
from lit_palm.callbacks.trace_file import TraceFile
from lit_palm.timing import Stopwatch, listen, span, unlisten

__all__ = ["Timeline"]

ONCE_IN_A_WHILE = ("collect", "validation", "checkpoint")
"""What does not happen at every step."""


class Timeline(Callback):
    """Log where the time went, every `log_every_n_steps`, and draw it as a Chrome trace where `trace` says.

    `time/step_s` (forward, backward, optimiser), `time/data_s` (waiting for a batch) and `time/other_s` (loggers,
    callbacks) are means over the optimiser steps since the last logged one; `time/validation_s` and
    `time/checkpoint_s` are the whole seconds of what there was since then, as a policy's `time/collect_s` is. So the
    steps times the first three, plus the others, is the wall time. All are those of the first process.

    The trace has these and, within them, forward, backward, a collection's phases, and every hook that takes longer
    than 20 microseconds. Each rank writes its own file, rank 0 the one that is named, others NAME.RANK.json. It is
    written every few seconds and at the end, as a whole: a run that dies leaves a valid file.

    Args:
        trace: the file to write, to be opened in chrome://tracing or ui.perfetto.dev; None: no trace.
        operators: number of optimiser steps of which torch's profiler adds every operator, with what comes between.
        operators_from: optimiser steps before these.
        max_events: most spans in the file (the latest are kept), and most operators.

    Raises:
        ValueError: a number is out of its range, operators are asked for without a trace, or, before anything else is
            done, the trace cannot be written.
    """

    def __init__(
        self, trace: str | None = None, operators: int = 0, operators_from: int = 2, max_events: int = 200_000
    ) -> None:
        if operators < 0 or operators_from < 0 or max_events < 1:
            raise ValueError(
                f"Timeline: operators is {operators}, operators_from {operators_from} and max_events {max_events}; the "
                "first two must not be negative, the last must be at least 1"
            )
        if operators and trace is None:
            raise ValueError("Timeline: operators are a part of the trace: say where that goes, with trace")
        self.trace, self.max_events = Path(trace) if trace is not None else None, max_events
        self.operators, self.operators_from = operators, operators_from
        self._file: TraceFile | None = None
        self._watch: Stopwatch | None = None
        self._profiler: Profiler | None = None
        self._torch_profiler: Any = None
        self._open: dict[str, span] = {}
        self._window, self._logged_step = 0.0, 0

    @staticmethod
    def replaces() -> type[Callback]:
        """A callback of this type in the configuration takes the place of the default one."""
        return Timeline

    # ------------------------------------------------------------------ from beginning to end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._finish(trainer)  # of an earlier run that ended badly
        if self.trace is not None:
            rank, path = trainer.global_rank, self.trace
            if rank > 0:
                path = path.with_name(f"{path.stem}.{rank}{path.suffix}")
            file = TraceFile(path, rank, self.max_events)
            try:
                file.write()
            except OSError as error:
                raise ValueError(f"Timeline: trace {path} cannot be written ({error}): name another place") from error
            listen(file)
            self._file = file
            self._begin(str(getattr(stage, "value", stage)))
            self._begin("set-up")
        self._profiler = trainer.profiler  # type: ignore[attr-defined]
        trainer.profiler = Actions(trainer.profiler, self._file is not None)  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        """Leave everything as it was, and write the trace."""
        if self._profiler is not None:
            trainer.profiler, self._profiler = self._profiler, None  # type: ignore[attr-defined]
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        self._stop_operators()
        for name in [*self._open][::-1]:
            self._end(name)
        if self._file is not None:
            unlisten(self._file)
            self._write(self._file)
            self._file = None

    def _write(self, file: TraceFile, always: bool = True) -> None:
        try:
            file.write() if always else file.write_if_due()
        except OSError as error:  # a full disk is no reason to end a run
            rank_zero_warn(f"Timeline: the trace {file.path} could not be written: {error}")

    def _begin(self, name: str) -> None:
        """Open a span that is closed in another hook."""
        self._open[name] = span(name)
        self._open[name].__enter__()

    def _end(self, name: str) -> None:
        if name in self._open:
            self._open.pop(name).__exit__()

    # ------------------------------------------------------------------ the loop

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("set-up")
        if trainer.loggers:
            self._watch = Stopwatch()
            self._watch.start()
        self._window, self._logged_step = time.perf_counter(), trainer.global_step
        self._start_operators(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, watch = trainer.global_step, self._watch
        if watch is not None and step != self._logged_step and is_log_step(trainer, step):
            pl_module.log_dict(self._times(watch, step), batch_size=1)
        if self._torch_profiler is not None and step >= self.operators_from + self.operators:
            self._stop_operators()
        self._start_operators(trainer)
        if self._file is not None:
            with span("write the trace"):
                self._write(self._file, always=False)

    def _times(self, watch: Stopwatch, step: int) -> dict[str, float]:
        """What is logged of the window that ends now; a new one begins."""
        now, steps = time.perf_counter(), step - self._logged_step
        parts = {"step": watch.seconds("step"), "data": watch.seconds("data", own=True)}
        seldom = {name: watch.seconds(name) for name in ONCE_IN_A_WHILE if watch.count(name)}
        other = now - self._window - sum(parts.values()) - sum(seldom.values())
        times = {f"time/{name}_s": seconds / steps for name, seconds in (parts | {"other": other}).items()}
        seldom.pop("collect", None)  # the policy logs it, with its parts
        self._window, self._logged_step = now, step
        watch.reset()
        return times | {f"time/{name}_s": seconds for name, seconds in seldom.items()}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._end("set-up")
        self._begin("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("validation")

    # ------------------------------------------------------------------ operators

    def _start_operators(self, trainer: Trainer) -> None:
        if self._file is None or not self.operators or self._torch_profiler is not None:
            return
        if trainer.global_step == self.operators_from:
            self._torch_profiler = torch.profiler.profile(activities=torch.profiler.supported_activities())
            self._torch_profiler.start()

    def _stop_operators(self) -> None:
        if self._torch_profiler is not None and self._file is not None:
            self._torch_profiler.stop()
            self._file.add_operators(self._torch_profiler)
        self._torch_profiler = None


class Actions(Profiler):
    """Makes spans of what Lightning does, beside the profiler that a run has anyway.

    Args:
        inner: that profiler.
        everything: a span for every action, not only for those that metrics are made of.
    """

    NAMES = {
        "train_dataloader_next": "data", "run_training_batch": "step", "save_checkpoint": "checkpoint",
        "run_training_epoch": "epoch", "training_step": "forward", "backward": "backward",
        "optimizer_step": "optimizer", "val_next": "validation data", "batch_to_device": "to device",
    }  # fmt: skip
    NEEDED = ("data", "step", "checkpoint")

    def __init__(self, inner: Profiler, everything: bool) -> None:
        super().__init__()
        self.inner, self.everything = inner, everything
        self._names: dict[str, str | None] = {}
        self._spans: list[span | None] = []

    def name_of(self, action: str) -> str | None:
        """The span's name; None: it gets none."""
        owner, _, hook = action.rpartition(".")
        kind, _, owner = owner.rpartition("]")
        if owner.startswith("Timeline"):
            return None  # it begins spans that end in another of its hooks
        name = self.NAMES.get(hook) if kind != "[Callback" else None
        if kind == "[LightningModule" and hook == "backward":
            name = None  # within the strategy's
        if name in self.NEEDED:
            return name
        return (name or action.replace("[", "").replace("]", " ")) if self.everything else None

    def start(self, action_name: str) -> None:
        self.inner.start(action_name)
        if action_name not in self._names:
            self._names[action_name] = self.name_of(action_name)
        name = self._names[action_name]
        self._spans.append(None if name is None else span(name))
        if name is not None:
            self._spans[-1].__enter__()  # type: ignore[union-attr]

    def stop(self, action_name: str) -> None:
        done = self._spans.pop()
        if done is not None:
            done.__exit__()
        self.inner.stop(action_name)

    def summary(self) -> str:
        return self.inner.summary()
