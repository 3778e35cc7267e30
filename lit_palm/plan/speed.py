"""Operations, tokens a second, days and cost of a run, and the bytes that an optimiser step communicates."""

from __future__ import annotations

from dataclasses import dataclass

from lit_palm.models.flops import forward_flops, training_flops
from lit_palm.plan.devices import Device
from lit_palm.plan.job import Job

__all__ = ["Speed", "speed_of", "step_flops", "throughput", "traffic"]


def throughput(flops_a_token: float, devices: int, peak_flops: float, utilisation: float) -> float:
    """Tokens a second of all devices: devices x peak x utilisation / operations a token."""
    return devices * peak_flops * utilisation / flops_a_token


@dataclass(frozen=True)
class Speed:
    """How fast a run goes and what it takes; per token of what is trained on."""

    flops_a_token: float
    """Useful operations a token: 6N + 12LHQT of each trained network and a forward pass of each frozen one."""
    executed_a_token: float
    """The same with recomputation."""
    tokens_per_second: float
    seconds_per_step: float
    """Of an optimiser step; of a whole collection where there are rollouts."""
    decode_seconds: float
    """Of a collection's decoding, which reads all weights for each token."""
    communication_seconds: float
    """Of an optimiser step's traffic at the full speed of the interconnect; hidden behind computation or not."""
    model_utilisation: float
    tokens: float | None
    total_flops: float | None
    days: float | None
    device_hours: float | None
    cost: float | None


def step_flops(job: Job, recomputed: bool = True) -> float:
    """Operations a token of the training step: forward and backward of the trained networks, the reference for given
    data, and one forward more of networks with activation checkpointing if `recomputed`."""
    total = 0.0
    for shape in job.trained.values():
        again = recomputed and shape.config.activation_checkpointing
        total += training_flops(shape.parameters, shape.attention(job.length), again)
    if "reference" in job.needs and job.collection is None and "reference" in job.frozen:
        shape = job.frozen["reference"]
        total += forward_flops(shape.parameters, shape.attention(job.length))
    return total


def collection_flops(job: Job) -> float:
    """Operations a token of sampling and annotating a collection: a forward pass of each network, two of the policy."""
    if job.collection is None:
        return 0.0
    shapes = [job.trained["policy"], *job.trained.values()]
    shapes += [s for name, s in job.frozen.items() if name != "reference" or "reference" in job.needs]
    return sum(forward_flops(s.parameters, s.attention(job.length)) for s in shapes)


def speed_of(job: Job, device: Device, utilisation: float, tokens: float | None) -> Speed:
    """Speed at a stated utilisation: the share of the peak that the devices compute at, recomputation included.

    Decoding is bound by reading the weights once for every token of all rows: the longer of that and of its
    computation counts.
    """
    peak = device.flops[job.precision.flops_name]
    assert peak is not None, "measure the device first"
    rate = job.devices * peak * utilisation
    passes = job.collection.passes if job.collection else 1
    useful, executed = step_flops(job, False) * passes, step_flops(job) * passes
    extra, decode, per_step = collection_flops(job), 0.0, float(job.tokens_per_step)
    if job.collection is not None:
        per_step = job.collection.rows * job.length
        assert device.bandwidth is not None
        weights = job.whole(job.trained["policy"]) * job.precision.compute
        sampled = job.collection.rows * job.collection.new_tokens
        computed = forward_flops(job.trained["policy"].parameters) * sampled / rate
        decode = max(0.0, job.collection.new_tokens * weights / device.bandwidth - computed)
    seconds = (executed + extra) * per_step / rate + decode
    if tokens is None and job.max_steps > 0:
        steps: float = job.max_steps * job.accumulate
        if job.collection is not None:
            steps /= job.collection.passes * (job.collection.rows // job.collection.minibatch)
            tokens = steps * per_step
        else:
            tokens = job.max_steps * per_step
    speed = per_step / seconds
    days = tokens / speed / 86400 if tokens else None
    hours = days * 24 * job.devices if days is not None else None
    return Speed(
        flops_a_token=useful + extra,
        executed_a_token=executed + extra,
        tokens_per_second=speed,
        seconds_per_step=seconds,
        decode_seconds=decode,
        communication_seconds=sum(traffic(job).values()) / device.interconnect,
        model_utilisation=(useful + extra) * speed / (job.devices * peak),
        tokens=tokens,
        total_flops=(useful + extra) * tokens if tokens else None,
        days=days,
        device_hours=hours,
        cost=hours * device.price if hours is not None else None,
    )


def traffic(job: Job) -> dict[str, float]:
    """Bytes that a device communicates in an optimiser step, by collective: the whole of what is gathered or reduced.

    FSDP2 gathers every unit before its forward and again before its backward pass (blocks once, where they are not
    freed between), and reduces its gradients after it, for each micro-batch; a reference that is sharded is gathered
    for its forward pass. Hybrid sharding then sums shards over the copies. DDP sums all gradients. Tensor parallelism
    sums the output of a block and the gradient of its input.
    """
    found = {"all_gather": 0.0, "reduce_scatter": 0.0, "all_reduce": 0.0}
    sharding, weight = job.sharding, job.precision.weight
    gather = job.precision.compute if sharding.casts else weight
    reduce = max(4, weight) if sharding.casts else weight
    for shape in job.trained.values():
        whole = job.whole(shape)
        if sharding.sharded and sharding.shard > 1:
            twice = whole if sharding.reshard else shape.root
            found["all_gather"] += (whole + twice) * gather * job.accumulate
            found["reduce_scatter"] += whole * reduce * job.accumulate
            if sharding.shard < sharding.data:
                found["all_reduce"] += whole / sharding.shard * reduce * job.accumulate
        elif sharding.kind == "ddp":
            found["all_reduce"] += whole * weight
        if sharding.tensor > 1:
            block = job.rows * job.length * shape.config.d_model * job.precision.compute
            found["all_reduce"] += 2 * shape.config.num_layers * block * job.accumulate
    offline = "reference" in job.needs and job.collection is None and "reference" in job.frozen
    if offline and sharding.sharded and sharding.frozen != "whole" and sharding.shard > 1:
        found["all_gather"] += job.whole(job.frozen["reference"]) * gather * job.accumulate
    return {kind: size for kind, size in found.items() if size}
