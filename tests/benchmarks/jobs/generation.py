"""Generation: beside the peers by batch and precision, beside the read bandwidth, mixed lengths, serving."""

from __future__ import annotations

from tests.benchmarks.job import Job, Row, Side
from tests.benchmarks.jobs.sizes import Mode, network, pick

TRANSFORMERS = ("transformers, dynamic cache", "transformers, static cache")


def batches(mode: Mode, precision: str) -> list[Job]:
    """192 new tokens after 64, in batches of 1, 16 and 64."""
    bf16 = precision == "bf16-true"
    label = "bfloat16" if bf16 else "float32"
    jobs = []
    for rows in (1, 16, 64):
        prompt, new = pick(mode, (64, 192), (64, 192) if bf16 else (16, 48), (4, 6))
        shape = {"size": network(mode), "rows": rows, "prompt": prompt, "new": new, "precision": precision}
        sides = [Side("ours", "ours.generation:generate", shape)]
        for name, cache in zip(TRANSFORMERS, ("dynamic", "static"), strict=True):
            sides.append(Side(name, "peers.language:generate", {"peer": "transformers", "cache": cache, **shape}))
        lines = [
            Row(f"generation {label}, batch {rows}, transformers", "ours", TRANSFORMERS, ">= 2.5" if bf16 else ">= 1.5")
        ]
        if rows == 1:
            bound = {"size": network(mode), "new": new, "precision": precision}
            bound["num_bytes"] = pick(mode, 2**28, 2**28, 2**20)
            sides.append(Side("read bandwidth", "ours.generation:bandwidth_bound", bound))
            title = f"decoding {label}, batch 1, share of the bandwidth bound"
            lines.append(Row(title, "ours", ("read bandwidth",), ">= 0.5", "bf16" if bf16 else ""))
        if rows == 16:
            sides.append(Side("litgpt", "peers.language:generate", {"peer": "litgpt", **shape}))
            lines.append(Row(f"generation {label}, batch 16, litgpt", "ours", ("litgpt",), ">= 1.5"))
        title = f"{new} new tokens after {prompt}, batch {rows}, {label}"
        jobs.append(Job(f"generation-{label}-{rows}", title, sides, lines, pick(mode, 5, 2, 1)))
    return jobs


def without_cache(mode: Mode) -> Job:
    """palm-rlhf-pytorch reads the whole text again for every token: minutes, of which a quick run takes samples."""
    shape = {"size": network(mode), "rows": 16, "prompt": pick(mode, 64, 64, 4), "new": pick(mode, 192, 192, 6)}
    peer, name = {"peer": "palm-rlhf-pytorch", **shape}, "palm-rlhf-pytorch"
    if mode == "full":
        theirs = Side(name, "peers.language:generate", {**peer, "precision": "32-true"})
    else:
        theirs = Side(name, "peers.language:generate_sampled", {**peer, "places": pick(mode, 0, 6, 2)})
    ours = Side("ours", "ours.generation:generate", {**shape, "precision": "32-true"})
    rows = [Row("generation float32, batch 16, palm-rlhf-pytorch", "ours", (name,), ">= 80")]
    title = f"{shape['new']} new tokens after {shape['prompt']}, batch 16, float32, no cache"
    return Job("generation-palm", title, [ours, theirs], rows, pick(mode, 2, 2, 1), once=mode == "full")


def mixed(mode: Mode) -> Job:
    """Geometric lengths."""
    shape = {
        "size": network(mode),
        "prompts": pick(mode, 128, 24, 8),
        "prompt": pick(mode, 64, 64, 4),
        "mean": pick(mode, 64, 64, 8),
        "longest": pick(mode, 256, 256, 16),
        "rows": pick(mode, 16, 16, 4),
    }
    ways = ("continuous", "static", "cached")
    sides = [Side(way, "ours.generation:mixed", {**shape, "way": way}) for way in ways]
    rows = [
        Row("mixed lengths, continuous against static", "continuous", ("static",), ">= 1.8"),
        Row("mixed lengths, continuous against the built-in engine", "continuous", ("cached",), ">= 1"),
    ]
    title = f"{shape['prompts']} completions of geometric lengths, mean {shape['mean']}, at most {shape['longest']}"
    return Job("mixed-lengths", title, sides, rows, pick(mode, 3, 2, 1), same="tokens")


def together(mode: Mode) -> Job:
    """The scheduler where it has nothing to gain: rows that start and end together."""
    shape = {"size": network(mode), "rows": 64, "prompt": pick(mode, 64, 64, 4), "new": pick(mode, 96, 32, 6)}
    sides = [
        Side(engine, "ours.generation:generate", {**shape, "precision": "32-true", "engine": engine})
        for engine in ("continuous", "cached")
    ]
    rows = [Row("equal lengths, continuous against the built-in engine", "continuous", ("cached",), ">= 0.9")]
    return Job("equal-lengths", "64 completions of equal lengths", sides, rows, pick(mode, 5, 2, 1))


def position(mode: Mode) -> Job:
    """A step late in a text against one early in it."""
    near, far = pick(mode, (100, 1500), (100, 1500), (4, 20))
    shape = {"size": network(mode), "steps": pick(mode, 40, 40, 2)}
    sides = [Side(f"position {at}", "ours.generation:decode_at", {**shape, "position": at}) for at in (near, far)]
    rows = [Row(f"decoding at position {far} against {near}", sides[1].name, (sides[0].name,), "<= 1.3")]
    return Job("position", "decoding steps of one row", sides, rows, pick(mode, 15, 5, 1))


def serving(mode: Mode) -> Job:
    """Clients that stream from a server."""
    shape = {"size": network(mode), "duration": pick(mode, 10.0, 4.0, 1.0), "new": pick(mode, 64, 64, 4)}
    sides = [
        Side(name, "ours.serving:Clients", {**shape, "count": count})
        for name, count in (("16 clients", 16), ("one client", 1))
    ]
    rows = [Row("serving 16 streaming clients, against one", "16 clients", ("one client",), ">= 5")]
    return Job("serving", "a token of `lit-palm serve`", sides, rows, pick(mode, 3, 2, 1))


def jobs(mode: Mode) -> list[Job]:
    """All of them, in the order that they run in."""
    return [
        *batches(mode, "32-true"), *batches(mode, "bf16-true"), without_cache(mode), mixed(mode), together(mode),
        position(mode), serving(mode),
    ]  # fmt: skip
