"""From a configuration or a checkpoint to a network: what to build, and where its weights come from.

A `Blueprint` is both, before anything is in memory. `whole()` makes the network as one; a strategy that spreads
networks over processes makes its part of it from the same blueprint (`lit_palm.modules.sharding`). Two networks of one
blueprint start with the same weights, as a policy and its reference must.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from lit_palm.models.base import Network, NetworkConfig, ScalarNetwork
from lit_palm.models.weights import Fresh, Source, fill, fresh_seed, give_memory, named_weights
from lit_palm.modules.checkpoint import Role, config_from_dict, read_checkpoint
from lit_palm.modules.layouts import open_weights
from lit_palm.parallel.sharded import clean_name
from lit_palm.parallel.tensor import Joined

if TYPE_CHECKING:
    from lit_palm.modules.adapters import Adapted

__all__ = ["Below", "Blueprint", "Stored", "blueprint", "check_fit", "fingerprint", "load_network", "over"]


class Stored(Source):
    """The weights of one network of a checkpoint, read when they are asked for.

    Args:
        path: of the checkpoint.
        role: of the network there.
    """

    def __init__(self, path: str, role: str) -> None:
        with open_weights(path) as weights:
            self.weights, self.prefix = Joined(weights), f"networks.{role}."
        self._last: tuple[str, Tensor] | None = None

    def names(self) -> Iterable[str]:
        return [name.removeprefix(self.prefix) for name in self.weights if name.startswith(self.prefix)]

    def shape(self, name: str) -> Sequence[int]:
        return self.weights.shape(self.prefix + name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self._last is None or self._last[0] != name:  # where one is put together from shards, only one at a time
            self._last = name, self.weights[self.prefix + name]
        weight = self._last[1]
        return weight[start:stop] if weight.dim() else weight


class Below(Source):
    """The weights of a source below a prefix, such as those of the trunk of a scalar network.

    Args:
        source: has them.
        prefix: of their names there.
    """

    def __init__(self, source: Source, prefix: str) -> None:
        self.source, self.prefix = source, prefix

    def names(self) -> Iterable[str]:
        return [n.removeprefix(self.prefix) for n in self.source.names() if n.startswith(self.prefix)]

    def shape(self, name: str) -> Sequence[int]:
        return self.source.shape(self.prefix + name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.rows(self.prefix + name, start, stop)


class _Parts(Source):
    """A network some parts of which come from elsewhere: a scalar network whose trunk is a language model's.

    Args:
        parts: their sources, by what the names of their weights begin with.
        rest: has all weights, of which those of the parts are not asked for.
        dropped: names of weights of parts that this network does without.
    """

    def __init__(self, parts: dict[str, Source], rest: Source, dropped: Collection[str] = ()) -> None:
        self.parts, self.rest, self.dropped = parts, rest, dropped

    def _of(self, name: str) -> tuple[Source, str]:
        start = self.start_of(name)
        return (self.rest, name) if start is None else (self.parts[start], name.removeprefix(start))

    def start_of(self, name: str) -> str | None:
        """What the names of the part begin with that a weight belongs to; None: to none."""
        return next((start for start in self.parts if name.startswith(start)), None)

    def names(self) -> Iterable[str]:
        theirs = (f"{start}{name}" for start, source in self.parts.items() for name in source.names())
        theirs = (name for name in theirs if name not in self.dropped)
        return [*theirs, *(name for name in self.rest.names() if self.start_of(name) is None)]

    def shape(self, name: str) -> Sequence[int]:
        source, inner = self._of(name)
        return source.shape(inner)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        source, inner = self._of(name)
        return source.rows(inner, start, stop)


@dataclass
class Blueprint:
    """A network to be made.

    Args:
        config: of the network, or of the trunk below a scalar head.
        seed: of what is fresh in it.
        pooling: how a scalar head reads; None: no scalar head.
        stored: the weights of a checkpoint; None: fresh ones.
        trunk_only: `stored` are those of a language model, below a fresh scalar head.
        where: what it comes from, for messages.
        headless: a language model without the weights that only logits need, as below a scalar head.
        role: what the network is in the checkpoint that `where` names.
        adapted: the frozen network and the adapter that `stored` puts together, of a checkpoint of LoRA.
        unfrozen: blocks that are trained, of the topmost; None: all.
    """

    config: NetworkConfig
    seed: int
    pooling: Literal["last", "mean"] | None = None
    stored: Source | None = None
    trunk_only: bool = False
    where: str = "the new network"
    headless: bool = False
    role: str | None = None
    adapted: Adapted | None = None
    unfrozen: int | None = None

    def structure(self) -> nn.Module:
        """The network on the current device, with weights that mean nothing."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # one that cannot be made in parts draws its weights here
            network = self.config.build()
            if self.headless:
                network.drop_output()
            if self.unfrozen is not None:
                freeze_below(network, self.unfrozen)
            return network if self.pooling is None else ScalarNetwork(network, self.pooling)

    @cached_property
    def empty(self) -> nn.Module:
        """The network on the meta device: names and shapes."""
        with torch.device("meta"):
            return self.structure()

    @property
    def in_parts(self) -> bool:
        """Whether a process can make its part alone."""
        trunk = self.empty.trunk if isinstance(self.empty, ScalarNetwork) else self.empty
        loaded = self.stored is not None or (self.pooling is None and bool(self.config.starts))
        return isinstance(trunk, Network) and (trunk.in_parts or (loaded and trunk.loads_in_parts))

    @cached_property
    def source(self) -> Source:
        """Where its weights come from.

        Raises:
            ValueError: those of the checkpoint do not fit the network.
        """
        if self.stored is None and self.pooling is None and self.config.starts:
            source: Source = _Parts(self._started(), Fresh(self.empty, self.seed))
        elif self.pooling is None or (self.stored is not None and not self.trunk_only):
            source = self.stored or Fresh(self.empty, self.seed)
        else:
            assert isinstance(self.empty, ScalarNetwork)
            # named as the language model's own: a value network starts with the policy's weights
            trunk = self.stored or Fresh(self.empty.trunk, self.seed)
            dropped = [f"trunk.{name}" for name in self.empty.dropped]
            source = _Parts({"trunk.": trunk}, Fresh(self.empty, self.seed), dropped)
        check_fit(self.empty, source, self.where)
        return source

    def _started(self) -> dict[str, Source]:
        """The parts of a new network that start as those of checkpoints.

        Raises:
            ValueError: a checkpoint holds no language model.
        """
        found: dict[str, Source] = {}
        for start, path in self.config.starts.items():
            inner = blueprint(path)
            assert inner.stored is not None
            found[start] = inner.stored
        return found

    def whole(self) -> nn.Module:
        """Make the network as one, on the current device."""
        if not self.in_parts:
            network = self.structure()
            if self.stored is not None:
                fill(network, self.source)
            elif isinstance(self.source, _Parts) and self.pooling is None:  # what is fresh has been drawn
                parts = self.source
                fill(network, parts, only=[name for name in parts.names() if parts.start_of(name) is not None])
            return network
        source = self.source  # refuses what does not fit before any memory is taken
        device = torch.get_default_device()
        with torch.device("meta"):
            network = self.structure()
        give_memory(network, device)
        fill(network, source)
        return network


