"""The plan of a job on a device: peak of every pass, whether it fits, what to change if not, speed and cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from lit_palm.plan.devices import Device
from lit_palm.plan.job import Job, NetworkShape
from lit_palm.plan.ledger import Ledger
from lit_palm.plan.passes import annotate, rollout, update
from lit_palm.plan.speed import Speed, speed_of, traffic

__all__ = ["Change", "Plan", "make_plan", "passes_of"]


@dataclass(frozen=True)
class Change:
    """Something to change, with the peak that it leads to; `together` with all changes listed before it."""

    text: str
    peak: float
    fits: bool
    together: bool = False


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts; bytes are those of one device."""

    job: Job
    device: Device
    utilisation: float
    passes: Mapping[str, Ledger]
    speed: Speed
    traffic: Mapping[str, float]
    changes: list[Change] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters by network, frozen ones too."""
        return {name: shape.parameters for name, shape in {**self.job.trained, **self.job.frozen}.items()}

    @property
    def worst(self) -> str:
        """The pass with the highest peak."""
        return max(self.passes, key=lambda name: self.passes[name].peak)

    @property
    def peak(self) -> float:
        """Bytes at the highest peak."""
        return self.passes[self.worst].peak

    @property
    def fits(self) -> bool:
        """Whether the peak is within what a run can have of the device."""
        return self.peak <= self.device.usable


def passes_of(job: Job) -> dict[str, Ledger]:
    """The passes that a job makes."""
    found = {"update": update(job)}
    if job.collection is not None:
        found |= {"rollout": rollout(job), "annotate": annotate(job)}
    return found


def make_plan(job: Job, device: Device, utilisation: float = 0.4, tokens: float | None = None) -> Plan:
    """Plan a job; where it does not fit, try changes one by one and then together, each by planning again."""
    job = dataclasses.replace(job, usable=float(device.usable))
    plan = Plan(job, device, utilisation, passes_of(job), speed_of(job, device, utilisation, tokens), traffic(job))
    if not plan.fits:
        plan.changes.extend(_advice(job, device))
    return plan


def _peak(job: Job) -> float:
    return max(ledger.peak for ledger in passes_of(job).values())


def _advice(job: Job, device: Device) -> Iterator[Change]:
    start = _peak(job)
    helpful = []
    for text, change in _candidates(job):
        changed = change(job)
        if changed is None:
            continue
        peak = _peak(changed)
        if peak < 0.98 * start:
            helpful.append((text, change))
            yield Change(text, peak, peak <= device.usable)
    sofar, kept = job, []
    for text, change in helpful:
        changed = change(sofar)
        if changed is None or _peak(changed) >= 0.98 * _peak(sofar):
            continue
        sofar = changed
        kept.append(text)
        if _peak(sofar) <= device.usable:
            break
    if len(kept) > 1:
        peak = _peak(sofar)
        yield Change("; ".join(kept), peak, peak <= device.usable, together=True)


Candidate = tuple[str, Callable[[Job], Job | None]]


def _candidates(job: Job) -> Iterator[Candidate]:
    """Changes from the cheapest to the dearest; each gives None where it does not apply."""
    yield "activation checkpointing (activation_checkpointing: true in the network, or in model.overrides)", _recompute
    rows = job.rows
    where = "data.batch_size" if job.collection is None else "rollout.minibatch_size"
    while rows > 1 and rows % 2 == 0:
        rows //= 2
        factor = job.rows // rows
        size = rows if job.collection is None else job.collection.minibatch // factor
        text = f"a smaller batch: {where} {size} with trainer.accumulate_grad_batches {job.accumulate * factor}"
        yield text, _split(rows)
    if job.devices > 1:
        yield f"shard over the {job.devices} devices (ModelParallelStrategy)", _shard(job.devices)
    yield "mixed precision (trainer.precision bf16-mixed)", _precision("bf16-mixed")
    yield (
        "16-bit weights and optimiser state (trainer.precision bf16-true), which costs accuracy",
        _precision("bf16-true"),
    )
    if job.collection is not None:
        yield "fewer rows at once: rollout.batch_size and the engine's max_batch_size", _fewer_rows
    if job.sharding.sharded or job.devices > 1:
        yield "frozen networks sharded too (model.sharding.frozen: sharded)", _frozen("sharded")
    if job.collection is not None:
        yield "weights gathered layer by layer while sampling (model.sharding.gather: layers)", _layerwise
        yield "frozen networks on the host between uses (model.sharding.frozen: offloaded)", _frozen("offloaded")
    yield "weights and optimiser state on the host (model.sharding.offload: true), which is slow", _offload
    for factor in (2, 4, 8, 16, 64):
        yield f"{factor} times the devices, {job.devices * factor}, sharded", _shard(job.devices * factor)


def _shapes(job: Job, change: Callable[[NetworkShape], NetworkShape]) -> Job:
    return dataclasses.replace(job, trained={name: change(shape) for name, shape in job.trained.items()})


def _recompute(job: Job) -> Job | None:
    if all(shape.config.activation_checkpointing for shape in job.trained.values()):
        return None

    def change(shape: NetworkShape) -> NetworkShape:
        return dataclasses.replace(shape, config=dataclasses.replace(shape.config, activation_checkpointing=True))

    return _shapes(job, change)


def _split(rows: int) -> Callable[[Job], Job | None]:
    def change(job: Job) -> Job | None:
        if job.rows <= rows:
            return None
        factor = job.rows // rows
        changes = {"rows": rows, "targets": job.targets // factor, "accumulate": job.accumulate * factor}
        if job.collection is not None:
            collection = dataclasses.replace(job.collection, minibatch=job.collection.minibatch // factor)
            return dataclasses.replace(job, collection=collection, **changes)  # type: ignore[arg-type]
        return dataclasses.replace(job, **changes)  # type: ignore[arg-type]

    return change


def _shard(devices: int) -> Callable[[Job], Job | None]:
    def change(job: Job) -> Job | None:
        if job.sharding.sharded and job.sharding.data >= devices:
            return None
        tensor = job.sharding.tensor
        data = devices // tensor
        if job.collection is not None and (job.collection.num_prompts % data or job.collection.minibatch % data):
            return None
        sharding = dataclasses.replace(job.sharding, kind="fsdp2", data=data, shard=data)
        rows = job.rows if job.collection is None else job.collection.minibatch // data
        targets = job.targets // job.rows * rows
        return dataclasses.replace(job, sharding=sharding, devices=devices, rows=rows, targets=targets)

    return change


def _precision(name: str) -> Callable[[Job], Job | None]:
    def change(job: Job) -> Job | None:
        from lit_palm.plan.reading import PRECISIONS

        new, old = PRECISIONS[name], job.precision
        if (new.weight, new.compute) >= (old.weight, old.compute):
            return None
        state = job.optimizer.state * (new.weight / old.weight if job.optimizer.name != "Adafactor" else 1)
        return dataclasses.replace(job, precision=new, optimizer=dataclasses.replace(job.optimizer, state=state))

    return change


def _fewer_rows(job: Job) -> Job | None:
    if job.collection is None:
        return None
    rows = max(1, min(job.collection.batch_size, job.collection.rows // job.sharding.data) // 4)
    collection = dataclasses.replace(
        job.collection, batch_size=rows, reward_batch=min(rows, job.collection.reward_batch), engine_batch=rows
    )
    return dataclasses.replace(job, collection=collection)


def _with(job: Job, **changes: object) -> Job:
    return dataclasses.replace(job, sharding=dataclasses.replace(job.sharding, **changes))  # type: ignore[arg-type]


def _options_exist() -> bool:
    """Whether the modules take `model.sharding`; what does not exist is not advised."""
    import inspect

    from lit_palm.modules.policy import LitPolicy

    return "sharding" in inspect.signature(LitPolicy.__init__).parameters


def _frozen(how: str) -> Callable[[Job], Job | None]:
    def change(job: Job) -> Job | None:
        usable = job.sharding.sharded and job.frozen and job.sharding.frozen != how and _options_exist()
        return _with(job, frozen=how) if usable else None

    return change


def _layerwise(job: Job) -> Job | None:
    usable = job.sharding.sharded and job.sharding.gather != "layers" and _options_exist()
    return _with(job, gather="layers") if usable else None


def _offload(job: Job) -> Job | None:
    usable = job.sharding.sharded and not job.sharding.offload and _options_exist()
    return _with(job, offload=True) if usable else None
