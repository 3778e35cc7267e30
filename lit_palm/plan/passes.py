"""The passes of a run as a sequence of allocations: the training step, decoding, and forward passes for annotation.

Each function walks through what the modules do in that order, block by block, and gives a `Ledger`. The training step
is one of steady state: optimiser state exists, and the gradients of the step before live until Lightning drops them,
between the forward and the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lit_palm.plan.activations import Block, Head, block_bytes, head_bytes, network_bytes
from lit_palm.plan.job import Job, NetworkShape
from lit_palm.plan.ledger import Ledger

__all__ = ["PASSES", "annotate", "rollout", "static_bytes", "update"]

ACTIVATIONS, LOGITS, BUFFERS, CACHE = "activations", "logits", "buffers", "KV cache"
GRADIENTS, WEIGHTS, OPTIMISER, STEP = "gradients", "weights", "optimiser", "optimiser step"


def static_bytes(job: Job) -> dict[str, float]:
    """What stays on a device from step to step, without gradients: weights, optimiser state, frozen networks, buckets."""
    found: dict[str, float] = {}
    parked = 0.0 if job.sharding.offload else 1.0
    for name, shape in job.trained.items():
        extra = "" if name != "value" else "value: "
        local = job.share(shape)
        found[f"{extra}{WEIGHTS}"] = local * job.precision.weight * parked
        found[f"{extra}{OPTIMISER}"] = local * job.optimizer.state * parked
        if job.sharding.kind == "ddp":  # the reducer's buckets hold every gradient once more
            found[BUFFERS] = found.get(BUFFERS, 0) + local * job.precision.weight
    for name, shape in job.frozen.items():
        found[name] = frozen_bytes(job, shape)
    return {kind: size for kind, size in found.items() if size}


def frozen_bytes(job: Job, shape: NetworkShape) -> float:
    """Bytes of a frozen network between its uses."""
    if job.sharding.frozen == "offloaded":
        return 0.0
    parts = job.sharding.shard if job.sharding.frozen == "sharded" and job.sharding.sharded else 1
    return job.whole(shape) * job.precision.weight / parts


class _Walk:
    """A ledger with the walks through a network that all passes share."""

    def __init__(self, job: Job) -> None:
        self.job, self.ledger = job, Ledger(static_bytes(job))
        self.autocasts = job.precision.autocast and not (job.sharding.sharded and job.sharding.casts)
        self.gather_bytes = job.precision.compute if job.sharding.casts else job.precision.weight
        self.reduce_bytes = max(job.precision.weight, 4) if job.sharding.casts else job.precision.weight
        self.waiting = 0.0

    def block(self, shape: NetworkShape, rows: int, length: int) -> Block:
        job = self.job
        return block_bytes(
            shape,
            job.precision,
            rows,
            length,
            tensor=job.sharding.tensor,
            masked=job.masked,
            cpu=job.kernels == "cpu",
            casts_weights=self.autocasts,
        )

    def head(self, shape: NetworkShape, tokens: int, targets: int, entropy: bool, grad: bool = False) -> Head:
        return head_bytes(
            shape,
            self.job.precision,
            tokens,
            targets,
            entropy=entropy,
            entropy_grad=grad,
            casts_weights=self.autocasts,
        )

    # ------------------------------------------------------------------ sharded weights

    def sharded(self, name: str) -> bool:
        job = self.job
        return job.sharding.sharded and (name in job.trained or job.sharding.frozen == "sharded")

    @contextmanager
    def gathered(self, name: str, parameters: float) -> Iterator[None]:
        """A unit's whole weights; while they are copied out of the buffer of the all-gather, twice."""
        if not self.sharded(name):
            yield
            return
        size = parameters * self.gather_bytes
        self.ledger.touch(BUFFERS, 2 * size)
        with self.ledger.during(BUFFERS, size):
            yield

    def reduce(self, parameters: float) -> None:
        """A unit's gradients are reduced: the copy into one buffer, which lives until the next unit's is done."""
        size = parameters * self.reduce_bytes
        self.ledger.free(BUFFERS, self.waiting)
        self.ledger.hold(BUFFERS, size)
        self.waiting = size

    # ------------------------------------------------------------------ forward and backward

    def forward_without_grad(self, name: str, shape: NetworkShape, rows: int, length: int, targets: int) -> None:
        """A forward pass that keeps nothing, with the head of log-probabilities if `targets`."""
        ledger, block = self.ledger, self.block(shape, rows, length)
        common = network_bytes(shape, self.job.precision, rows, length, self.job.masked)
        with self.gathered(name, shape.root), ledger.during(ACTIVATIONS, common + block.residual):
            with self.gathered(name, self.job.block_part(shape)):
                ledger.touch(ACTIVATIONS, block.forward + (block.residual if shape.config.num_layers > 1 else 0))
            # the last norm's result beside its input
            with ledger.during(ACTIVATIONS, block.residual):
                if targets:
                    head = self.head(shape, rows * length, targets, entropy=False)
                    cast = 2.0 * shape.embedding if self.autocasts else 0.0
                    ledger.touch(LOGITS, head.saved + head.forward + cast)

    def forward(self, name: str, shape: NetworkShape, targets: int) -> None:
        """A forward pass with gradients: each block leaves what it keeps."""
        job, ledger = self.job, self.ledger
        block = self.block(shape, job.rows, job.length)
        layers, recomputed = shape.config.num_layers, shape.config.activation_checkpointing
        ledger.hold(ACTIVATIONS, network_bytes(shape, job.precision, job.rows, job.length, job.masked) + block.residual)
        with self.gathered(name, shape.root):
            for _ in range(layers):
                with self.gathered(name, job.block_part(shape)):
                    if recomputed:
                        ledger.touch(ACTIVATIONS, block.forward + block.residual)
                        ledger.hold(ACTIVATIONS, block.residual)
                        ledger.hold(ACTIVATIONS, block.cast)  # autocast remembers the casts until the step has run
                    else:
                        ledger.hold(ACTIVATIONS, block.saved)
                        ledger.touch(ACTIVATIONS, block.forward_end)
                        ledger.hold(ACTIVATIONS, block.residual)
            with ledger.during(ACTIVATIONS, block.residual):  # the last norm's result
                self._head_forward(shape, targets)
        if recomputed:
            ledger.free(ACTIVATIONS, block.cast * layers)

    def _head_forward(self, shape: NetworkShape, targets: int) -> None:
        job, ledger = self.job, self.ledger
        if shape.scalar:
            ledger.hold(ACTIVATIONS, job.rows * job.length * shape.config.d_model * job.precision.compute)
            return
        head = self.head(shape, job.rows * job.length, targets, "entropy" in job.needs)
        ledger.hold(LOGITS, head.saved + head.cast)
        ledger.touch(LOGITS, head.forward)

    def backward(self, name: str, shape: NetworkShape, targets: int) -> None:
        """The backward pass: the head, then the blocks from the last to the first, each freeing what it kept."""
        job, ledger = self.job, self.ledger
        block = self.block(shape, job.rows, job.length)
        with self.gathered(name, shape.root):
            self._head_backward(name, shape, targets, block)
            for _ in range(shape.config.num_layers):
                self._block_backward(name, shape, block)
            # the embedding's own gradient, added to the one that came through the logits
            ledger.touch(GRADIENTS, shape.embedding * job.precision.weight)
            ledger.free(ACTIVATIONS, block.residual)
            if self.sharded(name):
                self.reduce(shape.root)
                ledger.free(GRADIENTS, shape.root * job.precision.weight)
                self.keep_gradient(shape.root / job.sharding.shard)
        # the residual of the embedding and what is common to all blocks
        ledger.free(ACTIVATIONS, block.residual)
        ledger.free(ACTIVATIONS, network_bytes(shape, job.precision, job.rows, job.length, job.masked))

    def _head_backward(self, name: str, shape: NetworkShape, targets: int, block: Block) -> None:
        job, ledger = self.job, self.ledger
        weight = shape.root * job.precision.weight
        if shape.scalar:
            ledger.hold(GRADIENTS, weight if self.sharded(name) else 0.0)
            ledger.free(ACTIVATIONS, job.rows * job.length * shape.config.d_model * job.precision.compute)
            self.new_gradient(name, shape.root)
        else:
            head = self.head(shape, job.rows * job.length, targets, True, job.entropy_trained)
            ledger.touch(LOGITS, head.backward + head.hidden_grad)
            self.new_gradient(name, shape.root, float32=True)
            ledger.touch(LOGITS, head.hidden_grad + head.product + head.backward / 2)
            ledger.free(LOGITS, head.saved + head.cast)
        ledger.hold(ACTIVATIONS, block.residual)  # the gradient of the residual

    def _block_backward(self, name: str, shape: NetworkShape, block: Block) -> None:
        job, ledger = self.job, self.ledger
        part = job.block_part(shape)
        with self.gathered(name, part):
            if shape.config.activation_checkpointing:
                ledger.hold(ACTIVATIONS, block.saved)
                ledger.touch(ACTIVATIONS, block.forward_end + block.residual)
            small = block.residual if job.precision.compute != job.precision.residual else 0.0
            # hidden's gradient takes its place; then attention's values make room for the gradients of q, k and v
            ledger.touch(ACTIVATIONS, block.hidden + small)
            ledger.free(ACTIVATIONS, block.attention)
            ledger.touch(ACTIVATIONS, block.fused_grad + block.qkv_grad)
            ledger.hold(ACTIVATIONS, block.attention)
            self.new_gradient(name, part)
            ledger.touch(ACTIVATIONS, block.fused_grad + block.residual - block.saved)
            ledger.free(ACTIVATIONS, block.saved + block.residual)
            if self.sharded(name):
                self.reduce(part)
                ledger.free(GRADIENTS, part * job.precision.weight)
                self.keep_gradient(part / job.sharding.shard)

    def new_gradient(self, name: str, parameters: float, float32: bool = False) -> None:
        """A unit's gradient: kept where it is the first micro-batch's, else added to what is there and dropped."""
        size = parameters * self.job.precision.weight
        if self.sharded(name):
            self.ledger.hold(GRADIENTS, size)
        elif self.job.accumulate == 1:
            self.ledger.hold(GRADIENTS, size)
        else:
            self.ledger.touch(GRADIENTS, size)

    def keep_gradient(self, parameters: float) -> None:
        """A sharded unit's reduced gradient."""
        size = parameters * self.job.precision.weight
        if self.job.accumulate == 1 and not self.job.sharding.offload:
            self.ledger.hold(GRADIENTS, size)
        else:
            self.ledger.touch(GRADIENTS, size)


