"""How memory grows and shrinks while a network is run forward and backward: the steps that all passes are made of."""

from __future__ import annotations

from lit_palm.plan.activations import Block, Head, block_bytes, head_bytes, network_bytes
from lit_palm.plan.job import Job, NetworkShape
from lit_palm.plan.ledger import Ledger

__all__ = ["ACTIVATIONS", "BUFFERS", "CACHE", "GRADIENTS", "LOGITS", "STEP", "Walk", "static_bytes"]

ACTIVATIONS, LOGITS, BUFFERS, CACHE = "activations", "logits", "buffers", "KV cache"
GRADIENTS, WEIGHTS, OPTIMISER, STEP = "gradients", "weights", "optimiser", "optimiser step"


def static_bytes(job: Job) -> dict[str, float]:
    """What stays on a device from step to step: weights, optimiser state, frozen networks, DDP's buckets."""
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
    if job.sharding.frozen == "offloaded" and (job.sharding.sharded or job.collection is not None):
        return 0.0
    parts = job.sharding.shard if job.sharding.frozen == "sharded" and job.sharding.sharded else 1
    return job.whole(shape) * job.precision.weight / parts


class Walk:
    """A ledger, and what happens to it as a job's networks are run."""

    def __init__(self, job: Job) -> None:
        self.job, self.ledger = job, Ledger(static_bytes(job))
        self.autocasts = job.precision.autocast and not (job.sharding.sharded and job.sharding.casts)
        self.gather_bytes = job.precision.compute if job.sharding.casts else job.precision.weight
        self.reduce_bytes = max(job.precision.weight, 4) if job.sharding.casts else job.precision.weight
        # bytes of a gradient before it is reduced
        self.gradient_bytes = job.precision.compute if job.sharding.casts else job.precision.weight
        # sharded networks that have been gathered as a whole
        self.whole: set[str] = set()
        self.behind = self.ahead = self.waiting = 0.0
        # casts that nothing needs, which autocast remembers until the forward pass of the whole step is over
        self.cached = 0.0

    def block(self, shape: NetworkShape, rows: int, length: int) -> Block:
        job = self.job
        return block_bytes(
            shape,
            job.precision,
            rows,
            length,
            tensor=job.sharding.tensor,
            masked=job.masked,
            cpu=job.kernels == "host",
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
        if name in self.whole:
            return False
        return job.sharding.sharded and (name in job.trained or job.sharding.frozen != "whole")

    def gather(self, name: str, parameters: float) -> None:
        """A unit's weights for its forward pass: the buffer of the all-gather, and the copies that the unit computes
        with. The buffer lives until the next unit has been gathered."""
        size = self.gathered_size(name, parameters)
        self.ledger.hold(BUFFERS, size)
        self.ledger.free(BUFFERS, self.behind)
        self.behind = size
        self.ledger.hold(BUFFERS, size)

    def release(self, name: str, parameters: float) -> None:
        """The unit's weights are freed; of the last one its buffer is left."""
        self.ledger.free(BUFFERS, self.gathered_size(name, parameters))

    def gathered_size(self, name: str, parameters: float) -> float:
        """Bytes of a unit's whole weights; 0 where nothing is gathered."""
        return parameters * self.gather_bytes if self.sharded(name) else 0.0

    def prefetch(self, name: str, parameters: float) -> None:
        """The next unit of the backward pass is gathered while this one computes."""
        size = self.gathered_size(name, parameters)
        self.ledger.hold(BUFFERS, size)
        self.ahead = size

    def gather_again(self, name: str, parameters: float, following: float) -> None:
        """A unit's weights for its backward pass, and the buffer of the `following` one's."""
        size = self.gathered_size(name, parameters)
        self.ledger.hold(BUFFERS, size)
        self.ledger.free(BUFFERS, self.ahead)
        self.prefetch(name, following if self.job.sharding.reshard else 0.0)

    def reduce(self, name: str, parameters: float) -> None:
        """A unit's gradients are copied into one buffer, which lives until the next unit's is reduced, and summed
        over the ranks; its weights are freed before."""
        if not self.sharded(name):
            return
        self.release(name, parameters)
        self.ledger.free(BUFFERS, self.waiting)
        self.waiting = parameters * self.reduce_bytes
        self.ledger.hold(BUFFERS, self.waiting)
        self.ledger.free(GRADIENTS, parameters * self.gradient_bytes)
        self.keep_gradient(parameters / self.job.sharding.shard)

    # ------------------------------------------------------------------ forward and backward

    def forward_without_grad(self, name: str, shape: NetworkShape, rows: int, length: int, targets: int) -> None:
        """A forward pass that keeps nothing, with the head of log-probabilities if `targets`."""
        ledger, block = self.ledger, self.block(shape, rows, length)
        part = self.job.block_part(shape)
        common = network_bytes(shape, self.job.precision, rows, length, self.job.masked)
        self.gather(name, shape.root)
        with ledger.during(ACTIVATIONS, common + block.residual):
            for _ in range(min(2, shape.config.num_layers)):  # all are alike
                self.gather(name, part)
                ledger.touch(ACTIVATIONS, block.forward)
                self.release(name, part)
            # the last norm's result beside its input
            with ledger.during(ACTIVATIONS, block.residual):
                if targets:
                    head = self.head(shape, rows * length, targets, entropy=False)
                    ledger.touch(LOGITS, head.alone)
        self.release(name, shape.root)
        self.forget()

    def forget(self) -> None:
        """After a network's forward pass the last buffer goes too."""
        self.ledger.free(BUFFERS, self.behind)
        self.behind = 0.0

    def forward(self, name: str, shape: NetworkShape, targets: int) -> None:
        """A forward pass with gradients: each block leaves what it keeps."""
        job, ledger = self.job, self.ledger
        block, part = self.block(shape, job.rows, job.length), job.block_part(shape)
        recomputed = shape.config.activation_checkpointing
        self.gather(name, shape.root)
        ledger.hold(ACTIVATIONS, network_bytes(shape, job.precision, job.rows, job.length, job.masked) + block.residual)
        for _ in range(shape.config.num_layers):
            self.gather(name, part)
            if recomputed:
                ledger.touch(ACTIVATIONS, block.forward + block.residual)
                ledger.hold(ACTIVATIONS, block.residual)
                ledger.hold(ACTIVATIONS, block.cast)
                self.cached += block.cast
            else:
                ledger.hold(ACTIVATIONS, block.saved)
                ledger.touch(ACTIVATIONS, block.forward_end)
                ledger.hold(ACTIVATIONS, block.residual)
            if job.sharding.reshard:
                self.release(name, part)
        with ledger.during(ACTIVATIONS, block.residual):  # the last norm's result
            self._head_forward(shape, targets)
        self.release(name, shape.root)
        self.forget()

    def _head_forward(self, shape: NetworkShape, targets: int) -> None:
        job, ledger = self.job, self.ledger
        if shape.scalar:
            ledger.hold(ACTIVATIONS, job.rows * job.length * shape.config.d_model * job.precision.compute)
            return
        head = self.head(shape, job.rows * job.length, targets, "entropy" in job.needs)
        ledger.hold(LOGITS, head.saved + head.cast)
        ledger.touch(LOGITS, head.forward)

    def backward(self, name: str, shape: NetworkShape, targets: int) -> None:
        """The backward pass: the head, then the blocks from the last to the first, each freeing what it kept.

        Weights and gradients of the unit outside the blocks, the embedding's, stay until all networks are through.
        """
        job, ledger = self.job, self.ledger
        block, part = self.block(shape, job.rows, job.length), job.block_part(shape)
        self.ahead = 0.0
        self.gather_again(name, shape.root, part)
        self._head_backward(name, shape, targets, block)
        for left in reversed(range(shape.config.num_layers)):
            if job.sharding.reshard:
                self.gather_again(name, part, part if left else 0.0)
            self._block_backward(name, shape, block, part)
        # the embedding's own gradient, added to the one that came through the logits
        ledger.touch(GRADIENTS, shape.embedding * self.gradient_bytes)
        # the residual of the embedding with its gradient, and what is common to all blocks
        ledger.free(ACTIVATIONS, 2 * block.residual)
        ledger.free(ACTIVATIONS, network_bytes(shape, job.precision, job.rows, job.length, job.masked))

    def _head_backward(self, name: str, shape: NetworkShape, targets: int, block: Block) -> None:
        job, ledger = self.job, self.ledger
        if shape.scalar:
            ledger.free(ACTIVATIONS, job.rows * job.length * shape.config.d_model * job.precision.compute)
        else:
            head = self.head(shape, job.rows * job.length, targets, True, job.entropy_trained)
            ledger.hold(LOGITS, head.hidden_grad)
            ledger.touch(LOGITS, head.backward)
            ledger.touch(GRADIENTS, head.wide)
            with ledger.during(GRADIENTS, head.wide):
                ledger.touch(LOGITS, max(head.backward_again, head.product))
            self.new_gradient(name, shape.root)
            ledger.free(LOGITS, head.saved + head.cast + head.hidden_grad)
        ledger.hold(ACTIVATIONS, block.residual)  # the gradient of the residual

    def _block_backward(self, name: str, shape: NetworkShape, block: Block, part: float) -> None:
        job, ledger = self.job, self.ledger
        if shape.config.activation_checkpointing:
            ledger.hold(ACTIVATIONS, block.saved)
            ledger.touch(ACTIVATIONS, block.forward_end + block.residual)
        small = block.residual if job.precision.compute != job.precision.residual else 0.0
        out, hidden = (n * self.gradient_bytes for n in self.outputs(shape))
        # hidden's gradient takes its place; then attention's values make room for the gradients of q, k and v
        ledger.touch(ACTIVATIONS, block.hidden + small)
        self.new_gradient(name, hidden / self.gradient_bytes)
        self.new_gradient(name, out / self.gradient_bytes)
        ledger.free(ACTIVATIONS, block.attention)
        silu = block.hidden if job.kernels == "accelerator" else 0.0  # on a CPU it goes by small pieces
        ledger.touch(ACTIVATIONS, block.fused_grad + block.qkv_grad + silu)
        ledger.hold(ACTIVATIONS, block.attention)
        ledger.free(ACTIVATIONS, block.saved - block.fused_grad)
        self.new_gradient(name, part - (hidden + out) / self.gradient_bytes)
        ledger.touch(ACTIVATIONS, block.residual)
        ledger.free(ACTIVATIONS, block.fused_grad + block.residual)
        self.reduce(name, part)

    def outputs(self, shape: NetworkShape) -> tuple[float, float]:
        """Parameters of a block's two output matrices on this device."""
        _, out, hidden = shape.block_matrices
        return out / self.job.sharding.tensor, hidden / self.job.sharding.tensor

    def finish(self) -> None:
        """After all backward passes: the units outside the blocks are reduced."""
        for name, shape in self.job.trained.items():
            self.reduce(name, shape.root)
        self.ledger.free(BUFFERS, self.waiting)
        self.waiting = 0.0

    def new_gradient(self, name: str, parameters: float) -> None:
        """A gradient: kept where it is the first micro-batch's, else added to what is there and dropped. Autocast
        gives it in the compute type first."""
        size = parameters * self.gradient_bytes
        cast = parameters * self.job.precision.compute if self.autocasts else 0.0
        if self.sharded(name) or self.job.accumulate == 1:
            self.ledger.hold(GRADIENTS, size)
            self.ledger.touch(GRADIENTS, cast)
        else:
            self.ledger.touch(GRADIENTS, size + cast)

    def keep_gradient(self, parameters: float) -> None:
        """A sharded unit's reduced gradient."""
        size = parameters * self.job.precision.weight
        if self.job.accumulate == 1 and not self.job.sharding.offload:
            self.ledger.hold(GRADIENTS, size)
        else:
            self.ledger.touch(GRADIENTS, size)
