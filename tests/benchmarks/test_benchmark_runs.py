"""Who runs when: sides in turn, in processes of their own, and what happens to those that fail."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.job import Job, Row, Side
from tests.benchmarks.jobs import alignment, generation, scaling, training
from tests.benchmarks.jobs.sizes import Mode
from tests.benchmarks.measuring import Crew, Failed, Missing, measure
from tests.benchmarks.stepping import Steps
from tests.benchmarks.worker import answer, serve

ROOT = Path(__file__).parents[2]


def catalogue(mode: Mode) -> list[Job]:
    """Every job, those of curves too."""
    points = [point.job for curve in scaling.curves(mode) for point in curve.points]
    return [*training.jobs(mode), *generation.jobs(mode), *alignment.jobs(mode), *points]


class Local:
    """A worker in this process."""

    def __init__(self) -> None:
        self.slots: dict[str, Any] = {}
        self.replies: list[dict[str, Any] | Failed] = []
        self.alive = True

    def send(self, **request: Any) -> None:
        try:
            self.replies.append(answer(request, self.slots))
        except ImportError as error:
            self.replies.append(Missing(str(error)))

    def answer(self) -> dict[str, Any]:
        reply = self.replies.pop(0)
        if isinstance(reply, Failed):
            raise reply
        return reply

    def close(self) -> None:
        self.send(drop=True)


class LocalCrew(Crew):
    """Ours in this process; a peer takes twice a second, whatever it is asked."""

    def start(self, environment: str, extra: dict[str, str] | None = None) -> Any:
        return Local() if environment == "ours" else Faked()


class Faked(Local):
    def send(self, **request: Any) -> None:
        self.replies.append({"cost": 2.0, "facts": {}})


def measured_here() -> list[Job]:
    """The table, but for servers and for what has a test of its own, and the last point of every curve."""
    apart = ("serving", "lora-memory")
    table = [*training.jobs("short"), *generation.jobs("short"), *alignment.jobs("short")]
    return [job for job in table if job.name not in apart] + [c.points[-1].job for c in scaling.curves("short")]


@pytest.mark.parametrize("job", measured_here(), ids=lambda job: job.name)
def test_every_job_measures_our_side(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in {"dpo": ["lit_palm_dpo"], "grpo": ["lit_palm_grpo"]}.get(job.name.partition("-")[0], []):
        pytest.importorskip(package)
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    crew = LocalCrew({}, 1, tmp_path)
    try:
        result = measure(job, crew)
    finally:
        crew.close()
    assert not result.left_out and not result.failed
    assert set(result.costs) == {side.name for side in job.sides}
    assert all(len(costs) == job.repeats and min(costs) > 0 for costs in result.costs.values())
    assert result.differs() == "", "both sides of a comparison do the same"


def test_serving_measures_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("litserve")
    [job] = [job for job in generation.jobs("short") if job.name == "serving"]
    side = job.sides[0]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    crew = LocalCrew({}, 1, tmp_path)
    result = measure(Job("serving", "", [side], repeats=1, once=True), crew)
    assert not result.failed and result.facts[side.name]["completions"] > 0 and result.costs[side.name][0] < 1


@pytest.mark.parametrize("mode", ["full", "quick", "short"])
def test_the_catalogue_holds_together(mode: Mode) -> None:
    jobs = catalogue(mode)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        names = [side.name for side in job.sides]
        assert len(set(names)) == len(names)
        for row in job.rows:
            assert row.bound.value > 0 and {row.subject, *row.against} <= set(names)
        for side in job.sides:
            module, _, function = side.call.partition(":")
            called = getattr(import_module(f"tests.benchmarks.{module}"), function)
            if "options" not in inspect.signature(called).parameters:
                inspect.signature(called).bind(**side.options)
            json.dumps(dict(side.options))
    for curve in scaling.curves(mode):
        sides = {side.name for point in curve.points for side in point.job.sides}
        assert {name for line in curve.lines for name in line.sides} <= sides


def test_all_sizes_have_the_same_jobs() -> None:
    names = [
        [job.name for job in (*training.jobs(mode), *generation.jobs(mode), *alignment.jobs(mode))]
        for mode in ("full", "quick", "short")
    ]
    assert names[0] == names[1] == names[2]


def test_every_row_of_the_table_has_a_target_of_its_own_title() -> None:
    titles = [row.title for job in catalogue("full") for row in job.rows]
    assert len(set(titles)) == len(titles) >= 30


class Script(Local):
    """Answers by script, and writes down what it is asked."""

    def __init__(self, costs: dict[str, Callable[[], float]], asked: list[str]) -> None:
        super().__init__()
        self.costs, self.asked = costs, asked

    def send(self, **request: Any) -> None:
        self.asked.append(" ".join(f"{key} {value}" for key, value in request.items() if key in ("prepare", "run")))
        try:
            cost = self.costs[request["run"]]() if "run" in request else 0.0
            self.replies.append({"cost": cost, "facts": {}})
        except Failed as error:
            self.replies.append(error)


def scripted(job: Job, **costs: Callable[[], float]) -> tuple[Any, list[str]]:
    asked: list[str] = []
    crew = Crew({}, 1, Path())
    crew.start = lambda environment, extra=None: Script(costs, asked)  # type: ignore[method-assign, assignment]
    return measure(job, crew), [line for line in asked if line]


SIDES = [Side("a", "ours.x:y"), Side("b", "peers.x:y"), Side("c", "peers.x:z")]


def test_sides_take_turns_after_a_warm_up() -> None:
    numbers = iter(range(100))
    one = lambda: float(next(numbers))  # noqa: E731
    result, asked = scripted(Job("n", "t", SIDES, repeats=2), a=one, b=one, c=one)
    assert asked == [*(f"prepare {x}" for x in "abc"), *(f"run {x}" for x in "abc" * 3)]
    assert result.costs == {"a": [3.0, 6.0], "b": [4.0, 7.0], "c": [5.0, 8.0]}


def test_a_side_that_fails_leaves_the_others_their_figures() -> None:
    def broken(error: Failed, after: int = 0) -> Callable[[], float]:
        calls = iter(range(100))

        def run() -> float:
            if next(calls) >= after:
                raise error
            return 1.0

        return run

    job = Job("n", "t", SIDES, [Row("r", "a", ("b", "c"), ">= 1")], repeats=3)
    result, _ = scripted(job, a=lambda: 1.0, b=broken(Missing("no b")), c=broken(Failed("boom"), after=2))
    assert result.costs == {"a": [1.0] * 3}
    assert result.left_out == {"b": "no b"} and result.failed == {"c": "boom"}


def test_a_worker_answers_in_order_and_survives_errors() -> None:
    requests = [
        {"prepare": "one", "call": "test_benchmark_runs:side", "options": {"cost": 2.5}},
        {"prepare": "two", "call": "test_benchmark_runs:side", "options": {"cost": None}},
        {"prepare": "three", "call": "no_such_module:side", "options": {}},
        {"run": "one"},
        {"run": "two"},
        {"run": "three"},
        {"drop": True},
        {"run": "one"},
    ]
    answers = io.StringIO()
    with contextlib.redirect_stderr(io.StringIO()):
        serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
    replies = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert replies[:2] == [{"ready": True}] * 2 and "no_such_module" in replies[2]["missing"]
    assert replies[3] == {"cost": 2.5, "facts": {"seen": 1}} and replies[4]["cost"] >= 0.01
    assert replies[5]["error"].startswith("KeyError") and replies[6] == {"dropped": True} and "error" in replies[7]


def side(cost: float | None) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        time.sleep(0.01)
        return {"seen": 1, **({} if cost is None else {"cost": cost})}

    return run


def test_a_process_that_ends_is_named(tmp_path: Path) -> None:
    crew = Crew({"ours": sys.executable}, 1, tmp_path)
    job = Job("n", "t", [Side("ours", "test_benchmark_runs:ending"), Side("peer", "peers.x:y")], repeats=1)
    try:
        result = measure(job, crew)
    finally:
        crew.close()
    assert result.failed == {"ours": "the process ended: out of memory, say"}
    assert result.left_out == {"peer": "no environment for peers"}


def ending() -> Callable[[], None]:
    def run() -> None:
        os.write(2, b"out of memory, say\n")
        os._exit(3)

    return run


def test_steps_go_one_at_a_time() -> None:
    done: list[int] = []

    def loop(pause: Callable[[], None]) -> None:
        for number in range(3):
            done.append(number)
            pause()

    steps = Steps(loop)
    for number in range(3):
        steps()
        assert done == list(range(number + 1))
    with pytest.raises(RuntimeError, match="fewer steps"):
        steps()


def test_steps_tell_what_failed_and_end_where_they_stand() -> None:
    def broken(pause: Callable[[], None]) -> None:
        pause()
        raise ValueError("no such data")

    steps = Steps(broken)
    steps()
    with pytest.raises(RuntimeError, match="no such data"):
        steps()
    ended: list[str] = []

    def loop(pause: Callable[[], None]) -> None:
        try:
            while True:
                pause()
        finally:
            ended.append("yes")

    steps = Steps(loop)
    steps()
    steps.close()
    assert ended == ["yes"]


def test_the_command(tmp_path: Path) -> None:
    """Table, JSON, Markdown and picture, with this environment as the peers'."""
    for package in ("palm_rlhf_pytorch", "transformers"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", "tests.benchmarks", "--short", "--threads", "1", "--output", str(tmp_path)]
    command += [
        "--peers",
        sys.executable,
        "--only",
        "training-float32",
        "--only",
        "generation-palm",
        "--only",
        "length",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert [job["name"] for job in figures["jobs"]] == ["training-float32", "generation-palm"]
    sides = figures["jobs"][0]["sides"]
    assert all(sides[name]["costs"] for name in ("ours", "transformers", "palm-rlhf-pytorch", "matmul peak"))
    assert sides["litgpt"]["costs"] or ("litgpt" in sides["litgpt"]["left_out"] and "left out: litgpt" in done.stdout)
    assert figures["machine"]["measured"]["peak_flops"]["float32"] > 1e6 and figures["machine"]["threads"] == 1
    assert [len(line["points"]) for line in figures["curves"][0]["lines"]] == [2, 2]
    assert (tmp_path / "bench.md").read_text(encoding="utf-8").count("\n| training") == 2
    assert (tmp_path / "bench.png").exists() or "matplotlib" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--only", "nothing"], "--list names them"), (["--list"], "dpo-memory")]
)
def test_the_command_names_what_there_is(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit, match=said) if "--only" in arguments else contextlib.nullcontext():
        import_module("tests.benchmarks.__main__").main()
    assert "--only" in arguments or said in capsys.readouterr().out
