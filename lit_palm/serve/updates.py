"""New weights for the network that is served, for trainers whose completions come from here.

Off unless `--weight_updates DIR` names a folder. Then `POST /update_weights_from_disk {"model_path": FOLDER,
"weight_version": NAME}`, as SGLang has it, takes the safetensors files of a folder below DIR: nothing else is read, and
nothing that could run code. The weights must have the names and shapes of the network's, and are looked at as a whole
before the first is changed.

A completion comes from one version: rows that are under way end on the weights they began with, those asked for later
wait for the new ones.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from pydantic import ConfigDict
from safetensors import SafetensorError, safe_open

from lit_palm.models.base import Network
from lit_palm.models.weights import named_weights
from lit_palm.serve.protocol import APIError, _Strict

__all__ = ["UpdateRequest", "folder_below", "load_weights"]


class UpdateRequest(_Strict):
    """The body of `/update_weights_from_disk`."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    model_path: str
    weight_version: str | None = None
    flush_cache: bool | None = None
    """Accepted: nothing is remembered of earlier prompts."""
    load_format: None = None
    abort_all_requests: bool | None = None

    def refuse_unsupported(self) -> None:
        """Raise `APIError` for what would change the answer."""
        if self.abort_all_requests:
            raise APIError(400, "abort_all_requests is not supported: rows under way end first", "abort_all_requests")


def folder_below(root: str, path: str) -> str:
    """The folder of a request, if it lies below the one that updates may come from, links followed.

    Raises:
        APIError: 403, it does not.
    """
    base, found = os.path.realpath(root), os.path.realpath(path)
    if not os.path.isabs(path) or not found.startswith(base + os.sep):
        raise APIError(403, f"model_path must name a folder below {root}, from its root on", "model_path", "forbidden")
    return found


@torch.no_grad()
def load_weights(network: Network, folder: str) -> None:
    """Replace the weights of a network by those in a folder.

    Args:
        network: changed in place, once all that is in the folder has been found to fit.
        folder: holds safetensors files with the network's weights by their names, each once.

    Raises:
        APIError: 400, naming the file or weight at fault; the network is as it was.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise APIError(400, f"{folder} holds no safetensors files", "model_path", "invalid_value")
    own = dict(named_weights(network))
    places: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    _check(name, tuple(opened.get_slice(name).get_shape()), own, places, file)
                    places[name] = file
        except (SafetensorError, OSError) as error:
            raise APIError(400, f"{file} cannot be read as safetensors ({error})", "model_path") from error
    if lacking := sorted(own.keys() - places.keys()):
        raise APIError(400, f"{folder} lacks {_some(lacking)}, which the network has", "model_path", "invalid_value")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                own[name].copy_(opened.get_tensor(name))


def _check(
    name: str, shape: tuple[int, ...], own: dict[str, torch.Tensor], places: dict[str, Path], file: Path
) -> None:
    if name not in own:
        raise APIError(400, f"{file}: {name} is no weight of the network that is served", "model_path", "invalid_value")
    if name in places:
        raise APIError(400, f"{file}: {name} is in {places[name].name} too", "model_path", "invalid_value")
    if shape != tuple(own[name].shape):
        raise APIError(
            400,
            f"{file}: {name} has the shape {list(shape)}, in the network it is {list(own[name].shape)}: the server "
            "must have been started from a checkpoint of the same network",
            "model_path",
            "invalid_value",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
