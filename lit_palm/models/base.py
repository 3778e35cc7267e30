"""What a network is: the one interface that modules, objectives and engines know.

A network maps tokens to hidden states and, through a *head*, to whatever the caller needs. The head runs inside
`forward`, so that a sharded network has its output weights gathered when the head reads them:

    logits_BTV = network(tokens_BT)                          # no head: logits
    out = network(tokens_BT, head=TokenLogProbs(targets))     # a head: a dict of tensors, chunked over the vocabulary

Networks are pure torch: no Lightning, no devices, no ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_palm.models.side_by_side import Sequences
from lit_palm.models.weights import Fresh, fill, fresh_seed, give_memory, local

__all__ = ["Cache", "Head", "Network", "NetworkConfig", "ScalarNetwork"]

# head(hidden_BTD, weight_VD, logit_scale) -> anything made of tensors; weight is the output embedding
Head = Callable[[Tensor, Tensor, float], Any]


class NetworkConfig(ABC):
    """The plain-data description of a network: cheap to build, compare, print and save; `build` makes the network.

    Entry-point group `lit_palm.networks`. Subclasses are dataclasses of plain values, so that a YAML file and a
    checkpoint can hold them as `{class_path, init_args}`.
    """

    API_VERSION: ClassVar[int] = 1

    CHANGEABLE: ClassVar[frozenset[str]] = frozenset()
    """Fields that may differ between a checkpoint and the run that resumes it, because no weight depends on them."""

    vocab_size: int | None
    """Number of token ids; None takes it from the tokeniser."""
    max_length: int
    """Longest sequence in tokens."""
    d_model: int
    """Width of the hidden states."""

    @property
    def starts(self) -> dict[str, str]:
        """Checkpoints that parts of a new network start as, by what the names of their weights begin with: of a
        network around a trained one `{"base.": path}`. The other weights are fresh. The first brings the tokeniser."""
        return {}

    @abstractmethod
    def build(self) -> Network:
        """Make the network with freshly initialised weights on the current default device and dtype.

        Raises:
            ValueError: when a field is missing or fields do not fit together.
        """


class Cache(ABC):
    """Keys and values of past tokens for incremental decoding; rows are left-padded, so all share one length."""

    length: int
    """Number of slots in use, the same for every row."""

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keep the given rows ([B'] long), in the given order, repeats allowed; in place."""

    def join(self, other: Cache) -> None:
        """Append the rows of another cache of the same network; the shorter of both is padded on the left.

        Padding is masked, and every row goes on at its own position. The other cache is not to be used afterwards.
        Continuous batching needs this and `trim`; an engine that keeps its rows together does not.
        """
        raise NotImplementedError(f"{type(self).__name__} does not take rows in while decoding: it has no join")

    def trim(self, count: int) -> None:
        """Drop the first `count` slots, which are padding in every row."""
        raise NotImplementedError(f"{type(self).__name__} does not take rows in while decoding: it has no trim")


class Network(nn.Module, ABC):
    """A causal language model.

    Attributes:
        config: the configuration that `build` came from, with `vocab_size` filled in.
    """

    config: NetworkConfig

    takes_sequences: ClassVar[bool] = False
    """Whether `forward` takes `sequences`, so that it need not compute padding, nor a shared prompt more than once."""

    lora_targets: ClassVar[Sequence[str] | None] = None
    """Names of the linear layers that LoRA adapts unless told otherwise; None: what is usual, or all of them."""

    @property
    def extras(self) -> frozenset[str]:
        """Names of the [B, T] tensors that it can give beside what a head gives, about the tokens that the head is
        about: those that `TokenLogProbs.extras` names are added to its result."""
        return frozenset()

    def follow(self, before: int, now: int) -> None:
        """Move what follows the trained weights, such as an averaged copy of some of them.

        Called between steps, before the next batch, with gradients off. A checkpoint holds what comes before, and the
        number of steps it knows of, so that a resumed run moves it all the same.

        Args:
            before: optimiser steps at the last call; 0 at first.
            now: optimiser steps taken.
        """

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        head: Head | None = None,
    ) -> Any:
        """Run the network.

        Args:
            tokens: [B, T] long token ids.
            mask: [B, T] bool, True where a token is real; None: all are. Right padding needs no mask: a causal
                network cannot see it.
            positions: [B, T] long; None: cumsum(mask) - 1, or counted from the cache's length.
            documents: [B, T] long, a token attends only within its document; None: one document a row. A network that
                `takes_sequences` also takes `sequences` (`lit_palm.models.side_by_side`): the tokens [1, N] of several
                rows side by side, with their positions, and how they make up these rows. It may then give the head the
                first `sequences.read` hidden states alone.
            cache: keys and values so far; the new ones are appended in place.
            head: called as head(hidden_BTD, weight_VD, logit_scale); its result is returned.

        Returns:
            logits [B, T, V], or what the head returns.
        """

    @abstractmethod
    def new_cache(self, num_rows: int, length: int) -> Cache:
        """An empty cache with room for `length` tokens in each of `num_rows` rows, on the network's device."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, in order: what sharding wraps and activation checkpointing recomputes."""

    def drop_output(self) -> list[str]:
        """Forget weights that nothing but logits needs, below a scalar head; their names."""
        return []

    in_parts: ClassVar[bool] = False
    """Whether the network can be made without ever being whole: built on the meta device it holds nothing but what
    `initial_std` describes. One that cannot is made whole on every process before it is sharded."""

    loads_in_parts: ClassVar[bool] = False
    """Whether that holds when its weights come from a checkpoint: on the meta device it lacks nothing but them."""

    def initial_std(self, name: str) -> float | None:
        """How a fresh weight is drawn: N(0, std^2); 0 gives zeros, None ones. For networks that come `in_parts`."""
        raise AssertionError("a network that comes in parts says how its weights are drawn")

    def drawn_as(self, name: str) -> str:
        """The name that a fresh weight is drawn under: one that is to start as a copy of another says that one's."""
        return name


