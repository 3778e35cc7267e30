"""One frozen network, several sets of LoRA adapters on it, and a network for each of them.

    shared = AdaptedNetwork(trunk, {"policy": LoRA(), "value": LoRA()}, heads=["value"], trained=["policy", "value"])
    policy = shared.view("policy")      # a Network: the trunk with the policy's adapter
    value = shared.view("value")        # a ScalarNetwork: the trunk with the value's adapter, and a head
    reference = shared.view(None)       # the trunk as it is

The weights of the trunk are in memory once. A view is light: it makes its adapter the active one for the length of a
pass. What is recomputed in the backward pass, for activation checkpointing, is done with the adapter of its forward
pass, though another may have been active in between.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lit_palm.models.base import Cache, Network, ScalarNetwork
from lit_palm.models.lora import LoRA, is_transposed, merge, split_name, targets_of

__all__ = ["AdaptedNetwork", "Head", "ScalarView", "View", "is_view", "sampling_from"]

Pooling = Literal["last", "mean"]


class Head(nn.Module):
    """What a scalar network has over its trunk; see `ScalarNetwork`. Its weights are on the meta device at first."""

    offset: Tensor
    scale: Tensor

    def __init__(self, width: int, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling
        with torch.device("meta"):
            self.head = nn.Linear(width, 1)
            self.register_buffer("offset", torch.zeros((), dtype=torch.float32))
            self.register_buffer("scale", torch.ones((), dtype=torch.float32))


class AdaptedNetwork(Network):
    """A frozen network with adapters; called by itself it is the network as it was.

    Adapters and heads are on the meta device until somebody fills them.

    Args:
        trunk: the network, which is changed in place.
        adapters: by role; a role is a word.
        heads: how the scalar head of a role pools, of those that have one.
        trained: the roles that are trained; others stay as they are, and run without dropout.

    Raises:
        ValueError: a target is the name of no layer.
    """

    def __init__(
        self,
        trunk: Network,
        adapters: Mapping[str, LoRA],
        heads: Mapping[str, Pooling] | None = None,
        trained: Collection[str] = (),
    ) -> None:
        super().__init__()
        from peft.tuners.lora import LoraLayer

        self.config = trunk.config
        self.trunk = trunk.requires_grad_(False)
        self.adapters, self.trained = dict(adapters), frozenset(trained)
        self.targets = {role: targets_of(trunk, lora) for role, lora in adapters.items()}
        for role, lora in adapters.items():
            _inject(trunk, role, lora, self.targets[role])
        self.heads = nn.ModuleDict({role: Head(trunk.config.d_model, how) for role, how in (heads or {}).items()})
        self._layers = [module for module in trunk.modules() if isinstance(module, LoraLayer)]
        self._role: str | None = ""
        self.merged_role: str | None = None
        self._activate(None)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.is_kept(name))
        self._bind_recomputation()

    # ------------------------------------------------------------------ which adapter is active

    @contextmanager
    def using(self, role: str | None) -> Iterator[None]:
        """Let the adapter of a role be the active one; None: none."""
        before = self._role
        self._activate(role)
        try:
            yield
        finally:
            self._activate(before)

    @contextmanager
    @torch.no_grad()
    def merged(self, role: str) -> Iterator[None]:
        """Passes of a role in here, and no others, find its adapter put into the matrices, for the memory of a copy.

        The matrices themselves are not touched, so that they are afterwards what they were, to the last bit. Where they
        are of 16 bits, which would lose small updates, quantised or spread over processes, nothing is done.
        """
        layers = [layer for layer in self._layers if role in layer.lora_A]
        weights: list[Any] = [layer.get_base_layer().weight for layer in layers]
        wide = all(type(w) is nn.Parameter and w.dtype in (torch.float32, torch.float64) for w in weights)
        if not wide or isinstance(self, FSDPModule):
            yield
            return
        originals = [weight.data for weight in weights]
        try:
            for layer, weight in zip(layers, weights, strict=True):
                weight.data = self.whole(layer, role)
            self.merged_role = role
            yield
        finally:
            self.merged_role = None
            for weight, original in zip(weights, originals, strict=True):
                weight.data = original

    @torch.no_grad()
    def whole(self, layer: Any, role: str) -> Tensor:
        """The matrix of a linear layer of the trunk with the adapter of a role in it, if it has one."""
        weight: Tensor = getattr(layer, "base_layer", layer).weight.detach()
        if role not in getattr(layer, "lora_A", ()):
            return weight
        lora = self.adapters[role]
        magnitude = layer.lora_magnitude_vector[role].weight if lora.dora else None
        a, b = layer.lora_A[role].weight, layer.lora_B[role].weight
        return merge(weight, a, b, lora.scale, magnitude, is_transposed(layer.get_base_layer()))

    def _activate(self, role: str | None) -> None:
        if self.merged_role is not None:
            role = None  # the adapter is in the matrices
        if role == self._role:
            return
        assert role is None or role in self.adapters, f"no adapter is called {role}"
        self._role = role
        for layer in self._layers:
            # not peft's own `set_adapter`, which says anew which adapters get gradients
            layer.__dict__["_active_adapter"] = [] if role is None else [role]
            layer.__dict__["_disable_adapters"] = role is None

    def keep(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the adapter that is active now, whenever it is called."""
        role = self._role

        @functools.wraps(function)
        def kept(*args: Any, **options: Any) -> Any:
            with self.using(role):
                return function(*args, **options)

        return kept

    def _bind_recomputation(self) -> None:
        for module in self.trunk.modules():
            if hasattr(module, "keep"):  # PaLM's blocks
                module.keep, module.spare = self.keep, True  # type: ignore[assignment]
            again = getattr(module, "_gradient_checkpointing_func", None)
            if again is not None:  # of transformers
                module._gradient_checkpointing_func = functools.partial(_recompute, self, again)  # type: ignore[assignment]

    # ------------------------------------------------------------------ what a network is

    def forward(self, tokens: Tensor, *, role: str | None = None, **options: Any) -> Any:
        """See `Network.forward`; with the adapter of a role."""
        assert self.merged_role in (None, role), "the matrices are those of another role"
        quiet = self.trunk.training and role not in self.trained
        if quiet:
            self.trunk.eval()
        try:
            with self.using(role):
                return self.trunk(tokens, **options)
        finally:
            if quiet:
                self.trunk.train()

    @property
    def takes_sequences(self) -> bool:  # type: ignore[override]
        return self.trunk.takes_sequences

    @property
    def in_parts(self) -> bool:  # type: ignore[override]
        return self.trunk.in_parts

    def new_cache(self, num_rows: int, length: int) -> Cache:
        """An empty cache; see `Network.new_cache`."""
        return self.trunk.new_cache(num_rows, length)

    def blocks(self) -> list[nn.Module]:
        """The trunk's blocks, each with its part of all adapters."""
        return self.trunk.blocks()

    def is_kept(self, name: str) -> bool:
        """Whether a weight is trained, and so a part of a checkpoint."""
        found = split_name(name)
        return found is not None and found[0] in self.trained

    def view(self, role: str | None, called: nn.Module | None = None) -> View | ScalarView:
        """The network of a role: a scalar one where it has a head.

        Args:
            role: None: the trunk as it is.
            called: what to call instead of this network, such as a wrapper around it.
        """
        view = View(self, role, called)
        return ScalarView(view) if role is not None and role in self.heads else view


