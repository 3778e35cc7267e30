"""One rank of N, traced on fake tensors, against the formulas: memory and traffic."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lit_palm import modules
from lit_palm.models.palm import PaLMConfig
from lit_palm.modules import LitLanguageModel
from lit_palm.plan.dry_run import DryRun, dry_run
from lit_palm.plan.job import Collection, Job, NetworkShape, Sharding
from lit_palm.plan.optimizers import optimizer_cost
from lit_palm.plan.passes import rollout, update
from lit_palm.plan.reading import PRECISIONS
from lit_palm.plan.speed import traffic
from tests import support

ROWS, LENGTH = 4, 128
ALONE, DDP, FSDP = Sharding(), Sharding("ddp", 4, 1, 1), Sharding("fsdp2", 8, 1, 8)


def job_of(kind: str, config: PaLMConfig, precision: str, sharding: Sharding, **changes: Any) -> tuple[Any, Job]:
    """A module without networks and its numbers."""
    network, scalar = NetworkShape(config), NetworkShape(config, scalar=True)
    trained, frozen, collection, targets = {"policy": network}, {}, None, ROWS * (LENGTH - 1)
    module: Any
    if kind == "lm":
        module = support.language_model(network=config)
    elif kind == "reward":
        module, trained = support.reward_model(network=config), {"reward": scalar}
    elif kind == "dpo":
        module, frozen = support.preference_policy(network=config), {"reference": network}
    else:
        module, frozen = support.policy(network=config), {"reference": network}
        trained["value"] = scalar
        collection = Collection(64, 1, LENGTH // 2, LENGTH // 2, 64, 64, 2, 32)
        targets = ROWS * LENGTH // 2
    numbers = PRECISIONS[precision]
    job = Job(
        kind=module.kind,
        objective=type(module.objective).__name__,
        needs=frozenset(module.objective.needs),
        trained=trained,
        frozen=frozen,
        rows=ROWS,
        length=LENGTH,
        targets=targets,
        precision=numbers,
        optimizer=optimizer_cost(module.optimizer, numbers.weight),
        sharding=sharding,
        devices=sharding.data,
        collection=collection,
    )
    return module, dataclasses.replace(job, **changes)


def traced(module: Any, job: Job) -> DryRun:
    """The dry run of a module that shards as the job says."""
    dtype: Any = "auto" if job.sharding.casts else "float32"
    module.sharding = modules.Sharding(param_dtype=dtype, reshard_after_forward=job.sharding.reshard)
    return dry_run(module, job)


def compare(module: Any, job: Job) -> tuple[float, dict[str, float]]:
    """The plan's peak over the dry run's, and the same of the bytes of every collective."""
    dry = traced(module, job)
    planned = traffic(job)
    large = {kind: size for kind, size in dry.traffic.items() if size > 1000}  # not the norm's few numbers
    assert large.keys() == planned.keys()
    return update(job).peak / dry.peak, {kind: planned[kind] / size for kind, size in large.items()}


def tall(**changes: Any) -> PaLMConfig:
    fields = {"vocab_size": 2000, "d_model": 256, "num_layers": 4, "num_heads": 4, "head_dim": 64, "max_length": LENGTH}
    return PaLMConfig(**{**fields, **changes})


@pytest.mark.parametrize("kind", ["lm", "reward", "dpo", "ppo"])
@pytest.mark.parametrize("recompute, precision", [(False, "32-true"), (True, "bf16-mixed"), (True, "bf16-true")])
def test_sharded(kind: str, recompute: bool, precision: str) -> None:
    module, job = job_of(kind, tall(activation_checkpointing=recompute), precision, FSDP)
    memory, bytes_sent = compare(module, job)
    assert memory == pytest.approx(1, abs=0.15)
    assert bytes_sent == pytest.approx(dict.fromkeys(("all_gather", "reduce_scatter"), 1), abs=0.02)


@pytest.mark.parametrize("kind", ["lm", "ppo"])
def test_one_device_and_copies(kind: str) -> None:
    assert compare(*job_of(kind, tall(), "32-true", ALONE)) == (pytest.approx(1, abs=0.15), {})
    memory, bytes_sent = compare(*job_of(kind, tall(), "bf16-mixed", DDP))
    assert memory == pytest.approx(1, abs=0.15) and bytes_sent == pytest.approx({"all_reduce": 1}, abs=0.02)


@pytest.mark.parametrize("sharding", [ALONE, FSDP])
def test_accumulated_masked_with_a_large_vocabulary(sharding: Sharding) -> None:
    config = tall(vocab_size=50000, d_model=64)  # more targets than logits fit in one chunk
    memory, bytes_sent = compare(*job_of("lm", config, "32-true", sharding, accumulate=2, masked=True))
    assert memory == pytest.approx(1, abs=0.15)
    assert all(ratio == pytest.approx(1, abs=0.02) for ratio in bytes_sent.values())


@pytest.mark.parametrize("kind", ["lm", "dpo", "ppo"])
@pytest.mark.parametrize("recompute", [False, True])
def test_weights_gathered_in_bfloat16(kind: str, recompute: bool) -> None:
    sharding = dataclasses.replace(FSDP, casts=True, frozen="sharded")
    module, job = job_of(kind, tall(activation_checkpointing=recompute), "bf16-mixed", sharding, kernels="host")
    job = dataclasses.replace(job, precision=dataclasses.replace(job.precision, residual=2))
    dry = traced(module, job)
    assert update(job).peak / dry.peak == pytest.approx(1, abs=0.15)
    assert traffic(job)["reduce_scatter"] == pytest.approx(dry.traffic["reduce_scatter"], rel=0.02)
    assert traffic(job)["all_gather"] == pytest.approx(dry.traffic["all_gather"], rel=0.02)


def test_weights_kept_between_forward_and_backward() -> None:
    sharding = dataclasses.replace(FSDP, casts=True, reshard=False)
    module, job = job_of("lm", tall(), "bf16-mixed", sharding, kernels="host")
    job = dataclasses.replace(job, precision=dataclasses.replace(job.precision, residual=2))
    memory, bytes_sent = compare(module, job)
    assert memory == pytest.approx(1, abs=0.15)
    assert all(ratio == pytest.approx(1, abs=0.02) for ratio in bytes_sent.values())


def test_the_cache_of_a_collection() -> None:
    _, job = job_of("ppo", tall(), "32-true", ALONE)
    # 64 rows, 128 slots, keys and values of 4 layers, one head of 64, 4 bytes each
    assert rollout(job).live["KV cache"] == 64 * LENGTH * 2 * 4 * 64 * 4


def test_a_rank_holds_its_part() -> None:
    module, job = job_of("ppo", tall(), "32-true", FSDP)
    dry = dry_run(module, job)
    assert dry.parameters == pytest.approx({name: job.share(shape) for name, shape in job.trained.items()}, rel=0.01)
    with pytest.raises(ValueError, match="ModelParallelStrategy"):
        dry_run(module, dataclasses.replace(job, sharding=Sharding("fsdp1", 8, 1, 8)))


def preset(name: str, ranks: int) -> tuple[Any, Job]:
    config = PaLMConfig.preset(name, activation_checkpointing=True)
    module, job = job_of("lm", config, "bf16-true", Sharding("fsdp2", ranks, 1, ranks))
    assert isinstance(module, LitLanguageModel)
    return module, dataclasses.replace(job, rows=1, length=2048, targets=2047)


def test_8b_on_64_ranks() -> None:
    memory, bytes_sent = compare(*preset("8b", 64))
    assert memory == pytest.approx(1, abs=0.15)
    assert bytes_sent == pytest.approx(dict.fromkeys(("all_gather", "reduce_scatter"), 1), abs=0.02)


@pytest.mark.slow
def test_540b_on_1024_ranks() -> None:
    memory, bytes_sent = compare(*preset("540b", 1024))
    assert memory == pytest.approx(1, abs=0.15)
    assert bytes_sent == pytest.approx(dict.fromkeys(("all_gather", "reduce_scatter"), 1), abs=0.02)