class ScalarNetwork(nn.Module):
    """A network with a scalar head: a reward model or a value network.

    The head starts at N(0, 1/sqrt(D + 1)) with bias 0 (Stiennon et al. 2020; Huang et al. 2024). What comes out is
    calibrated, (head(hidden) - offset) / scale, with buffers that are 0 and 1 until `calibrate` is called; training
    works on the raw scores, so that a calibration does not change the loss.

    Args:
        trunk: the network below the head.
        pooling: `last`: the score at a position is read off its own hidden state; `mean`: it is the running mean over
            the positions so far, which small networks learn from less data. Either way a row's score stands at its
            last token, and a value network started from a reward model estimates it from each prefix.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, trunk: Network, pooling: Literal["last", "mean"] = "last") -> None:
        super().__init__()
        if pooling not in ("last", "mean"):
            raise ValueError(f"pooling is {pooling!r}: choose last or mean")
        self.trunk = trunk
        self.dropped = frozenset(trunk.drop_output())
        """Names of weights of the language model that this network does without."""
        self.pooling = pooling
        device = torch.get_default_device()
        with torch.device("meta"):
            self.head = nn.Linear(trunk.config.d_model, 1)
        give_memory(self.head, device)
        self.register_buffer("offset", torch.zeros((), dtype=torch.float32))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.init_head()

    def init_head(self, seed: int | None = None) -> None:
        """Initialise the scalar head; without a seed, with one drawn from torch's generator."""
        fill(self, Fresh(self, fresh_seed() if seed is None else seed), only=("head.weight", "head.bias"))

    def initial_std(self, name: str) -> float | None:
        """How a fresh weight is drawn; see `Network.initial_std`."""
        if name.startswith("trunk."):
            return self.trunk.initial_std(name.removeprefix("trunk."))
        return {"head.weight": (self.head.in_features + 1) ** -0.5, "scale": None}.get(name, 0.0)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        sequences: Sequences | None = None,
        calibrated: bool = True,
    ) -> Tensor:
        """Scalar at every position: [B, T] in float32; arguments as for `Network.forward`.

        Of tokens that are laid side by side it gives those of the rows that they make up; on padding, and where they
        are not to be read, anything.
        """
        options = {} if sequences is None else {"sequences": sequences}

        def head(hidden: Tensor, weight: Tensor, logit_scale: float) -> Tensor:
            return F.linear(hidden, local(self.head.weight), local(self.head.bias)).squeeze(-1)

        raw: Tensor = self.trunk(tokens, mask=mask, positions=positions, documents=documents, head=head, **options)
        raw = raw.float()
        if sequences is not None:
            raw = raw.squeeze(0)[sequences.place.clamp(max=raw.shape[1] - 1)]
        if self.pooling == "mean":
            assert documents is None, "a running mean knows nothing of packed documents"
            real = torch.ones_like(raw) if mask is None else mask.to(raw.dtype)
            raw = (raw * real).cumsum(1) / real.cumsum(1).clamp(min=1)
        return (raw - self.offset) / self.scale if calibrated else raw

    @torch.no_grad()
    def calibrate(self, mean: Tensor, std: Tensor | None = None) -> None:
        """Make raw scores of the given mean (and standard deviation) come out with mean 0 (and deviation 1).

        Args:
            mean: scalar, of raw scores.
            std: scalar; None leaves the scale.
        """
        self.offset.copy_(mean)
        self.scale.copy_(std if std is not None else torch.ones_like(self.scale))
