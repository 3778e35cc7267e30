"""A plan as a text table, and as plain data for `--json`."""

from __future__ import annotations

from typing import Any

from lit_palm.plan.dry_run import DryRun
from lit_palm.plan.planning import Plan

__all__ = ["as_record", "as_text"]

GIB = 2**30
PASS_NAMES = {"update": "update", "rollout": "rollout", "annotate": "annotate"}
ORDER = ("weights", "gradients", "optimiser", "value: weights", "value: optimiser", "reference")
LAST = ("optimiser step", "buffers", "KV cache", "logits", "activations")


def as_record(plan: Plan, notes: list[str], dry: DryRun | None = None) -> dict[str, Any]:
    """The plan as plain values: bytes, operations, seconds, dollars."""
    job, speed, device = plan.job, plan.speed, plan.device
    record: dict[str, Any] = {
        "objective": job.objective,
        "device": {"name": device.name, "count": job.devices, "memory": device.memory, "usable": device.usable},
        "strategy": {
            "kind": job.sharding.kind,
            "data_parallel": job.sharding.data,
            "tensor_parallel": job.sharding.tensor,
            "shard": job.sharding.shard,
        },
        "precision": job.precision.name,
        "batch": {"rows": job.rows, "length": job.length, "accumulate": job.accumulate, "tokens": job.tokens_per_step},
        "parameters": {**plan.parameters, "total": sum(plan.parameters.values())},
        "trained_parameters": sum(shape.parameters for shape in job.trained.values()),
        "memory": {
            name: {
                "peak": round(ledger.peak),
                "by_kind": {k: round(v) for k, v in ledger.at_peak.items() if v >= 1},
                "largest": {k: round(v) for k, v in ledger.largest.items() if v >= 1},
            }
            for name, ledger in plan.passes.items()
        },
        "peak": round(plan.peak),
        "fits": plan.fits,
        "changes": [
            {"change": c.text, "peak": round(c.peak), "fits": c.fits, "together": c.together} for c in plan.changes
        ],
        "communication": {kind: round(size) for kind, size in plan.traffic.items()},
        "utilisation": plan.utilisation,
        "flops_per_token": speed.flops_a_token,
        "executed_flops_per_token": speed.executed_a_token,
        "tokens": speed.tokens,
        "total_flops": speed.total_flops,
        "tokens_per_second": speed.tokens_per_second,
        "model_flops_utilisation": speed.model_utilisation,
        "days": speed.days,
        "device_hours": speed.device_hours,
        "cost": speed.cost,
        "notes": notes,
    }
    if dry is not None:
        record["dry_run"] = {
            "peak": dry.peak,
            "peak_label": dry.peak_label,
            "by_kind": dict(dry.at_peak),
            "communication": dict(dry.traffic),
            "plan_to_dry_run": plan.passes["update"].peak / dry.peak,
        }
    return record


def as_text(plan: Plan, notes: list[str], dry: DryRun | None = None) -> str:
    """The plan for people."""
    blocks = [_head(plan), _parameters(plan), _memory(plan), _verdict(plan), _speed(plan)]
    if dry is not None:
        blocks.append(_dry(plan, dry))
    if notes:
        blocks.append("Assumed\n" + "\n".join(f"  {note}" for note in notes))
    return "\n\n".join(block for block in blocks if block)


def _head(plan: Plan) -> str:
    job, device = plan.job, plan.device
    how = {"none": "one device", "ddp": "DDP", "fsdp1": "FSDP1", "fsdp2": "FSDP2"}[job.sharding.kind]
    parts = [f"{job.objective} on {job.devices} x {device.name}", how, job.precision.name, job.optimizer.name]
    if job.sharding.sharded:
        copies = job.sharding.data // job.sharding.shard
        parts[1] += f" over {job.sharding.shard}" + (f" x {copies} copies" if copies > 1 else "")
    if job.sharding.tensor > 1:
        parts[1] += f" x {job.sharding.tensor} tensor parallel"
    batch = f"{job.rows} rows x {job.length} tokens a device"
    batch += f" x {job.accumulate} accumulated" if job.accumulate > 1 else ""
    lines = [", ".join(parts), f"a step: {batch}, {job.tokens_per_step:,} tokens over all devices"]
    c = job.collection
    if c is not None:
        lines.append(
            f"a collection: {c.num_prompts} prompts x {c.completions} completions of {c.prompt_length} + "
            f"{c.new_tokens} tokens, {c.passes} passes in minibatches of {c.minibatch}"
        )
    return "\n".join(lines)


def _parameters(plan: Plan) -> str:
    rows = [[name, f"{number:,}", _trained(plan, name)] for name, number in plan.parameters.items()]
    rows.append(["total", f"{sum(plan.parameters.values()):,}", ""])
    return "Parameters\n" + _table(rows, "lrl")


