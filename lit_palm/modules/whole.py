"""The weights of one network of a checkpoint by name, whole, whatever form the checkpoint keeps them in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from torch import Tensor

from lit_palm.modules.checkpoint import Role
from lit_palm.modules.weights import blueprint

__all__ = ["WholeWeights"]


class WholeWeights(Mapping[str, Tensor]):
    """Weights by name, each read when it is asked for, or put together from an adapter and what it stands on.

    Args:
        path: of the checkpoint.
        role: of the network there.

    Raises:
        ValueError: as `blueprint`, or the weights do not fit the network.
    """

    def __init__(self, path: str | os.PathLike[str], role: Role) -> None:
        self._source = blueprint(path, role).source
        self._known = dict.fromkeys(self._source.names())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        shape = tuple(self._source.shape(name))
        return self._source.rows(name, 0, shape[0] if shape else 1).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
