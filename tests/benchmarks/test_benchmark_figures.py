"""How figures are read off runs: ratios, targets, verdicts, the table, the files, the picture."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

from tests.benchmarks import report
from tests.benchmarks.job import Curve, Job, Line, Point, Ratio, Row, Side, Target, ratio_of, verdict
from tests.benchmarks.measuring import Result

ABLE, UNABLE = {"bf16": True}, {"bf16": False}
MACHINE = {
    "processor": "A | B", "threads": 2, "instructions": UNABLE,
    "versions": {"torch": "2"}, "peer_versions": {"trl": "1"},
    "measured": {"peak_flops": {"float32": 150e9}, "peak_bandwidth": 20e9},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "figure", "met"),
    [
        (">= 1.5", 1.5, True),
        (">= 1.5", 1.49, False),
        ("<= 0.5", 0.5, True),
        ("<= 0.5", 0.51, False),
        (">= 80", 81, True),
    ],
)
def test_targets_are_parsed_and_held_to(text: str, figure: float, met: bool) -> None:
    target = Target.parse(text)
    assert str(target) == text and target.met(figure) is met


@pytest.mark.parametrize("text", ["1.5", "> 1.5", ">=1.5", ">= fast", ""])
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Target.parse(text)


def test_a_ratio_is_the_median_over_pairs_of_one_round() -> None:
    row = Row("", "ours", ("peer",), ">= 1")
    # the machine is three times as slow in the second round: quotients of medians would say 3
    found = ratio_of(row, {"ours": [1.0, 3.0, 1.0], "peer": [2.0, 6.0, 6.0]})
    assert found == Ratio(2.0, 2.0, 6.0, "peer")
    assert ratio_of(Row("", "ours", ("peer",), "<= 1"), {"ours": [1.0], "peer": [4.0]}) == Ratio(
        0.25, 0.25, 0.25, "peer"
    )


def test_a_ratio_against_several_is_against_the_best_of_them() -> None:
    draw = random.Random(0)
    costs = {name: [draw.uniform(1, 9) for _ in range(5)] for name in ("ours", "a", "b", "c")}
    found = ratio_of(Row("", "ours", ("a", "b", "c", "absent"), ">= 1"), costs)
    best = min("abc", key=lambda name: statistics.median(costs[name]))
    quotients = sorted(theirs / ours for theirs, ours in zip(costs[best], costs["ours"], strict=True))
    assert found is not None and found.peer == best
    assert (found.value, found.low, found.high) == (quotients[2], quotients[0], quotients[-1])


@pytest.mark.parametrize("costs", [{}, {"ours": [1.0]}, {"peer": [1.0]}, {"ours": [], "peer": [1.0]}])
def test_a_missing_side_gives_no_ratio(costs: dict[str, list[float]]) -> None:
    row = Row("", "ours", ("peer",), ">= 1")
    assert ratio_of(row, costs) is None and verdict(row, None, ABLE) == "not measured"


def test_verdicts() -> None:
    fast, slow = (Ratio(value, value, value, "peer") for value in (3.0, 1.0))
    speed, memory = Row("", "ours", ("peer",), ">= 2"), Row("", "ours", ("peer",), "<= 2")
    assert [verdict(speed, ratio, ABLE) for ratio in (fast, slow)] == ["met", "below"]
    assert [verdict(memory, ratio, ABLE) for ratio in (fast, slow)] == ["above", "met"]
    wants = Row("", "ours", ("peer",), ">= 2", "bf16")
    assert [verdict(wants, slow, able) for able in (ABLE, UNABLE)] == [
        "below",
        "not on this machine (no bf16 instructions)",
    ]
    assert verdict(wants, fast, UNABLE) == "met"


def result(**options: object) -> Result:
    sides = [Side("ours", "ours.a:b", {"rows": 4}), Side("peer", "peers.a:b"), Side("gone", "peers.c:d")]
    rows = [Row("against the peer", "ours", ("peer", "gone"), ">= 1.5"), Row("against none", "ours", ("gone",), ">= 2")]
    return Result(
        Job("name", "a title", sides, rows, same="loss", **options),  # type: ignore[arg-type]
        costs={"ours": [0.5, 0.25], "peer": [1.0, 1.0]},
        facts={"ours": {"loss": 2.0}, "peer": {"loss": 2.0}},
        left_out={"gone": "No module named 'gone'"},
    )


def test_the_table_names_targets_verdicts_and_who_was_left_out() -> None:
    lines = report.table([result()], UNABLE).splitlines()
    ends = [line.index(word) + len(word) for line, word in zip(lines, ("target", ">= 1.5", ">= 2"), strict=True)]
    assert len(set(ends)) == 1, "columns are aligned"
    assert "375 ms" in lines[1] and "3.00" in lines[1] and "2.00..4.00" in lines[1] and " met " in lines[1]
    assert "not measured" in lines[2] and "gone: No module named 'gone'" in lines[2]


def test_sides_that_did_not_do_the_same_are_told() -> None:
    found = result(tolerance=0.01)
    assert found.differs() == "" and "differs" not in report.table([found], UNABLE)
    found.facts["peer"]["loss"] = 2.1
    assert found.differs() == "loss differs: ours 2, peer 2.1"
    assert "met; loss differs" in report.table([found], UNABLE)


def test_markdown_and_json_hold_every_run() -> None:
    text = report.markdown([result()], MACHINE)
    lines = text.splitlines()
    assert {line.count("|") for line in lines[:4]} == {9}
    assert "A | B, 2 threads; measured peaks float32 150 GFLOP/s, read 20.0 GB/s. trl 1, torch 2." in text
    found = json.loads(json.dumps(report.job_to_json(result(), UNABLE)))
    assert found["sides"]["ours"] == {
        "call": "ours.a:b", "options": {"rows": 4}, "costs": [0.5, 0.25], "facts": {"loss": 2.0}
    }  # fmt: skip
    assert found["sides"]["gone"]["left_out"].startswith("No module")
    assert found["rows"][0]["ratio"] == 3.0 and "ratio" not in found["rows"][1]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (12.345, "s", "12.3 s"),
        (0.0123, "s", "12.3 ms"),
        (2e-6, "s", "2 us"),
        (3.2e9, "bytes", "3,200 MB"),
        (99e3, "bytes", "99 kB"),
    ],
)
def test_quantities_read_well(value: float, unit: str, text: str) -> None:
    assert report.quantity(value, unit) == text


def curve() -> tuple[Curve, list[Result]]:
    sides = [Side("ours", "ours.a:b"), Side("static", "peers.a:b"), Side("dynamic", "peers.a:b")]
    points = [Point(x, Job(f"at {x}", "", sides), per=10) for x in (1, 4, 16)]
    lines = [Line("lit_palm", ("ours",)), Line("transformers", ("static", "dynamic"))]
    results = [
        Result(point.job, costs={"ours": [point.x], "static": [3 * point.x], "dynamic": [2 * point.x]})
        for point in points
    ]
    del results[1].costs["static"], results[2].costs["static"], results[2].costs["dynamic"]
    return Curve("name", "Title", "rows", "ms a token", points, lines, 1000), results


def test_a_curve_takes_the_best_side_and_skips_what_failed() -> None:
    found = report.curve_to_json(*curve())
    assert [line["points"] for line in found["lines"]] == [[[1, 100], [4, 400], [16, 1600]], [[1, 200], [4, 800]]]


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tests.benchmarks.picture import draw, gaps, number, ticks

    panel = report.curve_to_json(*curve())
    assert gaps(panel) == "; transformers takes 2\N{MULTIPLICATION SIGN} to 2\N{MULTIPLICATION SIGN} ours"
    draw({"curves": [panel] * 4, "machine": MACHINE}, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG") and (
        tmp_path / "bench.png"
    ).stat().st_size > 2e4
    assert [number(x) for x in (0.5, 512, 131_072, 29.5e6)] == ["0.5", "512", "131k", "29.5M"]
    assert ticks(0.9, 30) == pytest.approx([1, 2, 5, 10, 20]) and ticks(1, 1e5)[:3] == [1, 10, 100]
    with pytest.raises(SystemExit, match="nothing to draw"):
        draw({"curves": [], "machine": MACHINE}, tmp_path / "none.png")
