"""A run as plain numbers: what the formulas read, whatever YAML it came from.

Job            all of a run: its networks, rows, precision, optimiser, sharding, collection
NetworkShape   a PaLM, optionally under a scalar head
Precision      bytes of a weight, a residual and a matrix product's input
Sharding       how weights are spread over devices
Collection     sizes of a collection of rollouts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lit_palm.models.flops import attention_flops, palm_parameters
from lit_palm.models.palm import PaLMConfig

__all__ = ["Collection", "Job", "NetworkShape", "OptimizerCost", "Precision", "Sharding"]


@dataclass(frozen=True)
class NetworkShape:
    """A PaLM (under a scalar head, if `scalar`) as numbers."""

    config: PaLMConfig
    scalar: bool = False

    @property
    def d_ffn(self) -> int:
        """Inner width of the feed-forward."""
        return self.config.d_ffn or 4 * self.config.d_model

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        assert self.config.vocab_size is not None, "the vocabulary is known before a plan is made"
        return self.config.vocab_size

    @property
    def fused(self) -> int:
        """Width of a block's one input product: queries, keys, values and both halves of SwiGLU."""
        c = self.config
        return (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + 2 * self.d_ffn

    @property
    def block_matrices(self) -> tuple[int, int, int]:
        """Weights of a block's matrices in the order of the forward pass: input, attention output, feed-forward."""
        c = self.config
        return c.d_model * self.fused, c.num_heads * c.head_dim * c.d_model, self.d_ffn * c.d_model

    @property
    def block_vectors(self) -> int:
        """Weights of a block's norms."""
        c = self.config
        qk = {"none": 0, "l2": 2 * c.head_dim, "layer": (c.num_heads + c.num_kv_heads) * c.head_dim}[c.qk_norm]
        return c.d_model + qk

    @property
    def block(self) -> int:
        """Parameters of a block."""
        return sum(self.block_matrices) + self.block_vectors

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, which is the output projection too."""
        return self.vocab * self.config.d_model

    @property
    def root(self) -> int:
        """Parameters outside the blocks: embedding, last norm, scalar head."""
        return self.embedding + self.config.d_model + (self.config.d_model + 1 if self.scalar else 0)

    @property
    def parameters(self) -> int:
        """All parameters."""
        c = self.config
        plain = palm_parameters(
            d_model=c.d_model,
            num_layers=c.num_layers,
            num_heads=c.num_heads,
            head_dim=c.head_dim,
            vocab_size=self.vocab,
            num_kv_heads=c.num_kv_heads,
            d_ffn=self.d_ffn,
        )
        return plain + c.num_layers * (self.block_vectors - c.d_model) + (self.root - self.embedding - c.d_model)

    @property
    def largest(self) -> int:
        """Parameters of the largest single tensor."""
        return max(self.embedding, *self.block_matrices)

    def attention(self, length: int) -> int:
        """Operations a token of attention in a forward pass over rows of `length` tokens."""
        c = self.config
        return attention_flops(c.num_layers, c.num_heads, c.head_dim, length)


@dataclass(frozen=True)
class Precision:
    """Bytes of one number. `autocast`: weights are cast for each product, and the casts kept until backward."""

    name: str
    weight: int
    residual: int
    compute: int
    autocast: bool

    @property
    def flops_name(self) -> str:
        """The type of matrix products, as the device table names it."""
        return {"bf16": "bfloat16", "16": "float16"}.get(self.name.partition("-")[0], "float32")


@dataclass(frozen=True)
class OptimizerCost:
    """Bytes of state a parameter, and what a step needs beside it."""

    name: str
    state: float
    """Bytes of state for each byte-counted parameter (bytes a parameter)."""
    step_largest: float
    """Temporaries of a step that goes one tensor at a time: multiples of the largest tensor's bytes."""
    step_all: float
    """Temporaries of a multi-tensor step, on devices that have it: multiples of the parameters' bytes."""


@dataclass(frozen=True)
class Sharding:
    """How weights are spread: `none` (one device, or each its own copy under `ddp`), `fsdp1`, `fsdp2`."""

    kind: Literal["none", "ddp", "fsdp1", "fsdp2"] = "none"
    data: int = 1
    """Groups of devices that read different rows."""
    tensor: int = 1
    """Devices that split single matrices."""
    shard: int = 1
    """Devices over which weights are spread: `data`, or fewer (hybrid: copies of the sharded whole)."""
    offload: bool = False
    """Weights, gradients and optimiser state live on the host between uses."""
    casts: bool = False
    """Weights are gathered in the compute type, so that autocast finds nothing to cast, and gradients summed in
    float32."""
    gather: Literal["auto", "whole", "layers"] = "whole"
    """Weights of the policy while it samples; `auto`: whole where twice their bytes fit into what is free."""
    gathers_all: bool = True
    """While the policy samples with whole weights, the other trained networks are whole too."""
    frozen: Literal["whole", "sharded", "offloaded"] = "whole"
    """The reference and reward models between their uses."""
    reshard: bool = True
    """Blocks are freed after their forward pass and gathered again for their backward pass."""

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered for their use."""
        return self.kind in ("fsdp1", "fsdp2")


@dataclass(frozen=True)
class Collection:
    """A collection of rollouts, over all devices where not said otherwise."""

    num_prompts: int
    completions: int
    prompt_length: int
    new_tokens: int
    batch_size: int
    """Rows of a forward pass without gradients on one device."""
    reward_batch: int
    """Rows of a forward pass of a reward model on one device."""
    passes: int
    minibatch: int
    engine_batch: int | None = None
    """Most rows that decode together on one device."""

    @property
    def rows(self) -> int:
        """Completions of a collection."""
        return self.num_prompts * self.completions


@dataclass(frozen=True)
class Job:
    """A run; rows are those of one micro-batch on one device."""

    kind: Literal["language_model", "reward", "policy"]
    objective: str
    needs: frozenset[str]
    trained: Mapping[str, NetworkShape]
    frozen: Mapping[str, NetworkShape]
    rows: int
    length: int
    targets: int
    """Tokens of a micro-batch that are learned from."""
    precision: Precision
    optimizer: OptimizerCost
    sharding: Sharding = field(default_factory=Sharding)
    devices: int = 1
    accumulate: int = 1
    masked: bool = False
    """Rows hold several documents, so attention is given a mask; with FlexAttention, less than that."""
    entropy_trained: bool = False
    """The loss reads entropies, so backward goes through them."""
    collection: Collection | None = None
    kernels: Literal["accelerator", "host"] = "accelerator"
    max_steps: int = -1
    usable: float = float("inf")
    """Bytes of a device, where the run decides by what is free."""

    @property
    def local_parameters(self) -> dict[str, float]:
        """Parameters that one device holds of each trained network."""
        return {name: self.share(shape) for name, shape in self.trained.items()}

    def share(self, shape: NetworkShape) -> float:
        """Parameters of a sharded network on one device."""
        return self.whole(shape) / (self.sharding.shard if self.sharding.sharded else 1)

    def block_part(self, shape: NetworkShape) -> float:
        """Parameters of a whole block on one device: with tensor parallelism a part of its matrices.

        Keys and values of a head that all query heads share are computed on every device.
        """
        if self.sharding.tensor == 1:
            return shape.block
        c = shape.config
        keys = 2 * c.num_kv_heads * c.head_dim * c.d_model
        own = max(keys / self.sharding.tensor, 2 * c.head_dim * c.d_model)
        return (sum(shape.block_matrices) - keys) / self.sharding.tensor + own + shape.block_vectors

    def whole(self, shape: NetworkShape) -> float:
        """Parameters of one network on one device when none is sharded over data."""
        return shape.config.num_layers * self.block_part(shape) + shape.root

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimiser step over all devices."""
        return self.rows * self.length * self.accumulate * self.sharding.data
