"""Training: beside the peers in three precisions, beside the matrix-multiply peak, packed beside padded, and memory."""

from __future__ import annotations

from tests.benchmarks.job import Job, Row, Side
from tests.benchmarks.jobs.sizes import Mode, network, pick

PEERS = ("transformers", "palm-rlhf-pytorch", "litgpt")


def steps(mode: Mode) -> list[Job]:
    """A full step at 4 x 512 tokens."""
    jobs = []
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        bf16 = precision != "32-true"
        # what a step takes beside its products is a larger share of a smaller one
        rows, length = pick(mode, (4, 512), (4, 512) if bf16 else (2, 512), (2, 16))
        shape = {"size": network(mode), "rows": rows, "length": length}
        at = {**shape, "precision": precision}
        sides = [Side("ours", "ours.training:train", at)]
        if bf16:
            sides.append(Side("ours float32", "ours.training:train", {**shape, "precision": "32-true"}))
        sides += [Side(name, "peers.language:train", {"peer": name, **at}) for name in PEERS]
        sides.append(Side("matmul peak", "ours.training:matmul_bound", at))
        label, needs = ("float32", "") if not bf16 else (precision, "bf16")
        lines = [Row(f"training {label}, best peer", "ours", PEERS, ">= 1.1" if bf16 else ">= 1.05")]
        if bf16:
            lines.append(Row(f"training {label}, our float32", "ours", ("ours float32",), ">= 1.6", needs))
        share = ">= 0.7"
        lines.append(Row(f"training {label}, share of the matmul peak", "ours", ("matmul peak",), share))
        title = f"a training step of {rows} x {length} tokens, {label}"
        jobs.append(Job(f"training-{label}", title, sides, lines, pick(mode, 7, 3, 1)))
    return jobs


def packing(mode: Mode) -> Job:
    """Documents of log-normal lengths."""
    low, high = pick(mode, (16, 512), (16, 512), (6, 32))
    shape = {"size": network(mode), "count": pick(mode, 256, 24, 16), "low": low, "high": high}
    # as many documents in a batch either way: a window of 512 holds about four
    ways = [("packed", True, pick(mode, 4, 2, 2)), ("padded", False, pick(mode, 16, 8, 4))]
    sides = [
        Side(name, "ours.training:documents", {**shape, "packed": packed, "rows": rows}) for name, packed, rows in ways
    ]
    rows = [Row("fine-tuning, packed against padded", "packed", ("padded",), ">= 2")]
    title = f"fine-tuning on documents of {low} to {high} tokens, log-normal"
    return Job("packing", title, sides, rows, pick(mode, 3, 2, 1), same="loss", tolerance=1e-3)


def update_memory(mode: Mode) -> Job:
    """An update at a large vocabulary against one at a small."""
    sizes = pick(mode, (1024, 32 * 1024), (1024, 32 * 1024), (64, 256))
    shape = {"rows": pick(mode, 4, 4, 2), "length": pick(mode, 512, 512, 16)}
    sides = [
        Side(f"{ids} ids", "ours.training:update_memory", {"size": network(mode, vocab_size=ids), **shape})
        for ids in sizes
    ]
    title = "peak bytes of an update, without the embedding and its moments"
    line = f"memory of an update, {sizes[1]} ids against {sizes[0]}"
    rows = [Row(line, sides[1].name, (sides[0].name,), "<= 1.3")]
    return Job("update-memory", title, sides, rows, 1, process="fresh", once=True, unit="bytes")


def lora_memory(mode: Mode) -> Job:
    """PPO with adapters on one trunk against PPO on whole networks."""
    options = {"preset": pick(mode, "30m", "30m", "1m")}
    sides = [Side(kind, "ours.lora_memory:policy_memory", {"kind": kind, **options}) for kind in ("lora", "full")]
    title = "peak bytes of a PPO collection and update"
    rows = [Row("PPO's memory, LoRA against whole networks", "lora", ("full",), "<= 0.4")]
    return Job("lora-memory", title, sides, rows, 1, process="fresh", once=True, unit="bytes")


def saving(mode: Mode) -> Job:
    """How long training waits for a saving."""
    shape = {"size": network(mode), "savings": pick(mode, 5, 3, 2), "every": pick(mode, 4, 3, 2)}
    sides = [
        Side(name, "ours.saving:held", {**shape, "asynchronous": name == "beside"}) for name in ("beside", "between")
    ]
    rows = [Row("saving beside the steps, against between them", "beside", ("between",), ">= 3")]
    return Job("saving", "seconds that training waits for a saving", sides, rows, pick(mode, 3, 1, 1), once=True)


def streaming(mode: Mode) -> Job:
    """Text read, tokenised and packed, beside `datasets`."""
    shape = {"documents": pick(mode, 16_000, 4_000, 160), "batches": pick(mode, 24, 6, 2), "workers": 0}
    shape["vocab_size"] = pick(mode, 8192, 8192, 300)
    sides = [Side(name, "ours.streaming:stream", {**shape, "reader": name}) for name in ("ours", "datasets")]
    rows = [Row("streaming text, datasets", "ours", ("datasets",), ">= 1")]
    return Job("streaming", "a token of a stream", sides, rows, pick(mode, 3, 2, 1))


def jobs(mode: Mode) -> list[Job]:
    """All of them, in the order that they run in."""
    return [*steps(mode), packing(mode), update_memory(mode), lora_memory(mode), saving(mode), streaming(mode)]