def blueprint(
    network: str | os.PathLike[str] | NetworkConfig, role: Role = "policy", overrides: dict[str, Any] | None = None
) -> Blueprint:
    """The network of a role, from a configuration or a checkpoint; see `load_network`.

    Raises:
        ValueError: as `read_checkpoint`, or the checkpoint has no network that can play the role.
    """
    seed = fresh_seed()
    if isinstance(network, NetworkConfig):
        return Blueprint(network, seed, None if role == "policy" else "last")
    path = os.fspath(network)
    checkpoint = read_checkpoint(path, header_only=True)
    networks = checkpoint.header["networks"]
    sources = {"policy": ("policy",), "reward": ("reward",), "value": ("value", "reward", "policy")}[role]
    there = next((s for s in sources if s in networks), None)
    if there is None:
        raise ValueError(f"{path}: holds {', '.join(networks)}, none of which can be used as {role}")
    config = config_from_dict(networks[there], path)
    fixed = sorted((overrides or {}).keys() - config.CHANGEABLE)
    if fixed:
        raise ValueError(
            f"{path}: {', '.join(fixed)} cannot be changed once a network is trained; what can be is "
            f"{', '.join(sorted(config.CHANGEABLE))}"
        )
    config = dataclasses.replace(config, **(overrides or {}))  # type: ignore[type-var]
    pooling = None if role == "policy" else networks[there].get("pooling", "last")
    found = Blueprint(config, seed, pooling, where=path, role=there)
    found.trunk_only = pooling is not None and there == "policy"
    if "lora" in networks[there]:
        from lit_palm.modules.adapters import Merged, read_adapted

        found.adapted = read_adapted(checkpoint, there, config)
        found.stored = Merged(found.adapted, scalar=pooling is not None and there != "policy")
    else:
        found.stored = Stored(checkpoint.path, there)
    return found


