"""Curves: what a token costs against length, batch, vocabulary, completions of a prompt, parameters, and position."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.inputs import Size, parameters
from tests.benchmarks.job import Curve, Job, Line, Point, Side
from tests.benchmarks.jobs.sizes import Mode, network, pick

OURS, PEER, OTHER = Line("lit_palm", ("ours",)), Line("transformers", ("transformers",)), "palm-rlhf-pytorch"
BEST = Line("transformers", ("transformers, dynamic cache", "transformers, static cache"))


def small(mode: Mode, **changes: int) -> dict[str, int]:
    """A network that leaves room for many points: d 256, 4 layers, about 4M parameters."""
    body = {} if mode == "short" else {"d_model": 256, "num_layers": 4, "num_heads": 4}
    return network(mode, **body, **changes)


def trained(mode: Mode, name: str, size: dict[str, int], rows: int, length: int) -> Job:
    """A training step of ours and of transformers."""
    at: dict[str, Any] = {"size": size, "rows": rows, "length": length, "precision": "32-true"}
    sides = [
        Side("ours", "ours.training:train", at),
        Side("transformers", "peers.language:train", {"peer": "transformers", **at}),
    ]
    return Job(name, name, sides, repeats=pick(mode, 5, 2, 1))


def length(mode: Mode) -> Curve:
    """Training, the tokens of a step held equal."""
    tokens = pick(mode, 4096, 4096, 64)
    lengths = pick(mode, [128, 256, 512, 1024, 2048, 4096], [256, 1024, 4096], [16, 32])
    points = [
        Point(n, trained(mode, f"length {n}", small(mode, max_length=max(64, n)), tokens // n, n), tokens)
        for n in lengths
    ]
    return Curve("length", "Training, by length", "tokens of a row", "ms a token", points, [OURS, PEER], 1000)


def params(mode: Mode) -> Curve:
    """Training, by the size of the network."""
    sizes = [
        {"d_model": d, "num_layers": n, "num_heads": h}
        for d, n, h in pick(
            mode,
            [(128, 4, 2), (256, 4, 4), (512, 4, 8), (512, 8, 8), (768, 12, 12)],
            [(128, 4, 2), (256, 4, 4), (512, 8, 8)],
            [(16, 1, 2), (32, 2, 2)],
        )
    ]
    rows, n = pick(mode, (4, 512), (2, 256), (2, 16))
    points = [
        Point(
            parameters(Size(**size)), trained(mode, f"parameters {parameters(Size(**size))}", size, rows, n), rows * n
        )
        for size in sizes
    ]
    return Curve("parameters", "Training, by size", "parameters", "ms a token", points, [OURS, PEER], 1000)


def vocabulary(mode: Mode) -> Curve:
    """Peak memory of training steps, by vocabulary."""
    ids = pick(mode, [1024, 4096, 16_384, 65_536, 131_072], [1024, 16_384, 131_072], [64, 128])
    rows, n = pick(mode, (4, 512), (4, 256), (2, 8))
    points = []
    for count in ids:
        at = {"size": small(mode, vocab_size=max(263, count)), "rows": rows, "length": n}
        sides = [
            Side("ours", "ours.training:train_memory", at),
            Side("transformers", "peers.language:train_memory", at),
        ]
        job = Job(f"vocabulary {count}", "", sides, repeats=1, process="memory", once=True, unit="bytes")
        points.append(Point(count, job))
    return Curve("vocabulary", "Training, by vocabulary", "token ids", "peak MB", points, [OURS, PEER], 1e-6)


def generated(mode: Mode, name: str, rows: int, prompt: int, new: int, completions: int = 1) -> Job:
    """Generation of ours and of transformers, with either cache."""
    at: dict[str, Any] = {
        "size": network(mode), "rows": rows, "prompt": prompt, "new": new, "precision": "32-true",
        "completions": completions,
    }  # fmt: skip
    sides = [Side("ours", "ours.generation:generate", at)]
    for name_of, cache in zip(BEST.sides, ("dynamic", "static"), strict=True):
        sides.append(Side(name_of, "peers.language:generate", {"peer": "transformers", "cache": cache, **at}))
    return Job(name, name, sides, repeats=pick(mode, 3, 1, 1))


def batch(mode: Mode) -> Curve:
    """Generation, by rows at once."""
    prompt, new = pick(mode, (64, 64), (32, 16), (4, 4))
    counts = pick(mode, [1, 2, 4, 8, 16, 32, 64], [1, 4, 16, 64], [1, 2])
    points = [Point(n, generated(mode, f"batch {n}", n, prompt, new), n * new) for n in counts]
    return Curve("batch", "Generation, by batch", "rows at once", "ms a token", points, [OURS, BEST], 1000)


def completions(mode: Mode) -> Curve:
    """Generation, by completions of one prompt."""
    prompt, new = pick(mode, (512, 32), (512, 8), (8, 4))
    counts = pick(mode, [1, 2, 4, 8, 16, 32], [1, 4, 16], [1, 2])
    points = [Point(n, generated(mode, f"completions {n}", 1, prompt, new, n), n * new) for n in counts]
    title = f"Generation, {prompt} + {new} tokens"
    return Curve("completions", title, "completions of one prompt", "ms a token", points, [OURS, BEST], 1000)


def position(mode: Mode) -> Curve:
    """One more token; palm-rlhf-pytorch has no cache and reads the whole text again."""
    places = pick(mode, [64, 128, 256, 512, 1024, 1900], [64, 256, 1024], [4, 16])
    points = []
    for at in places:
        ours = {"size": network(mode), "position": at, "steps": pick(mode, 16, 16, 2)}
        theirs = {"peer": OTHER, "size": network(mode), "rows": 1, "prompt": at, "new": ours["steps"], "places": 1}
        sides = [
            Side("ours", "ours.generation:decode_at", ours),
            Side(OTHER, "peers.language:generate_sampled", theirs),
        ]
        points.append(Point(at, Job(f"position {at}", "", sides, repeats=pick(mode, 3, 2, 1)), ours["steps"]))
    lines = [OURS, Line(OTHER, (OTHER,))]
    return Curve("position", "One more token of one row", "tokens before it", "ms a token", points, lines, 1000)


def curves(mode: Mode) -> list[Curve]:
    """All panels, in the order that they are drawn in."""
    return [length(mode), params(mode), vocabulary(mode), batch(mode), completions(mode), position(mode)]
