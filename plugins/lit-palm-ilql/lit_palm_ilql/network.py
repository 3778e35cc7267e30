"""A language model with Q heads and a value head, which shift what it says next while it decodes.

Every head reads the hidden state at a token and speaks about the next one, as the language model's own does:

    Q_i(h, a)   one number a token of the vocabulary, i = 1 or 1, 2
    Q'_i(h, a)  the same from the target heads, which follow slowly
    V(h)        one number

    network(tokens)                     log pi, as the language model says
    network(tokens, cache=cache)        while decoding: log pi + decode_beta * (min_i Q'_i - V)

So whatever samples from the network (validation, `lit-palm generate`, a reward's best of n) decodes by values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_palm import Network, NetworkConfig
from lit_palm.models import Cache, Head, TokenLogProbs
from lit_palm.models.weights import Fresh, fill, fresh_seed, give_memory, local

__all__ = ["ILQLConfig", "ILQLNetwork"]


@dataclass
class ILQLConfig(NetworkConfig):
    """A language model with the heads of implicit language Q-learning (Snell et al. 2022).

    Raises:
        ValueError: neither `start` nor `base` is given, or a number is out of its range.
    """

    API_VERSION: ClassVar[int] = 1
    CHANGEABLE: ClassVar[frozenset[str]] = frozenset({"start", "alpha", "sync_steps", "decode_beta"})

    start: str | None = None
    """Checkpoint of the language model that a new network starts as, usually a fine-tuned one."""
    base: NetworkConfig | None = None
    """The language model below the heads; null takes that of `start`."""
    two_qs: bool = True
    """Two Q heads, of which the smaller one counts (Fujimoto et al. 2018), or one."""
    alpha: float = 0.001
    """How far the target heads move towards the Q heads at a time: target <- alpha * Q + (1 - alpha) * target."""
    sync_steps: int = 5
    """Optimiser steps from one such move to the next."""
    decode_beta: float = 1.0
    """What one unit of advantage adds to a token's logit while decoding; 0 decodes as the language model."""

    def __post_init__(self) -> None:
        if self.base is None:
            if self.start is None:
                raise ValueError(
                    "ILQLConfig names no language model: set start to a checkpoint, or base to a configuration"
                )
            from lit_palm.modules.checkpoint import read_config  # light to import until it is used

            self.base = read_config(self.start)
        if isinstance(self.base, ILQLConfig):
            raise ValueError("ILQLConfig.base is an ILQLConfig: name its checkpoint as model.network to go on with it")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"ILQLConfig.alpha must lie in (0, 1], got {self.alpha}; 0.001 is usual, 1 copies")
        if self.sync_steps < 1:
            raise ValueError(f"ILQLConfig.sync_steps must be at least 1, got {self.sync_steps}")
        if not 0 <= self.decode_beta < float("inf"):
            raise ValueError(f"ILQLConfig.decode_beta must be finite and not negative, got {self.decode_beta}")

    @property
    def starts(self) -> dict[str, str]:
        """The language model comes from `start`, the heads are fresh."""
        return {} if self.start is None else {"base.": self.start}

    @property
    def inner(self) -> NetworkConfig:
        """The language model's configuration."""
        assert self.base is not None, "set at the latest by __post_init__"
        return self.base

    @property
    def vocab_size(self) -> int | None:  # type: ignore[override]
        """Number of token ids."""
        return self.inner.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int | None) -> None:
        self.inner.vocab_size = value

    @property
    def max_length(self) -> int:  # type: ignore[override]
        """Longest sequence in tokens."""
        return self.inner.max_length

    @property
    def d_model(self) -> int:  # type: ignore[override]
        """Width of the hidden states."""
        return self.inner.d_model

    def build(self) -> ILQLNetwork:
        """Make the network with freshly initialised weights; see `NetworkConfig.build`."""
        return ILQLNetwork(self)


class _MLP(nn.Module):
    """A head: width D -> 2 D, ReLU, -> outputs, with biases (trlX's `make_head`)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, outputs)

    def last(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What is left to do, as one product: inner values [..., 2 D + 1] and weights [outputs, 2 D + 1]."""
        inner = F.relu(F.linear(hidden, local(self.up.weight), local(self.up.bias)))
        weight, bias = local(self.out.weight), local(self.out.bias)
        return F.pad(inner, (0, 1), value=1.0), torch.cat([weight, bias[:, None].to(weight.dtype)], 1)


