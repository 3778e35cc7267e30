"""Alignment: DPO and GRPO beside TRL, PPO beside palm-rlhf-pytorch, and DPO's memory."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.job import Job, Row, Side
from tests.benchmarks.jobs.sizes import Mode, network, pick

LABELS = {"32-true": "float32", "bf16-mixed": "bf16-mixed"}


def beside_trl(kind: str, shape: dict[str, Any], **changes: Any) -> list[Side]:
    """Both sides of one shape."""
    options = {**shape, **changes}
    return [Side("ours", f"ours.alignment:{kind}", options), Side("TRL", f"peers.trl:{kind}", options)]


def dpo(mode: Mode) -> list[Job]:
    """16 pairs of 256 + 256 tokens, of which the answers share 32."""
    repeats = pick(mode, 5, 2, 1)
    shape = {
        "size": network(mode),
        "pairs": pick(mode, 16, 2, 2),
        "prompt": pick(mode, 32, 32, 4),
        "answer": pick(mode, 224, 224, 6),
        "batches": repeats + 2,
    }
    length = shape["prompt"] + shape["answer"]
    jobs = []
    for precision, bound in (("32-true", ">= 1.2"), ("bf16-mixed", ">= 2")):
        label = LABELS[precision]
        pairs = pick(mode, 16, 8 if precision == "bf16-mixed" else 2, 2)
        title = f"a DPO step on {pairs} pairs of {length} + {length} tokens"
        sides = beside_trl("dpo", {**shape, "pairs": pairs}, precision=precision)
        rows = [Row(f"DPO step {label}, TRL", "ours", ("TRL",), bound)]
        jobs.append(Job(f"dpo-{label}", f"{title}, {label}", sides, rows, repeats, process=label))
    title = f"a DPO step on {shape['pairs']} pairs of {length} + {length} tokens"
    sides = beside_trl("dpo", shape, precision="32-true", precomputed=True)
    # what a user of TRL's defaults gains by it too: its step as it comes, in the same rounds
    plain = Side("TRL, reference in each step", "peers.trl:dpo", {**shape, "precision": "32-true"})
    name = "DPO step float32, reference precomputed"
    rows = [
        Row(f"{name} by us alone, TRL", "ours", (plain.name,), ">= 1.4"),
        Row(f"{name} by both, TRL", "ours", ("TRL",), ">= 1.4"),
    ]
    jobs.append(
        Job(
            "dpo-precomputed",
            f"{title}, float32, reference precomputed",
            [plain, *sides],
            rows,
            repeats,
            process="float32",
        )
    )
    # a prompt that is half of each row is encoded once for both answers
    shared = {**shape, "prompt": length // 2, "answer": length // 2}
    sides = beside_trl("dpo", shared, precision="32-true")
    rows = [Row("DPO step float32, half of the tokens shared, TRL", "ours", ("TRL",), ">= 1.2")]
    jobs.append(
        Job("dpo-shared", f"{title}, float32, prompts of {length // 2}", sides, rows, repeats, process="float32")
    )
    return jobs


def grpo(mode: Mode) -> list[Job]:
    """8 prompts of 32 tokens, 4 completions of 64 of each."""
    repeats = pick(mode, 5, 2, 1)
    shape = {
        "size": network(mode),
        "prompts": pick(mode, 8, 2, 2),
        "completions": pick(mode, 4, 4, 2),
        "prompt": pick(mode, 32, 32, 4),
        "answer": pick(mode, 64, 64, 6),
        "batches": repeats + 2,
    }
    jobs = []
    for precision, bound in (("32-true", ">= 1.25"), ("bf16-mixed", ">= 2.5")):
        label = LABELS[precision]
        title = f"a GRPO iteration, {shape['prompts']} prompts x {shape['completions']} completions, {label}"
        sides = beside_trl("grpo", shape, precision=precision)
        rows = [Row(f"GRPO iteration {label}, TRL", "ours", ("TRL",), bound)]
        jobs.append(Job(f"grpo-{label}", title, sides, rows, repeats, process=label))
    return jobs


def ppo(mode: Mode) -> list[Job]:
    """64 prompts of 64 tokens, 64 new ones, 4 passes in minibatches of 16; all weights, and LoRA.

    LoRA of rank 8 beside the projections of attention is what the peer's trainer does when nobody says otherwise. Ours
    has fused them with the feed-forward's, so that it trains more.
    """
    shape = {
        "size": network(mode),
        # all of it is linear in the number of prompts, save that our batch is the smaller
        "prompts": pick(mode, 64, 8, 4),
        "prompt": pick(mode, 64, 64, 6),
        "new": pick(mode, 64, 64, 4),
        "passes": pick(mode, 4, 4, 2),
        "minibatch": pick(mode, 16, 4, 2),
    }
    name, half = "palm-rlhf-pytorch", "ours in bf16-mixed"
    title = f"a PPO iteration, {shape['prompts']} prompts x {shape['new']} tokens, {shape['passes']} passes"
    jobs = []
    for label, rank in (("all weights", 0), ("LoRA", 8)):
        at = {**shape, "rank": rank}
        sides = [
            Side("ours", "ours.ppo:ppo", at),
            Side(half, "ours.ppo:ppo", {**at, "precision": "bf16-mixed"}),
            Side(name, "peers.ppo:ppo", {**at, "sampled": pick(mode, 64, 4, 2)}),
        ]
        rows = [
            Row(f"PPO iteration float32, {label}, {name}", "ours", (name,), ">= 20"),
            Row(f"PPO iteration, {label}, {half}, {name} in float32", half, (name,), ">= 20", "bf16"),
        ]
        job = "ppo" if not rank else "ppo-lora"
        jobs.append(Job(job, f"{title}, {label}", sides, rows, 1, process="fresh", once=True, same="steps"))
    return jobs


def dpo_memory(mode: Mode) -> Job:
    """A vocabulary that dwarfs a small network."""
    tokens, ids = pick(mode, (2048, 131_072), (512, 131_072), (24, 512))
    body = {"d_model": 256, "num_layers": 2, "num_heads": 4} if mode != "short" else {}
    shape = {
        "size": network(mode, vocab_size=ids, **body),
        "pairs": 1,
        "prompt": tokens // 8,
        "answer": tokens - tokens // 8,
        "batches": 3,
        "precision": "32-true",
    }
    sides = [
        Side("ours", "ours.alignment:dpo_memory", shape),
        Side("TRL", "peers.trl:dpo_memory", shape),
    ]
    rows = [Row(f"memory of a DPO step, {ids} ids, {tokens} tokens, TRL", "ours", ("TRL",), "<= 0.5")]
    title = f"peak bytes of two DPO steps on a pair of {tokens} + {tokens} tokens, {ids} ids"
    return Job("dpo-memory", title, sides, rows, 1, process="fresh", once=True, unit="bytes")


def jobs(mode: Mode) -> list[Job]:
    """All of them, in the order that they run in."""
    return [*dpo(mode), *grpo(mode), *ppo(mode), dpo_memory(mode)]
