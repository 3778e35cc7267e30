"""One frozen network with the adapters of several roles, described before it is made, and held by role once it is."""

from __future__ import annotations

import re
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_palm.models.adapted import AdaptedNetwork
from lit_palm.models.base import Network
from lit_palm.models.lora import Bits, LoRA, is_transposed, split_name
from lit_palm.models.quantized import quantize
from lit_palm.models.weights import Source, fill, give_memory, named_weights, normal_rows
from lit_palm.modules.adapters import HEAD, whole_weight
from lit_palm.modules.spread import Networks
from lit_palm.modules.weights import Blueprint
from lit_palm.parallel.sharded import bare, clean_name

__all__ = ["Adapter", "SharedBlueprint", "SharedNetworks"]


@dataclass
class Adapter:
    """An adapter to be put on a trunk.

    Args:
        lora: what it is like.
        weights: what it starts with, and its head; what they do not have is fresh.
        pooling: how its scalar head reads; None: it has none.
        trained: it is trained.
        where: where its weights are from, for messages.
    """

    lora: LoRA
    weights: Source | None = None
    pooling: Literal["last", "mean"] | None = None
    trained: bool = True
    where: str = "the new adapter"


@dataclass
class SharedBlueprint(Blueprint):
    """An `AdaptedNetwork` to be made.

    Args:
        trunk: the frozen network.
        adapters: by role.
    """

    trunk: Blueprint = field(kw_only=True)
    adapters: dict[str, Adapter] = field(kw_only=True)

    @property
    def in_parts(self) -> bool:
        return self.trunk.in_parts

    @property
    def bits(self) -> Bits | None:
        """What the frozen matrices are kept in."""
        return next((adapter.lora.quantize for adapter in self.adapters.values()), None)

    def on(self, network: nn.Module) -> AdaptedNetwork:
        """Put the adapters on a network; they are on the meta device."""
        return AdaptedNetwork(
            network,  # type: ignore[arg-type]
            {role: adapter.lora for role, adapter in self.adapters.items()},
            {role: adapter.pooling for role, adapter in self.adapters.items() if adapter.pooling is not None},
            [role for role, adapter in self.adapters.items() if adapter.trained],
        )

    def structure(self) -> nn.Module:
        return self.on(self.trunk.structure())

    @property
    def source(self) -> Source:  # type: ignore[override]
        return _Shared(self)

    def whole(self) -> nn.Module:
        source, device = self.source, torch.get_default_device()  # refuses what does not fit before memory is taken
        trunk = self.trunk.whole()
        if self.bits is not None:
            assert isinstance(trunk, Network)
            quantize(trunk, self.bits)
        network = self.on(trunk)
        fill(network, source, only=give_memory(network, device))
        return network


