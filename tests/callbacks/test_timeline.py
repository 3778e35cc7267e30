"""Seconds that add up to the wall time, and a trace that nests, covers the run, stays small and is always valid."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PassThroughProfiler

from lit_palm.callbacks import LastCheckpoint, RolloutWriter, Timeline
from lit_palm.callbacks.trace_file import OPERATORS, TraceFile
from lit_palm.modules.rollouts import PHASES
from lit_palm.rollout.rewards import PythonReward
from lit_palm.testing.processes import Program
from lit_palm.timing import Span, Stopwatch, listen, span, unlisten
from tests.support import language_model, policy, prompt_data, text_data, trainer

ROOT = Path(__file__).parents[2]

# ------------------------------------------------------------------------------------------ spans


def test_a_stopwatch_adds_up_whole_and_own_time_of_its_own_thread() -> None:
    with Stopwatch() as watch:
        for _ in range(2):
            with span("outer"):
                time.sleep(0.02)
                with span("inner"):
                    time.sleep(0.03)
        other = threading.Thread(target=lambda: span("inner").__enter__())
        other.start(), other.join()
    assert watch.count("outer") == watch.count("inner") == 2
    assert watch.seconds("outer") == pytest.approx(watch.seconds("outer", own=True) + watch.seconds("inner"), abs=1e-9)
    assert watch.seconds("inner") == watch.seconds("inner", own=True) >= 0.06
    assert 0.04 <= watch.seconds("outer", own=True) < watch.seconds("inner") + 0.1
    before = watch.seconds("outer")
    with span("outer"):
        pass
    assert watch.seconds("outer") == before, "a stopped watch listens no more"
    watch.reset()
    assert watch.seconds("outer") == watch.count("outer") == 0


def test_spans_of_other_threads_are_told_with_their_thread() -> None:
    seen: list[Span] = []

    class Ear:
        def saw(self, span: Span) -> None:
            seen.append(span)

    def work() -> None:
        with span("there"):
            time.sleep(0.01)

    ear, watch = Ear(), Stopwatch()
    listen(ear)
    with watch, span("here"):
        thread = threading.Thread(target=work)
        thread.start(), thread.join()
    unlisten(ear)
    assert [s.name for s in seen] == ["there", "here"] and seen[0].thread != seen[1].thread
    assert seen[1].inner == 0, "what another thread does lies in none of this one's spans"
    assert watch.count("there") == 0


def test_an_error_closes_what_it_leaves_open() -> None:
    with Stopwatch() as watch:
        with pytest.raises(RuntimeError, match="x"), span("outer"):
            span("left open").__enter__()
            raise RuntimeError("x")
        with span("outer"):
            pass
    assert watch.count("outer") == 2 and watch.count("left open") == 0


# ------------------------------------------------------------------------------------------ metrics


def slow(seconds: float) -> Callable[..., list[float]]:
    def score(completions: list[str]) -> list[float]:
        time.sleep(seconds)
        return [float(len(text)) for text in completions]

    return score


class Logged(Callback):
    """Everything that was logged, step by step, and when each step ended."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.ends: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("time/")})
        self.ends.append(time.perf_counter())


def test_the_seconds_of_every_window_add_up_to_its_wall_time(tmp_path: Path) -> None:
    module = policy(rewards=[PythonReward(slow(0.2))], rollout={"num_prompts": 8, "passes": 1, "minibatch_size": 4})
    logged = Logged()
    run = trainer(
        tmp_path,
        max_epochs=2,
        logger=CSVLogger(str(tmp_path)),
        callbacks=[Timeline(), logged],
        check_val_every_n_epoch=1,
    )
    run.fit(module, datamodule=prompt_data(tmp_path))
    assert len(logged.rows) == 4
    told = 0.0
    for number, row in enumerate(logged.rows):
        # callback_metrics keep what was logged before: validation and collections belong to every other step
        told += row["time/step_s"] + row["time/data_s"] + row["time/other_s"]
        told += row["time/collect_s"] if number % 2 == 0 else 0.0
        told += row["time/validation_s"] + row["time/checkpoint_s"] if number == 2 else 0.0
        assert row["time/other_s"] > 0, "nothing is counted twice"
    # both read the clock in hooks of their own
    assert told == pytest.approx(logged.ends[-1] - logged.ends[0], rel=0.05, abs=0.05)
    collection = logged.rows[0]
    known = sum(collection.get(f"time/{name}_s", 0.0) for name in PHASES)
    assert 0.9 < known / collection["time/collect_s"] <= 1 + 1e-6
    assert collection["time/score_s"] > 0.2 > collection["time/data_s"]
    assert logged.rows[2]["time/validation_s"] > 0.2, "which scores too"


