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

from lit_palm.foreign.safetensors_files import SafetensorsFiles
from lit_palm.models.base import Network
from lit_palm.models.weights import named_weights
from lit_palm.serve.protocol import APIError, Strict

__all__ = ["UpdateRequest", "folder_below", "load_weights"]


class UpdateRequest(Strict):
    """The body of `/update_weights_from_disk`."""

    model_config = ConfigDict(protected_namespaces=())

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
        raise _refused(f"{folder} holds no safetensors files")
    try:
        found = SafetensorsFiles(files)
    except ValueError as error:
        raise _refused(str(error)) from error
    own = dict(named_weights(network))
    for name in found:
        if name not in own:
            raise _refused(f"{folder}: {name} is no weight of the network that is served")
        if found.shape(name) != tuple(own[name].shape):
            raise _refused(
                f"{folder}: {name} has the shape {list(found.shape(name))}, in the network it is "
                f"{list(own[name].shape)}: the server must have been started from a checkpoint of the same network"
            )
    if lacking := sorted(own.keys() - found.keys()):
        raise _refused(f"{folder} lacks {_some(lacking)}, which the network has")
    for name, tensor in found.items():
        own[name].copy_(tensor)


def _refused(why: str) -> APIError:
    return APIError(400, why, "model_path", "invalid_value")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