class _Shared(Source):
    """The weights of trunk, adapters and heads.

    Raises:
        ValueError: weights that an adapter starts with do not fit.
    """

    def __init__(self, found: SharedBlueprint) -> None:
        self.found = found
        self.shapes = {name: tuple(tensor.shape) for name, tensor in named_weights(found.empty)}
        self.stored = {role: set(a.weights.names()) if a.weights else set() for role, a in found.adapters.items()}
        for name, shape in self.shapes.items():
            role, own = split_name(name) or ("", "")
            adapter = found.adapters.get(role)
            if adapter is None or adapter.weights is None:
                continue
            there = adapter.weights.shape(own) if own in self.stored[role] else None
            if there is None and own not in HEAD and self.has_adapter(role):
                raise ValueError(f"{adapter.where}: lacks {own}: was it trained with other targets, or without DoRA?")
            if there is not None and tuple(there) != shape:
                raise ValueError(f"{adapter.where}: {own} is {tuple(there)} there, {shape} here: is its rank another?")

        for role, names in self.stored.items():
            places = {split[1] for name in self.shapes if (split := split_name(name)) and split[0] == role}
            lost = sorted(name for name in names - places if name not in HEAD)
            if lost:
                raise ValueError(f"{found.adapters[role].where}: has {lost[0]}, which the network has no place for")

    def has_adapter(self, role: str) -> bool:
        """Whether an adapter starts with stored weights, and not only its head."""
        return any(".lora_" in name for name in self.stored[role])

    def names(self) -> Iterable[str]:
        return self.shapes

    def shape(self, name: str) -> Sequence[int]:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        found = split_name(name)
        if found is None:
            return self.found.trunk.source.rows(base_name(name), start, stop)
        role, own = found
        weights = self.found.adapters[role].weights
        if weights is not None and own in self.stored[role]:
            return weights.rows(own, start, stop)
        return self._fresh(name, own, start, stop)

    def _fresh(self, name: str, own: str, start: int, stop: int) -> Tensor:
        shape = self.shapes[name]
        if ".lora_magnitude_vector." in own:
            return self._norms(own.partition(".lora_magnitude_vector.")[0])[start:stop]
        if own.endswith("lora_A.weight"):  # the variance of peft's uniform numbers
            return normal_rows(self.found.seed, name, shape, (3 * shape[1]) ** -0.5, start, stop)
        if own == "head.weight":
            return normal_rows(self.found.seed, name, shape, (shape[1] + 1) ** -0.5, start, stop)
        value = 1.0 if own == "scale" else 0.0
        return torch.full((stop - start, *shape[1:]) if shape else (), value)

    def _norms(self, layer: str) -> Tensor:
        """The length of each row of a frozen matrix, where DoRA's magnitude starts."""
        trunk = self.found.trunk
        weight = whole_weight(trunk.source, f"{layer}.weight")
        return torch.linalg.norm(weight.float(), dim=0 if is_transposed(trunk.empty.get_submodule(layer)) else 1)


def base_name(name: str) -> str:
    """The name in the trunk of one of its weights."""
    return re.sub(r"\.base_layer\.", ".", name.removeprefix("trunk."))


# ---------------------------------------------------------------------------------------------- holding


class SharedNetworks(Networks):
    """Networks by role that are views of a shared one, which alone is a module of the tree, as `shared`.

    Only what is trained is in the state dictionary: adapters and heads. The trunk, and adapters that stay as they are,
    come from elsewhere.

    Args:
        shared: the `AdaptedNetwork`, or what a strategy wrapped it in.
        roles: the views of the trained roles.
    """

    def __init__(self, shared: nn.Module, roles: Mapping[str, nn.Module]) -> None:
        super().__init__({"shared": shared})
        self.__dict__["roles"] = dict(roles)
        # out here, since FSDP1 counts what is in the dictionary of the module it wraps
        self.register_state_dict_post_hook(_drop_what_is_not_kept)
        self.register_load_state_dict_post_hook(_miss_nothing_else)

    roles: dict[str, nn.Module]

    @property
    def root(self) -> nn.Module:
        """The shared network as it is called."""
        found = self._modules["shared"]
        assert found is not None
        return found

    @property
    def adapted(self) -> AdaptedNetwork:
        """The shared network itself."""
        found = bare(self.root)
        assert isinstance(found, AdaptedNetwork)
        return found

    def __getitem__(self, key: str) -> nn.Module:
        return self.roles[key]

    def __len__(self) -> int:
        return len(self.roles)

    def __iter__(self) -> Iterator[str]:
        return iter(self.roles)

    def __contains__(self, key: object) -> bool:
        return key in self.roles

    def keys(self) -> KeysView[str]:
        return self.roles.keys()

    def items(self) -> ItemsView[str, nn.Module]:
        return self.roles.items()

    def values(self) -> ValuesView[nn.Module]:
        return self.roles.values()

    def sampled(self) -> nn.Module | None:
        return self.root if "policy" in self.roles else None

    def parameters_of(self, role: str) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.root.named_parameters():
            found = split_name(clean_name(name))
            if found is not None and found[0] == role:
                yield name, parameter


def _drop_what_is_not_kept(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(module, SharedNetworks)
    for name in [name for name in state if name.startswith(prefix) and not module.adapted.is_kept(name)]:
        del state[name]


def _miss_nothing_else(module: nn.Module, keys: Any) -> None:
    assert isinstance(module, SharedNetworks)
    keys.missing_keys[:] = [
        key for key in keys.missing_keys if ".shared." not in f".{key}" or module.adapted.is_kept(clean_name(key))
    ]