def _trained(plan: Plan, name: str) -> str:
    return "trained" if name in plan.job.trained else "frozen"


def _memory(plan: Plan) -> str:
    kinds = {kind for ledger in plan.passes.values() for kind in ledger.at_peak}
    middle = sorted(kinds - set(ORDER) - set(LAST))
    rows = [["", *plan.passes]]
    for kind in (*[k for k in ORDER if k in kinds], *middle, *[k for k in LAST if k in kinds]):
        rows.append([kind, *(_gib(ledger.at_peak.get(kind, 0)) for ledger in plan.passes.values())])
    rows.append(["peak", *(_gib(ledger.peak) for ledger in plan.passes.values())])
    table = "Memory of a device at the peak of each pass, GiB\n" + _table(rows, "l" + "r" * len(plan.passes))
    cache = max(ledger.largest.get("KV cache", 0) for ledger in plan.passes.values())
    if cache and "KV cache" not in kinds:
        table += f"\n  (the KV cache, up to {_gib(cache)}, is not alive at these moments)"
    return table


def _verdict(plan: Plan) -> str:
    usable, peak = plan.device.usable, plan.peak
    share = f"{_gib(peak)} of {_gib(usable)} GiB, {peak / usable:.0%}"
    if plan.fits:
        return f"It fits: {share}."
    lines = [f"It does not fit: {share}, in the {plan.worst}. What helps, each alone:"]
    alone = [c for c in plan.changes if not c.together]
    lines += [f"  {_gib(c.peak):>9} GiB  {'fits ' if c.fits else '     '} {c.text}" for c in alone]
    for change in plan.changes:
        if change.together:
            word = "fits" if change.fits else "still does not fit"
            lines.append(f"Together ({_gib(change.peak)} GiB, {word}):")
            lines += [f"  - {text}" for text in change.text.split("; ")]
    if not alone:
        lines.append("  nothing that lit_palm offers: use larger devices")
    return "\n".join(lines)


def _speed(plan: Plan) -> str:
    speed, job = plan.speed, plan.job
    rows = [
        ["operations a token", f"{speed.flops_a_token:.3g}", f"{speed.executed_a_token:.3g} with recomputation"],
        ["tokens a second", f"{speed.tokens_per_second:,.0f}", f"at {plan.utilisation:.0%} of the peak"],
        ["model FLOPs utilisation", f"{speed.model_utilisation:.1%}", ""],
        ["seconds a " + ("collection" if job.collection else "step"), f"{speed.seconds_per_step:,.1f}", ""],
    ]
    if speed.decode_seconds:
        rows.append(["  of them reading weights", f"{speed.decode_seconds:,.1f}", "one token a row at a time"])
    if plan.traffic:
        total = sum(plan.traffic.values())
        kinds = ", ".join(f"{kind.replace('_', '-')} {_gib(size)}" for kind, size in plan.traffic.items())
        rows.append(["communicated a step, GiB", _gib(total), kinds])
        rows.append(["  at full speed, seconds", f"{speed.communication_seconds:,.1f}", "hidden where it overlaps"])
    if speed.tokens is not None:
        assert speed.total_flops is not None and speed.days is not None and speed.device_hours is not None
        rows.append(["tokens in all", f"{speed.tokens:.4g}", ""])
        rows.append(["operations in all", f"{speed.total_flops:.3g}", ""])
        rows.append(["days", f"{speed.days:,.1f}", ""])
        rows.append(["device-hours", f"{speed.device_hours:,.0f}", ""])
        rows.append(["cost, USD", f"{speed.cost or 0:,.0f}", f"at {plan.device.price} an hour"])
    else:
        rows.append(["tokens in all", "open", "say --tokens, or trainer.max_steps, for days and cost"])
    return "Speed and cost\n" + _table(rows, "lrl")


def _dry(plan: Plan, dry: DryRun) -> str:
    rows = [["", "dry run", "plan", "plan / dry run"]]
    planned = plan.passes["update"].peak
    rows.append(["peak of the update, GiB", _gib(dry.peak), _gib(planned), f"{planned / dry.peak:.3f}"])
    for kind in sorted({*dry.traffic, *plan.traffic}):
        there, here = dry.traffic.get(kind, 0), plan.traffic.get(kind, 0)
        ratio = f"{here / there:.3f}" if there and here else "-"
        rows.append([f"{kind.replace('_', '-')}, GiB", _gib(there), _gib(here), ratio])
    return f"Dry run of one rank of {plan.job.devices}\n" + _table(rows, "lrrr")


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size >= GIB / 100 or size == 0 else f"{size / GIB:.4f}"


def _table(rows: list[list[str]], align: str) -> str:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(align))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if a == "r" else c.ljust(w) for c, w, a in zip(row, widths, align, strict=False)]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)