def test_fine_tuning_logs_its_seconds_too_and_the_profiler_is_put_back(tmp_path: Path) -> None:
    logged = Logged()
    run = trainer(tmp_path, max_epochs=1, logger=CSVLogger(str(tmp_path)), callbacks=[Timeline(), logged],
                  log_every_n_steps=2, profiler="simple")  # fmt: skip
    before = run.profiler
    run.fit(language_model(), datamodule=text_data(tmp_path, validation=None))
    assert {"time/step_s", "time/data_s", "time/other_s"} <= logged.rows[1].keys()
    assert not logged.rows[0], "between two logged steps nothing is logged"
    assert run.profiler is before and "run_training_batch" in before.recorded_durations


def test_without_a_logger_or_a_trace_nothing_listens(tmp_path: Path) -> None:
    from lit_palm import timing

    counted: list[int] = []

    class Count(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            counted.append(len(timing._listeners))

    trainer(tmp_path, max_epochs=1, callbacks=[Timeline(), Count()], enable_checkpointing=False).fit(
        language_model(), datamodule=text_data(tmp_path, validation=None)
    )
    assert counted and set(counted) == {0}


# ------------------------------------------------------------------------------------------ the trace


def spans_of(path: Path, pid: int = 0) -> list[dict[str, Any]]:
    """The spans of a file that is valid and whose spans nest, by their beginning."""
    trace = json.loads(path.read_text(encoding="utf-8"))
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X" and e["pid"] == pid]
    for thread in {e["tid"] for e in spans}:
        open_until: list[float] = []
        for event in sorted((e for e in spans if e["tid"] == thread), key=lambda e: (e["ts"], -e["dur"])):
            while open_until and open_until[-1] <= event["ts"]:
                open_until.pop()
            end = event["ts"] + event["dur"]
            assert not open_until or end <= open_until[-1] + 1e-3, f"{event['name']} ends after what it is in"
            open_until.append(end)
    return sorted(spans, key=lambda e: e["ts"])


def covered(spans: list[dict[str, Any]]) -> float:
    """Microseconds in which at least one of the spans is open."""
    total, reached = 0.0, 0.0
    for event in sorted(spans, key=lambda e: e["ts"]):
        end = event["ts"] + event["dur"]
        total += max(0.0, end - max(reached, event["ts"]))
        reached = max(reached, end)
    return total


def test_a_trace_of_ppo_nests_covers_the_run_and_has_every_phase(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trace.json"
    module = policy(rewards=[PythonReward(slow(0.2))], rollout={"num_prompts": 8, "passes": 1, "minibatch_size": 4})
    callbacks = [Timeline(str(path)), LastCheckpoint(str(tmp_path / "c")), RolloutWriter(str(tmp_path / "r"))]
    run = trainer(tmp_path, max_epochs=2, callbacks=callbacks)
    start = time.perf_counter()
    run.fit(module, datamodule=prompt_data(tmp_path))
    took = (time.perf_counter() - start) * 1e6
    spans = spans_of(path)
    names = {e["name"] for e in spans}
    phases = {"collect", "rollout", "prefill", "decode", "score", "reference", "value", "prepare", "old_logps", "check"}
    phases |= {"fit", "set-up", "epoch", "data", "step", "forward", "backward", "optimizer", "validation", "checkpoint"}
    assert phases <= names
    whole = next(e for e in spans if e["name"] == "fit")
    assert whole["dur"] > 0.7 * took, "from set-up to the end"
    # not the spans that stand for the whole, or for whatever happens in an epoch
    told = [e for e in spans if e["name"] not in ("fit", "epoch")]
    assert covered(told) > 0.95 * whole["dur"]
    steps = [e for e in spans if e["name"] == "step"]
    assert len(steps) == 4 == len([e for e in spans if e["name"] == "backward"])
    assert sum(e["name"] == "collect" for e in spans) == 2
    trace = json.loads(path.read_text(encoding="utf-8"))
    assert {e["name"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"} == {
        "process_name": "rank 0", "thread_name": "MainThread",
    }  # fmt: skip


def test_operators_of_some_steps_lie_within_these(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    callbacks = [Timeline(str(path), operators=1, operators_from=1, max_events=3000)]
    run = trainer(tmp_path, max_steps=4, callbacks=callbacks, enable_checkpointing=False)
    run.fit(language_model(), datamodule=text_data(tmp_path, validation=None))
    steps = [e for e in spans_of(path) if e["name"] == "step"]
    operators = [
        e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        if e["ph"] == "X" and e["pid"] == OPERATORS
    ]  # fmt: skip
    assert 0 < len(operators) <= 3000
    # the second where a processor has AVX-512
    products = [e for e in operators if e["name"] in ("aten::mm", "mkldnn::_linear_pointwise")]
    first, last = steps[1]["ts"], steps[1]["ts"] + steps[1]["dur"]
    # both clocks are read at different moments, and the wall clock may be set
    assert products and all(first - 2e3 < e["ts"] < last + 2e3 for e in products)


def test_a_run_that_fails_or_is_interrupted_leaves_a_valid_trace(tmp_path: Path) -> None:
    class Fails(Callback):
        def __init__(self, error: BaseException) -> None:
            self.error = error

        def on_validation_batch_start(self, *args: Any) -> None:
            raise self.error

    for number, error in enumerate((RuntimeError("lost"), KeyboardInterrupt())):
        path = tmp_path / f"{number}.json"
        timeline = Timeline(str(path))
        run = trainer(tmp_path, max_epochs=2, callbacks=[timeline, Fails(error)], enable_checkpointing=False)
        before = run.profiler
        with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
            run.fit(language_model(), datamodule=text_data(tmp_path))
        spans = spans_of(path)
        assert {"fit", "epoch", "step"} <= {e["name"] for e in spans}
        assert run.profiler is before
    with Stopwatch() as watch, span("after"):
        pass
    assert watch.count("after") == 1


KILLED = """
import os, sys
from pathlib import Path
from lightning.pytorch import Callback
from lit_palm.callbacks import Timeline, trace_file
from tests.support import language_model, text_data, trainer

trace_file.TraceFile.write_if_due = trace_file.TraceFile.write  # after every step

class Dies(Callback):
    def on_train_batch_start(self, run, *args):
        if run.global_step == 3:
            os._exit(9)

folder = Path(sys.argv[1])
run = trainer(folder, max_steps=5, callbacks=[Timeline(str(folder / "trace.json")), Dies()], enable_checkpointing=False)
run.fit(language_model(), datamodule=text_data(folder, validation=None))
"""


def test_a_run_that_is_killed_leaves_a_valid_trace(tmp_path: Path) -> None:
    (tmp_path / "dying_run.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = Program("dying_run", [str(tmp_path)], tmp_path / "log", environment, ROOT).finish()
    assert done.returncode == 9, done.stderr[-2000:]
    assert sum(e["name"] == "step" for e in spans_of(tmp_path / "trace.json")) == 3
    assert [p.name for p in tmp_path.glob("*trace*")] == ["trace.json"]


def test_a_trace_keeps_the_latest_spans_and_drops_the_shortest(tmp_path: Path) -> None:
    file = TraceFile(tmp_path / "t.json", 3, max_events=10)
    for number in range(25):
        begin = file.origin + number * 1_000_000
        file.saw(Span(f"n{number}", begin, begin + 500_000, 0, 1))
        file.saw(Span("nothing", begin, begin + 100, 0, 1))
    file.write()
    assert [e["name"] for e in spans_of(tmp_path / "t.json", pid=3)] == [f"n{i}" for i in range(15, 25)]
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["otherData"]["spans_left_out"] == 15


def test_each_rank_writes_a_file_of_its_own(tmp_path: Path) -> None:
    timeline = Timeline(str(tmp_path / "trace.json"))
    run: Any = SimpleNamespace(global_rank=2, profiler=PassThroughProfiler(), sanity_checking=False)
    timeline.setup(run, None, "validate")  # type: ignore[arg-type]
    with run.profiler.profile("[Strategy]S.validation_step"):
        time.sleep(0.001)
    timeline.teardown(run, None, "validate")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["trace.2.json"]
    assert "Strategy S.validation_step" in {e["name"] for e in spans_of(tmp_path / "trace.2.json", pid=2)}


def test_what_cannot_be_is_refused_before_anything_runs(tmp_path: Path) -> None:
    for options, words in (
        ({"operators": 2}, "say where that goes"),
        ({"trace": "x", "operators": -1}, "must not be negative"),
        ({"trace": "x", "max_events": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Timeline(**options)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    run = trainer(tmp_path, callbacks=[Timeline(str(tmp_path / "file" / "t.json"))], enable_checkpointing=False)
    with pytest.raises(ValueError, match="cannot be written"):
        run.fit(language_model(), datamodule=text_data(tmp_path))
    assert torch.is_grad_enabled()