def update(job: Job) -> Ledger:
    """A training step: forward of every trained network, of the reference for given data, backward, optimiser."""
    walk, ledger = _Walk(job), None
    ledger = walk.ledger
    gradients = 0.0 if job.sharding.offload else sum(map(job.share, job.trained.values())) * job.precision.weight
    ledger.hold(GRADIENTS, gradients)
    for name, shape in job.trained.items():
        walk.forward(name, shape, job.targets)
    if "reference" in job.needs and "rollouts" not in job.needs and "reference" in job.frozen:
        walk.forward_without_grad("reference", job.frozen["reference"], job.rows, job.length, job.targets)
    if job.accumulate == 1:
        ledger.free(GRADIENTS, gradients)
    for name, shape in reversed(job.trained.items()):
        walk.backward(name, shape, job.targets)
    ledger.free(BUFFERS, walk.waiting)
    _optimizer_step(job, ledger)
    return ledger


def _optimizer_step(job: Job, ledger: Ledger) -> None:
    parts = job.sharding.shard if job.sharding.sharded else 1
    if job.sharding.offload:
        return
    if job.kernels == "gpu" and job.optimizer.step_all:
        local = sum(map(job.share, job.trained.values()))
        ledger.touch(STEP, local * job.precision.weight * job.optimizer.step_all)
    largest = max(shape.largest for shape in job.trained.values())
    ledger.touch(STEP, largest / parts * job.precision.weight * job.optimizer.step_largest)