class ILQLNetwork(Network):
    """The network; see the module's docstring and `Network.forward`.

    Raises:
        ValueError: `config.vocab_size` is not set.
    """

    config: ILQLConfig

    def __init__(self, config: ILQLConfig) -> None:
        super().__init__()
        self.config = config
        self.base = config.inner.build()
        vocab_size = config.vocab_size
        assert vocab_size is not None, "the language model has just been built with it"
        self.takes_sequences = self.base.takes_sequences  # type: ignore[misc]
        self.in_parts, self.loads_in_parts = self.base.in_parts, self.base.loads_in_parts  # type: ignore[misc]
        device = torch.get_default_device()
        with torch.device("meta"):  # weights are drawn once, below
            number = 2 if config.two_qs else 1
            self.q_heads = nn.ModuleList(_MLP(config.d_model, vocab_size) for _ in range(number))
            self.target_q_heads = nn.ModuleList(_MLP(config.d_model, vocab_size) for _ in range(number))
            self.v_head = _MLP(config.d_model, 1)
        self.target_q_heads.requires_grad_(False)
        fresh = Fresh(self, fresh_seed())
        fill(self, fresh, only=give_memory(self, device))

    def initial_std(self, name: str) -> float | None:
        """Kernels by fan-in variance, biases 0; the language model as it says itself."""
        if name.startswith("base."):
            return self.base.initial_std(name.removeprefix("base."))
        module = self.get_submodule(name.rpartition(".")[0])
        assert isinstance(module, nn.Linear)
        return float(module.in_features**-0.5) if name.endswith(".weight") else 0.0

    def drawn_as(self, name: str) -> str:
        """Target heads start as copies of the Q heads."""
        return name.removeprefix("target_")

    @property
    def extras(self) -> frozenset[str]:
        """`v`, and of each Q head `q_i`, `target_q_i` and `q_log_z_i`, the log of the sum of exp(Q) over all tokens."""
        kinds = ("q", "target_q", "q_log_z")
        return frozenset({"v", *(f"{kind}_{i}" for i in range(1, len(self.q_heads) + 1) for kind in kinds)})

    def blocks(self) -> list[nn.Module]:
        """The language model's."""
        return self.base.blocks()

    def new_cache(self, num_rows: int, length: int) -> Cache:
        """The language model's."""
        return self.base.new_cache(num_rows, length)

    def forward(self, tokens: Tensor, *, cache: Cache | None = None, head: Head | None = None, **options: Any) -> Any:
        """Logits [B, T, V] or what the head returns, shifted by values while decoding; see `Network.forward`."""
        if cache is not None and self.config.decode_beta:
            head = self._shifted(head)
        elif isinstance(head, TokenLogProbs) and head.extras:
            head = self._with_extras(head)
        return self.base(tokens, cache=cache, head=head, **options)

    # ------------------------------------------------------------------ decoding

    def _shifted(self, head: Head | None) -> Head:
        """A head that gives logits, made to give those of the policy that decodes."""

        def shifted(hidden: Tensor, weight: Tensor, logit_scale: float) -> Tensor:
            def read(inner: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
                # a head that gives logits is a product with some weight, at positions of its own choice
                values: Tensor = F.linear(inner * scale, weight) if head is None else head(inner, weight, scale)
                return values

            logits = read(hidden, weight, logit_scale)
            wide = torch.promote_types(logits.dtype, torch.float32)
            q = torch.stack([read(*mlp.last(hidden)) for mlp in self.targets()]).amin(0)
            advantage = q.to(wide) - read(*self.v_head.last(hidden)).to(wide)
            return torch.log_softmax(logits.to(wide), -1) + self.config.decode_beta * advantage

        return shifted

    def targets(self) -> Iterator[_MLP]:
        """The target heads."""
        for mlp in self.target_q_heads:
            assert isinstance(mlp, _MLP)
            yield mlp

    # ------------------------------------------------------------------ training

    def _with_extras(self, head: TokenLogProbs) -> Head:
        """The head, with what the objective reads of the Q and value heads at the same tokens."""
        if head.extras != self.extras:
            raise ValueError(
                f"the network has {len(self.q_heads)} Q head(s), the objective reads {', '.join(sorted(head.extras))}: "
                "set two_qs alike in model.network and model.objective"
            )

        def both(hidden: Tensor, weight: Tensor, logit_scale: float) -> dict[str, Tensor]:
            result = head(hidden, weight, logit_scale)
            place, before = head.places()
            states = hidden.flatten(0, 1).index_select(0, before)  # [N, D]

            def spread(values: Tensor) -> Tensor:
                return values.new_zeros(head.targets.numel()).index_copy(0, place, values).view(head.targets.shape)

            number = torch.arange(len(place), device=place.device)
            rows = TokenLogProbs(
                head.targets, head.select, log_z=True, max_elements=head.max_elements, source=spread(number)
            )

            def read(mlp: nn.Module) -> tuple[Tensor, Tensor]:
                assert isinstance(mlp, _MLP)
                inner, out = mlp.last(states)
                found = rows(inner[None], out, 1.0)  # in chunks over the vocabulary
                return found["logps"] + found["log_z"], found["log_z"]

            for i, (mlp, target) in enumerate(zip(self.q_heads, self.target_q_heads, strict=True), 1):
                result[f"q_{i}"], result[f"q_log_z_{i}"] = read(mlp)
                with torch.no_grad():
                    result[f"target_q_{i}"], _ = read(target)
            inner, out = self.v_head.last(states)
            values = F.linear(inner, out).squeeze(-1)
            result["v"] = spread(values.to(torch.promote_types(values.dtype, torch.float32)))
            return result

        return both

    # ------------------------------------------------------------------ targets

    def follow(self, before: int, now: int) -> None:
        """Move the target heads where a move is due; each process moves what it holds.

        Raises:
            ValueError: the weights are spread in flat parts.
        """
        pairs = list(zip(self.target_q_heads.parameters(), self.q_heads.parameters(), strict=True))
        if any(mine.shape != shape for (mine, _), shape in zip(pairs, self._shapes(), strict=True)):
            raise ValueError(
                "the target heads of an ILQLConfig cannot follow in the flat parts that FSDPStrategy makes: use "
                "ModelParallelStrategy (configs/strategy/fsdp.yaml)"
            )
        for _ in range(now // self.config.sync_steps - before // self.config.sync_steps):
            for mine, theirs in pairs:
                local(mine).lerp_(local(theirs), self.config.alpha)

    def _shapes(self) -> Iterator[tuple[int, ...]]:
        """Of the target heads' parameters, as they are when nothing spreads them."""
        for mlp in self.targets():
            for layer in (mlp.up, mlp.out):
                yield (layer.out_features, layer.in_features)
                yield (layer.out_features,)
