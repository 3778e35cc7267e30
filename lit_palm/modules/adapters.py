"""Adapters in checkpoints: what they stand on, how they are read, and whole weights out of both.

A checkpoint of LoRA holds adapters and heads. Each of its networks says in `lora` what its adapter is like and what
`base` it stands on: where those weights are (or the seed they were drawn from), and a fingerprint of them. Whoever asks
for the network's weights gets them put together (`Merged`), so that every stage can start from such a checkpoint, and
`generate` and `export` read it as any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_palm.models.base import NetworkConfig
from lit_palm.models.lora import LoRA, is_transposed, last_names, merge, split_name
from lit_palm.models.weights import CHUNK, Source, named_weights
from lit_palm.modules.checkpoint import BASE_VARIABLE, Checkpoint
from lit_palm.modules.layouts import open_weights
from lit_palm.modules.storage import is_local
from lit_palm.modules.weights import Below, Blueprint, blueprint

__all__ = [
    "HEAD",
    "Adapted",
    "Base",
    "HeadWeights",
    "Merged",
    "base_of",
    "described",
    "fingerprint_of",
    "read_adapted",
    "trunk_of",
    "whole_weight",
]

HEAD = ("head.weight", "head.bias", "offset", "scale")
"""What a scalar network has over its trunk."""


@dataclass
class Base:
    """The frozen weights that adapters stand on."""

    path: str | None
    """The checkpoint they are in; None: they were drawn from `seed`."""
    role: str = "policy"
    """Which network of that checkpoint they are, or are the trunk of."""
    seed: int | None = None
    fingerprint: str | None = None
    """Of the weights; None: not known yet."""

    def blueprint(self, config: NetworkConfig, where: str) -> Blueprint:
        """The frozen network.

        Args:
            config: its configuration.
            where: the checkpoint of the adapters, for messages.

        Raises:
            ValueError: the base is not where it was.
        """
        if self.path is None:
            assert self.seed is not None
            return Blueprint(config, self.seed, where=f"the base of {where}")
        path = os.environ.get(BASE_VARIABLE) or self.path
        if os.path.isabs(path) and not os.path.exists(path):
            raise ValueError(
                f"{where}: is a LoRA checkpoint on the weights of {path}, which does not exist: put that back, or say "
                f"where it is now with the environment variable {BASE_VARIABLE}"
            )
        found = trunk_of(blueprint(path, self.role))  # type: ignore[arg-type]
        return dataclasses.replace(found, config=config)

    def verify(self, trunk: Blueprint, where: str) -> None:
        """Compare the fingerprint of a frozen network, or remember it if there is none yet.

        Raises:
            ValueError: these are other weights than the adapters were trained on.
        """
        found = fingerprint_of(trunk)
        if self.fingerprint not in (None, found):
            raise ValueError(
                f"{where}: is a LoRA checkpoint on the weights of {trunk.where}, which have changed since it was "
                "trained: bring back the file it was trained on, or say where that is with the environment variable "
                f"{BASE_VARIABLE}"
            )
        self.fingerprint = found

    def is_same(self, other: Base, own: Blueprint, theirs: Blueprint) -> bool:
        """Whether two are the same weights; both are read where their names do not tell."""
        if (self.path, self.role, self.seed) == (other.path, other.role, other.seed):
            return True
        mine = self.fingerprint or fingerprint_of(own)
        return mine == (other.fingerprint or fingerprint_of(theirs))


def base_of(found: Blueprint) -> Base:
    """The weights that adapters of a network stand on, if it has none yet: its own, without a scalar head."""
    if found.adapted is not None:
        return found.adapted.base
    if found.stored is None:
        return Base(None, seed=found.seed)
    # a name on the hub or a URL stays what it is
    path = os.path.abspath(found.where) if is_local(found.where) and os.path.exists(found.where) else found.where
    return Base(path, found.role or "policy")


def trunk_of(found: Blueprint) -> Blueprint:
    """The frozen network that adapters of a network stand on."""
    if found.adapted is not None:
        return dataclasses.replace(found.adapted.trunk, config=found.config)
    whole = found.pooling is not None and found.stored is not None and not found.trunk_only
    stored = Below(found.stored, "trunk.") if whole and found.stored is not None else found.stored
    return dataclasses.replace(found, pooling=None, stored=stored, trunk_only=False, headless=whole)


def fingerprint_of(trunk: Blueprint) -> str:
    """sha256 of names, shapes and float64 sums of stored weights, whatever precision and places they are loaded to."""
    if trunk.stored is None and not trunk.in_parts:
        weights = dict(named_weights(trunk.whole()))
        return _digest((name, [tensor]) for name, tensor in sorted(weights.items()))
    source = trunk.source

    def pieces(name: str) -> Iterable[Tensor]:
        shape = source.shape(name)
        rows, step = (shape[0] if shape else 1), max(1, CHUNK // max(math.prod(shape[1:]), 1))
        for start in range(0, rows, step):
            yield source.rows(name, start, min(start + step, rows))

    return _digest((name, pieces(name)) for name in sorted(source.names()))


def _digest(weights: Iterable[tuple[str, Iterable[Tensor]]]) -> str:
    digest = hashlib.sha256()
    for name, pieces in weights:
        count, total, squares = 0, 0.0, 0.0
        for piece in pieces:
            wide = piece.detach().double()
            count, total = count + wide.numel(), total + float(wide.sum())
            squares += float(wide.square().sum())
        digest.update(f"{name} {count} {total:.9e} {squares:.9e}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- reading


class AdapterWeights(Source):
    """The adapter of one role of a checkpoint, and its scalar head if it has one, without the role in their names.

    Args:
        path: of the checkpoint.
        role: of the network there.
    """

    def __init__(self, path: str, role: str) -> None:
        with open_weights(path) as weights:
            self.weights = weights
        self.keys = {found[1]: key for key in weights if (found := split_name(key)) and found[0] == role}

    def names(self) -> Iterable[str]:
        return self.keys

    def shape(self, name: str) -> Sequence[int]:
        of: Any = getattr(self.weights, "shape", lambda key: tuple(self.weights[key].shape))
        return tuple(of(self.keys[name]))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        weight = self.weights[self.keys[name]]
        return weight[start:stop] if weight.dim() else weight


class HeadWeights(Source):
    """The scalar head of a network of whole weights."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def names(self) -> Iterable[str]:
        return HEAD

    def shape(self, name: str) -> Sequence[int]:
        return self.source.shape(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.source.rows(name, start, stop)


@dataclass
class Adapted:
    """A network of a LoRA checkpoint.

    Args:
        base: what it stands on.
        trunk: the frozen network.
        lora: what the adapter is like, with its targets named.
        weights: of the adapter, and of the scalar head.
        where: the checkpoint, for messages.
    """

    base: Base
    trunk: Blueprint
    lora: LoRA
    weights: Source
    where: str


def read_adapted(checkpoint: Checkpoint, role: str, config: NetworkConfig) -> Adapted:
    """What the network of a role is made of.

    Args:
        checkpoint: a LoRA checkpoint, as read.
        role: of the network there.
        config: its configuration.

    Raises:
        ValueError: the base is not where it was, or the checkpoint was written by another version.
    """
    where = checkpoint.path
    entry = dict(checkpoint.header["networks"][role]["lora"])
    try:
        base = Base(**entry.pop("base"))
        lora = LoRA(**entry)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: its LoRA was written by another version of lit_palm ({error})") from error
    return Adapted(base, base.blueprint(config, where), lora, AdapterWeights(where, role), where)


class Merged(Source):
    """The whole weights of a network of a LoRA checkpoint, put together one at a time when they are asked for.

    Args:
        found: the network.
        scalar: it has a scalar head.
    """

    def __init__(self, found: Adapted, scalar: bool) -> None:
        self.found, self.prefix = found, "trunk." if scalar else ""
        names = set(found.weights.names())
        self.head = [name for name in HEAD if name in names]
        self.layers = {name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")}
        self._last: tuple[str, Tensor] | None = None
        self._verified = False

    @cached_property
    def dropped(self) -> frozenset[str]:
        """The trunk's weights that a scalar network does without."""
        with torch.device("meta"):
            return frozenset(self.found.trunk.config.build().drop_output()) if self.prefix else frozenset()

    def names(self) -> Iterable[str]:
        own = (name for name in self.found.trunk.source.names() if name not in self.dropped)
        return [*(self.prefix + name for name in own), *self.head]

    def shape(self, name: str) -> Sequence[int]:
        if name in self.head:
            return self.found.weights.shape(name)
        return self.found.trunk.source.shape(name.removeprefix(self.prefix))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if not self._verified:
            self.found.base.verify(self.found.trunk, self.found.where)
            self._verified = True
        if name in self.head:
            return self.found.weights.rows(name, start, stop)
        name = name.removeprefix(self.prefix)
        layer, _, own = name.rpartition(".")
        if own != "weight" or layer not in self.layers:
            return self.found.trunk.source.rows(name, start, stop)
        if self._last is None or self._last[0] != name:
            self._last = name, self._merge(layer, name)
        return self._last[1][start:stop]

    def _merge(self, layer: str, name: str) -> Tensor:
        trunk, lora = self.found.trunk, self.found.lora
        transposed = is_transposed(trunk.empty.get_submodule(layer))
        magnitude = self._of(f"{layer}.lora_magnitude_vector.weight") if lora.dora else None
        a, b = (self._of(f"{layer}.lora_{part}.weight") for part in "AB")
        if len(a) != lora.rank:
            raise ValueError(
                f"{self.found.where}: the adapter of {layer} has rank {len(a)}, not {lora.rank} as it says"
            )
        return merge(whole_weight(trunk.source, name), a, b, lora.scale, magnitude, transposed)

    def _of(self, name: str) -> Tensor:
        return whole_weight(self.found.weights, name)


def whole_weight(source: Source, name: str) -> Tensor:
    """One weight of a source."""
    return source.rows(name, 0, source.shape(name)[0])


def described(lora: LoRA, targets: Sequence[str], base: Base) -> dict[str, Any]:
    """The `lora` entry of a network in a checkpoint."""
    entry = dataclasses.asdict(dataclasses.replace(lora, targets=last_names(targets)))
    return entry | {"base": dataclasses.asdict(base)}