def _inject(trunk: Network, role: str, lora: LoRA, targets: list[str]) -> None:
    import peft

    from lit_palm.models.adapted_linear import AdaptedLinear  # which needs peft

    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=targets,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        fan_in_fan_out=any(is_transposed(trunk.get_submodule(target)) for target in targets),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        peft.inject_adapter_in_model(config, trunk, role, low_cpu_mem_usage=True)
    AdaptedLinear.take_over(trunk)


def _recompute(network: AdaptedNetwork, again: Callable[..., Any], function: Any, *args: Any, **options: Any) -> Any:
    return again(network.keep(function), *args, **options)


# ---------------------------------------------------------------------------------------------- views


class View(Network):
    """The shared network with one of its adapters, as a network of its own.

    It is none of the shared network's parts, and holds it as its own: modes and devices are those of the trunk. One
    that is not trained always runs as in evaluation, and leaves the mode of the others alone.
    """

    def __init__(self, shared: AdaptedNetwork, role: str | None, called: nn.Module | None = None) -> None:
        super().__init__()
        self.shared = called if called is not None else shared
        self.config, self.role, self.trained = shared.config, role, role in shared.trained
        self.takes_sequences = shared.takes_sequences  # type: ignore[misc]
        self.__dict__["adapted"] = shared
        self.lora: dict[str, Any] | None = None
        """What a checkpoint says of the adapter and of what it stands on; set by the host."""

    adapted: AdaptedNetwork

    def forward(self, tokens: Tensor, **options: Any) -> Any:
        """See `Network.forward`."""
        return self.shared(tokens, role=self.role, **options)

    def new_cache(self, num_rows: int, length: int) -> Cache:
        """An empty cache; see `Network.new_cache`."""
        return self.adapted.new_cache(num_rows, length)

    def blocks(self) -> list[nn.Module]:
        """The trunk's blocks."""
        return self.adapted.blocks()

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.trained and self.adapted.training

    @training.setter
    def training(self, mode: bool) -> None:
        """What a view's mode is, its trunk says."""

    def train(self, mode: bool = True) -> View:
        return super().train(mode) if self.trained else self

    def requires_grad_(self, requires_grad: bool = True) -> View:
        return self  # the shared network says which of its weights are trained


class ScalarView(ScalarNetwork):
    """A view with a scalar head; see `View` and `ScalarNetwork`."""

    trunk: View  # type: ignore[assignment]

    def __init__(self, trunk: View) -> None:
        nn.Module.__init__(self)
        assert trunk.role is not None
        self.trunk = trunk  # type: ignore[assignment]
        part = trunk.adapted.heads[trunk.role]
        assert isinstance(part, Head)
        self.part, self.pooling = part, part.pooling
        self.dropped = frozenset()

    @property
    def head(self) -> nn.Linear:  # type: ignore[override]
        return self.part.head

    @property
    def offset(self) -> Tensor:  # type: ignore[override]
        return self.part.offset

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        return self.part.scale

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.trunk.training

    @training.setter
    def training(self, mode: bool) -> None:
        """See `View.training`."""

    def train(self, mode: bool = True) -> ScalarView:
        return super().train(mode) if self.trunk.trained else self

    def requires_grad_(self, requires_grad: bool = True) -> ScalarView:
        return self


def is_view(network: nn.Module) -> bool:
    """Whether a network is a view of one that others share."""
    return isinstance(network, View | ScalarView)


def sampling_from(network: nn.Module) -> AbstractContextManager[None]:
    """What completions of a network are sampled in: its adapter is merged, if its settings say so."""
    if isinstance(network, View) and network.role is not None and network.shared is network.adapted:
        if network.adapted.adapters[network.role].merge_to_sample:
            return network.adapted.merged(network.role)
    return nullcontext()
