"""One rank of N, traced without hardware: the real networks, loss, optimiser and sharding on fake tensors.

A fake process group stands for the other ranks and fake tensors for memory, on a mesh of type "cpu" whatever the device
that is planned for. What is traced is an optimiser step as the modules take it, in steady state (there are optimiser
state and the gradients of the step before), with a loss that the objective really computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_palm.models import kernels
from lit_palm.models.base import ScalarNetwork
from lit_palm.plan.job import Job, NetworkShape
from lit_palm.plan.tracker import Tracker
from lit_palm.types import Experience, Output

if TYPE_CHECKING:
    from lit_palm.modules.host import LitModule

__all__ = ["DryRun", "dry_run"]


@dataclass(frozen=True)
class DryRun:
    """What a rank holds at its peak and what it communicates in an optimiser step, in bytes."""

    peak: int
    at_peak: Mapping[str, int]
    """By what was going on when it was allocated."""
    peak_label: str
    peaks: Mapping[str, int]
    traffic: Mapping[str, int]
    parameters: Mapping[str, int]
    """Parameters that this rank holds, by network."""


def spread(network: nn.Module, mesh: Any, module: LitModule, job: Job) -> None:
    """Shard a network over a mesh as the modules do."""
    from lit_palm.modules.sharding import fsdp_options
    from lit_palm.parallel.sharded import shard

    precision = "bf16-mixed" if job.precision.autocast else "32-true"
    shard(network, **fsdp_options(mesh, module.sharding, precision))


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """A process group of which this process is rank 0 and nobody else exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("a dry run makes a process group of its own: run it in a process without one")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def dry_run(module: LitModule, job: Job) -> DryRun:
    """Trace an optimiser step of a rank.

    Args:
        module: as the configuration makes it, without networks.
        job: its sizes.

    Raises:
        ValueError: the strategy is none that can be traced.
    """
    if job.sharding.kind == "fsdp1" or job.sharding.tensor > 1:
        raise ValueError("--dry-run traces one device, DDP and FSDP2 (ModelParallelStrategy): choose one of these")
    if job.sharding.offload or (job.sharding.sharded and job.sharding.shard != job.sharding.data):
        raise ValueError("--dry-run traces neither offload nor shard_size of model.sharding: leave them out")
    with fake_ranks(job.sharding.data), _kernels_of(job):
        return _Tracing(module, job).run()


@contextmanager
def _kernels_of(job: Job) -> Iterator[None]:
    """Fake tensors are on a "cpu"; for other devices SwiGLU's backward pass shall not go by pieces, and nothing of the
    process's random numbers is used up."""
    state, piece = torch.get_rng_state(), kernels.PIECE
    kernels.PIECE = piece if job.kernels == "host" else 2**62
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
            yield
    finally:
        kernels.PIECE = piece
        torch.set_rng_state(state)