def freeze_below(network: Network, count: int) -> None:
    """Train nothing below the topmost `count` blocks: neither the other blocks nor embeddings, to which a tied output
    weight belongs. What stands above the blocks is trained in any case.

    Raises:
        ValueError: there are fewer blocks.
    """
    blocks = network.blocks()
    if not 0 <= count <= len(blocks):
        raise ValueError(
            f"model.unfrozen_layers is {count}: choose from 0 to the network's {len(blocks)} blocks, or null"
        )
    for module in [*blocks[: len(blocks) - count], *(m for m in network.modules() if isinstance(m, nn.Embedding))]:
        module.requires_grad_(False)


def over(trunk: Blueprint, pooling: Literal["last", "mean"] = "last") -> Blueprint:
    """A scalar network that starts with the weights of a language model."""
    return dataclasses.replace(trunk, pooling=pooling, trunk_only=trunk.stored is not None)


def load_network(
    path: str | os.PathLike[str], role: Role = "policy", overrides: dict[str, Any] | None = None
) -> Network | ScalarNetwork:
    """Build the network of a role from a checkpoint and load its weights.

    A `policy` is a language model (the language model and the policy module both call it that); `reward` and `value`
    are scalar networks. A value network may be taken from a reward model, or from a language model (its trunk, with a
    fresh head); a reward only from a reward model, since a fresh head would score at random.

    Args:
        path: checkpoint file, sharded directory or exported folder.
        role: what the network is to be.
        overrides: fields of its configuration to change, such as dropout; only those that no weight depends on.

    Raises:
        ValueError: as `read_checkpoint`, or the checkpoint has no network that can play the role.
    """
    network = blueprint(path, role, overrides).whole()
    assert isinstance(network, Network | ScalarNetwork)
    return network


def check_fit(network: nn.Module, source: Source, where: str) -> None:
    """Refuse weights that do not fit.

    Raises:
        ValueError: names or shapes differ.
    """
    own = {name: tuple(tensor.shape) for name, tensor in named_weights(network)}
    there = {name: tuple(source.shape(name)) for name in source.names()}
    missing, unknown = sorted(own.keys() - there.keys()), sorted(there.keys() - own.keys())
    wrong = [f"{k}: {there[k]} there, {own[k]} here" for k in own.keys() & there.keys() if own[k] != there[k]]
    parts = [
        f"{label} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for label, names in (("lacks", missing), ("has unknown", unknown), ("differs in", sorted(wrong)))
        if names
    ]
    if parts:
        raise ValueError(f"{where}: does not fit the network: {'; '.join(parts)}. Was it written with another shape?")


def fingerprint(network: nn.Module, found: Blueprint) -> str:
    """sha256 of names, shapes and float64 sums of the weights: cheap, and equal only for equal weights in practice.

    Spread weights are summed over the processes that hold them, so it takes all of them to call it.
    """
    wrapped = next((module for module in network.modules() if isinstance(module, FSDP)), None)
    totals: dict[str, Tensor] = {}
    for name, tensor in named_weights(network):
        sums = [value.sum(dtype=torch.float64) for value in (tensor.detach(), tensor.detach().double().square())]
        whole = [total.full_tensor() if isinstance(total, DTensor) else total for total in sums]
        totals[clean_name(name)] = torch.stack(whole)
    if wrapped is not None:  # of FSDP1's flat parts each process has some numbers
        joined = torch.stack(list(totals.values()))
        dist.all_reduce(joined, group=wrapped.process_group)
        totals = dict(zip(totals, joined, strict=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in named_weights(found.empty)}
    digest = hashlib.sha256()
    for name, total in sorted(totals.items()):
        digest.update(f"{name}{shapes.get(name, ())}{total[0].item():.9e}{total[1].item():.9e}".encode())
    return digest.hexdigest()