def rollout(job: Job) -> Ledger:
    """Decoding of a collection: prompts are read in one pass, then every row takes a token a pass.

    The cache holds keys and values of every slot of every row, in the type of the residual's products; while rows are
    chosen (a prompt's completions, finished rows dropped) one layer's is there twice. Drawing a token takes a few
    copies of the logits [rows, V] in float32.
    """
    walk = _Walk(job)
    ledger, collection = walk.ledger, job.collection
    assert collection is not None, "a run without rollouts does not decode"
    rows = -(-collection.rows // job.sharding.data)
    rows = min(rows, collection.engine_batch or rows)
    distinct = -(-rows // collection.completions)
    shape = job.trained["policy"]
    slots = collection.prompt_length + collection.new_tokens
    config, common = shape.config, 0.0
    ledger.hold(GRADIENTS, 0.0 if job.sharding.offload else sum(map(job.share, job.trained.values())) * job.precision.weight)
    whole = 0.0
    if job.sharding.sharded and job.sharding.rollout == "gathered":
        # all trained networks stay whole during a collection
        whole = sum(map(job.whole, job.trained.values())) * walk.gather_bytes
        ledger.hold(BUFFERS, whole)
        ledger.touch(BUFFERS, max(max(s.root, job.block_part(s)) for s in job.trained.values()) * walk.gather_bytes)
    if walk.autocasts:
        ledger.hold(ACTIVATIONS, 2.0 * sum(job.whole(s) for s in job.trained.values()))
    kv_heads = max(1, config.num_kv_heads / job.sharding.tensor)
    layer = 2 * rows * slots * kv_heads * config.head_dim * job.precision.compute
    block = walk.block(shape, distinct, collection.prompt_length)
    common = network_bytes(shape, job.precision, distinct, collection.prompt_length)
    ledger.hold(CACHE, layer * config.num_layers * distinct / rows)
    with ledger.during(ACTIVATIONS, common + 2 * block.residual):
        gathering = job.block_part(shape) * walk.gather_bytes * 2 if whole == 0 and job.sharding.sharded else 0
        ledger.touch(ACTIVATIONS, block.forward + gathering)
    ledger.hold(CACHE, layer * config.num_layers * (1 - distinct / rows))
    # choosing rows copies all layers before the old ones go
    if distinct < rows:
        ledger.touch(CACHE, layer * config.num_layers * distinct / rows)
    ledger.touch(CACHE, layer * config.num_layers / 2)
    ledger.touch(LOGITS, rows * shape.vocab * 4 * 3)
    return ledger


def annotate(job: Job) -> Ledger:
    """Forward passes without gradients over a collection: log-probabilities, reference, values, reward models."""
    walk = _Walk(job)
    ledger, collection = walk.ledger, job.collection
    assert collection is not None, "a run without rollouts annotates nothing"
    length = collection.prompt_length + collection.new_tokens
    rows = min(collection.batch_size, -(-collection.rows // job.sharding.data))
    ledger.hold(GRADIENTS, 0.0 if job.sharding.offload else sum(map(job.share, job.trained.values())) * job.precision.weight)
    if job.sharding.sharded and job.sharding.rollout == "gathered":
        ledger.hold(BUFFERS, sum(map(job.whole, job.trained.values())) * walk.gather_bytes)
    if walk.autocasts:
        ledger.hold(ACTIVATIONS, 2.0 * sum(job.whole(s) for s in job.trained.values()))
    for name, shape in {**job.trained, **job.frozen}.items():
        targets = 0 if shape.scalar else rows * collection.new_tokens
        count = min(collection.reward_batch, rows) if name.startswith("reward/") else rows
        with ledger.during(name, job.whole(shape) * job.precision.weight if _fetched(job, name) else 0.0):
            gathered = walk.sharded(name) and name in job.trained and job.sharding.rollout == "gathered"
            walk.forward_without_grad("" if gathered else name, shape, count, length, targets)
    return ledger


def _fetched(job: Job, name: str) -> bool:
    return name in job.frozen and job.sharding.frozen == "offloaded"


PASSES = {"update": update, "rollout": rollout, "annotate": annotate}