class _Tracing:
    def __init__(self, module: LitModule, job: Job) -> None:
        self.module, self.job = module, job
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker = Tracker(selected=job.targets)

    @contextmanager
    def doing(self, label: str) -> Iterator[None]:
        with self.fake, self.tracker, self.tracker.doing(label):
            yield

    def run(self) -> DryRun:
        job, module = self.job, self.module
        from lit_palm.modules.spread import Networks  # which imports Lightning

        mesh = None
        if job.sharding.sharded:
            from torch.distributed.device_mesh import init_device_mesh

            mesh = init_device_mesh(_here(), (job.sharding.data,))
        with self.doing("weights"):
            module.networks = Networks({name: self.build(shape) for name, shape in job.trained.items()})
            if mesh is not None:
                for network in module.networks.values():
                    spread(network, mesh, module, job)
        frozen = {}
        for name, shape in job.frozen.items():
            with self.doing(name):
                frozen[name] = self.build(shape).requires_grad_(False).eval()
                if mesh is not None and job.sharding.frozen == "sharded":
                    spread(frozen[name], mesh, module, job)
        if frozen:
            module.frozen = frozen  # type: ignore[assignment]
        with self.doing("optimiser"):
            optimizer = module.optimizer(list(module.parameter_groups()))
            buckets = [torch.empty_like(p) for p in module.networks.parameters()] if job.sharding.kind == "ddp" else []
        self.first_step(optimizer)
        tracker = self.tracker
        tracker.peak = 0
        tracker.peaks.clear()
        module.networks.train()
        self.step(optimizer, buckets)
        local = {
            name: sum(_local(p).numel() for p in network.parameters()) for name, network in module.networks.items()
        }
        return DryRun(
            peak=tracker.peak,
            at_peak={k: v for k, v in tracker.at_peak.items() if v > 0},
            peak_label=tracker.peak_label,
            peaks=dict(tracker.peaks),
            traffic=dict(tracker.traffic),
            parameters=local,
        )

    def build(self, shape: NetworkShape) -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype({2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.job.precision.weight])
        try:
            network: nn.Module = shape.config.build()
            return ScalarNetwork(network) if shape.scalar else network  # type: ignore[arg-type]
        finally:
            torch.set_default_dtype(before)

    # ------------------------------------------------------------------ a step

    def first_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What an earlier step leaves behind: gradients and optimiser state."""
        with self.doing("gradients"):
            for parameter in self.module.networks.parameters():
                parameter.grad = torch.empty_like(parameter)
        with self.doing("optimiser"):
            for group in optimizer.param_groups:
                if self.job.kernels == "accelerator" and "foreach" in group and group["foreach"] is None:
                    group["foreach"] = True  # what torch prefers there
            optimizer.step()

    def step(self, optimizer: torch.optim.Optimizer, buckets: list[Tensor]) -> None:
        job, module = self.job, self.module
        for micro in range(job.accumulate):
            batch = self.batch()
            with self.doing("activations"), self.autocast():
                output = _host(module)._output(Experience({k: v for k, v in batch.items() if k in READ_BY_NETWORKS}))
            gradients = self.gradients(output, batch)
            with self.doing("activations"):
                if micro == 0:
                    optimizer.zero_grad()
            with self.doing("backward"):
                torch.autograd.backward(list(gradients), list(gradients.values()))
            del output, gradients
        with self.doing("optimiser"):
            for bucket in buckets:
                dist.all_reduce(bucket)
            parameters = [p for p in module.networks.parameters() if p.grad is not None]
            torch._foreach_mul_([_local(p.grad) for p in parameters if p.grad is not None], 0.5)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()

    def autocast(self) -> Any:
        return torch.autocast(_here(), dtype=torch.bfloat16) if self.job.precision.autocast else nullcontext()

    def batch(self) -> Experience:
        """A real batch of the job's size, small beside the networks: ids, masks and what objectives read."""
        job = self.job
        rows, length = job.rows, job.length
        mask = torch.ones(rows, length, dtype=torch.bool)
        loss_mask = torch.zeros(rows, length, dtype=torch.bool)
        loss_mask[:, length - max(1, job.targets // rows) :] = True
        batch = Experience(tokens=torch.zeros(rows, length, dtype=torch.long), mask=mask, loss_mask=loss_mask)
        if job.masked:
            batch["positions"] = torch.arange(length).expand(rows, length).contiguous()
            batch["documents"] = torch.zeros(rows, length, dtype=torch.long)
        place = torch.arange(rows)
        batch |= {"group": place // 2, "rank": place % 2, "rating": torch.randn(rows), "label": place % 2 == 0}
        if "rollouts" in job.needs:
            names = ("old_logps", "ref_logps", "values")
            noise = {name: torch.where(loss_mask, torch.randn(rows, length), 0) for name in names}
            batch |= {**noise, "row": place, "scores": torch.randn(rows), "ended": torch.ones(rows, dtype=torch.bool)}
            batch["rollout_logps"] = noise["old_logps"]
            batch = self.module.objective.prepare(batch)
        return batch

    def gradients(self, output: Output, batch: Experience) -> dict[Tensor, Tensor]:
        """Of the objective's loss for what the networks gave, computed for real: [B, T] is nothing beside a network."""
        given = {name: value for name, value in vars(output).items() if isinstance(value, Tensor)}
        drawn = {k: torch.randn(v.shape, requires_grad=v.requires_grad) for k, v in given.items()}
        real = Output(**drawn)  # type: ignore[arg-type]
        loss = self.module.loss_of(real, batch).total
        total = loss if isinstance(loss, Tensor) else torch.stack(list(loss.values())).sum()
        total.backward()
        found = {}
        with self.doing("activations"):
            for name, value in given.items():
                if value.requires_grad and getattr(real, name).grad is not None:
                    found[value] = torch.ones_like(value)
        return found


def _here() -> str:
    """The type of device that tensors, and so fake ones, are made on."""
    return torch.get_default_device().type


def _host(module: Any) -> Any:
    """Any of the modules, whose forward pass of a step is `_output`."""
    return module


READ_BY_NETWORKS = ("tokens", "mask", "loss_mask", "positions", "documents")


def _local(tensor: Tensor | None) -> Tensor:
    from torch.distributed.tensor import DTensor

    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
