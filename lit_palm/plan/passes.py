"""The passes of a run as a sequence of allocations: the training step, decoding, and forward passes for annotation.

Each function walks through what the modules do in that order, block by block, and gives a `Ledger`. The training step
is one of steady state: optimiser state exists, and the gradients of the step before live until Lightning drops them,
between the forward and the backward pass.
"""

from __future__ import annotations

from lit_palm.plan.activations import network_bytes
from lit_palm.plan.job import Job
from lit_palm.plan.ledger import Ledger
from lit_palm.plan.walk import ACTIVATIONS, BUFFERS, CACHE, GRADIENTS, LOGITS, STEP, Walk

__all__ = ["annotate", "rollout", "update"]


def update(job: Job) -> Ledger:
    """A training step: forward of every trained network, of the reference for given data, backward, optimiser."""
    walk = Walk(job)
    ledger = walk.ledger
    gradients = _all_gradients(job)
    ledger.hold(GRADIENTS, gradients)
    for name, shape in job.trained.items():
        walk.forward(name, shape, job.targets)
    if "reference" in job.needs and "rollouts" not in job.needs and "reference" in job.frozen:
        walk.forward_without_grad("reference", job.frozen["reference"], job.rows, job.length, job.targets)
    ledger.free(ACTIVATIONS, walk.cached)
    if job.accumulate == 1:
        ledger.free(GRADIENTS, gradients)
    for name, shape in reversed(list(job.trained.items())):
        walk.backward(name, shape, job.targets)
    walk.finish()
    _optimizer_step(job, ledger)
    return ledger


def _all_gradients(job: Job) -> float:
    """Bytes of the gradients between steps."""
    return 0.0 if job.sharding.offload else sum(map(job.share, job.trained.values())) * job.precision.weight


def _optimizer_step(job: Job, ledger: Ledger) -> None:
    parts = job.sharding.shard if job.sharding.sharded else 1
    if job.sharding.offload:
        return
    if job.kernels == "accelerator" and job.optimizer.step_all:
        group = max(map(job.share, job.trained.values()))  # one parameter group at a time
        ledger.touch(STEP, group * job.precision.weight * job.optimizer.step_all)
    largest = max(shape.largest for shape in job.trained.values())
    ledger.touch(STEP, largest / parts * job.precision.weight * job.optimizer.step_largest)


def rollout(job: Job) -> Ledger:
    """Decoding of a collection: prompts are read in one pass, then every row takes a token a pass.

    The cache holds keys and values of every slot of every row, in the type of the residual's products; while rows are
    chosen (a prompt's completions, finished rows dropped) one layer's is there twice. Drawing a token takes a few
    copies of the logits [rows, V] in float32.
    """
    walk = Walk(job)
    ledger, collection = walk.ledger, job.collection
    assert collection is not None, "a run without rollouts does not decode"
    rows = -(-collection.rows // job.sharding.data)
    rows = min(rows, collection.engine_batch or rows)
    distinct = -(-rows // collection.completions)
    shape = job.trained["policy"]
    slots = collection.prompt_length + collection.new_tokens
    config = shape.config
    _collecting(walk)
    kv_heads = max(1, config.num_kv_heads / job.sharding.tensor)
    layer = 2 * rows * slots * kv_heads * config.head_dim * job.precision.compute
    block = walk.block(shape, distinct, collection.prompt_length)
    common = network_bytes(shape, job.precision, distinct, collection.prompt_length)
    ledger.hold(CACHE, layer * config.num_layers * distinct / rows)
    with ledger.during(ACTIVATIONS, common + 2 * block.residual):
        unit = walk.gathered_size("policy", job.block_part(shape))
        with ledger.during(BUFFERS, walk.gathered_size("policy", shape.root) + 2 * unit):
            ledger.touch(ACTIVATIONS, block.forward)
    ledger.hold(CACHE, layer * config.num_layers * (1 - distinct / rows))
    # choosing rows copies all layers before the old ones go
    if distinct < rows:
        ledger.touch(CACHE, layer * config.num_layers * distinct / rows)
    ledger.touch(CACHE, layer * config.num_layers / 2)
    with ledger.during(BUFFERS, walk.gathered_size("policy", shape.root)):
        ledger.touch(LOGITS, rows * shape.vocab * 4 * 3)
    return ledger


def annotate(job: Job) -> Ledger:
    """Forward passes without gradients over a collection: log-probabilities, reference, values, reward models."""
    walk = Walk(job)
    ledger, collection = walk.ledger, job.collection
    assert collection is not None, "a run without rollouts annotates nothing"
    length = collection.prompt_length + collection.new_tokens
    rows = min(collection.batch_size, -(-collection.rows // job.sharding.data))
    _collecting(walk)
    for name, shape in {**job.trained, **job.frozen}.items():
        targets = 0 if shape.scalar else rows * collection.new_tokens
        count = min(collection.reward_batch, rows) if name.startswith("reward/") else rows
        walk.forward_without_grad(name, shape, count, length, targets)
    return ledger


def _collecting(walk: Walk) -> None:
    """What is on the device all through a collection: gradients of the last step, whole weights, autocast's casts."""
    job, ledger = walk.job, walk.ledger
    ledger.hold(GRADIENTS, _all_gradients(job))
    if not job.sharding.sharded and job.sharding.frozen == "offloaded":
        for name, shape in job.frozen.items():
            ledger.hold(name, job.whole(shape) * job.precision.weight)
    if walk.autocasts:
        ledger.hold(ACTIVATIONS, 2.0 * sum(job.whole(shape) for shape in job.trained.values()))
    if not job.sharding.sharded or job.sharding.gather == "layers":
        return
    names = list(job.trained) if job.sharding.gathers_all else ["policy"]
    if job.sharding.gather == "auto":
        whole = job.whole(job.trained["policy"]) * job.precision.weight
        if 2 * whole > job.usable - ledger.total:
            return
    largest = max(max(job.trained[name].root, job.block_part(job.trained[name])) for name in names)
    ledger.hold(BUFFERS, sum(job.whole(job.trained[name]) for name in names) * walk.gather_bytes)
    ledger.touch(BUFFERS, largest * walk.gather_bytes)
    walk.whole |= set(names)
