"""The safetensors files of a Hugging Face folder, one or several with an index, read tensor by tensor."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["SafetensorsFiles", "index_of"]

INDEX = "model.safetensors.index.json"


def index_of(folder: Path) -> dict[str, Path] | list[Path]:
    """Which file of a folder holds which tensor, or the files where no index says so.

    Raises:
        ValueError: there are no safetensors files, or the index names one that is missing.
    """
    if (folder / INDEX).exists():
        try:
            entries = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            index = {str(name): folder / str(file) for name, file in entries.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{folder / INDEX}: is no index of safetensors files ({error})") from error
        lost = sorted({path.name for path in index.values() if not path.is_file()})
        if lost:
            raise ValueError(
                f"{folder}: {', '.join(lost)} {'is' if len(lost) == 1 else 'are'} missing, of "
                f"{len(set(index.values()))} files that {INDEX} names: copy or download the folder again"
            )
        return index
    found = sorted(folder.glob("*.safetensors"))
    if found:
        return found
    others = sorted(path.name for path in folder.glob("*.bin")) or sorted(path.name for path in folder.glob("*.pt"))
    if others:
        raise ValueError(
            f"{folder}: its weights are in {others[0]}, a pickle, which can run any code when it is opened: convert it "
            "to safetensors (save_pretrained of transformers writes them)"
        )
    raise ValueError(f"{folder}: has no weights: no *.safetensors file and no {INDEX}")


class SafetensorsFiles(Mapping[str, Tensor]):
    """Tensors by name, each read from its file when it is asked for.

    Args:
        files: from `index_of`.

    Raises:
        ValueError: a file is cut short or no safetensors file, named; or lacks a tensor that the index promises; or
            a tensor is in several and no index says which counts.
    """

    def __init__(self, files: dict[str, Path] | list[Path]) -> None:
        paths = list(dict.fromkeys(files.values())) if isinstance(files, dict) else files
        self._opened = {path: self._open(path) for path in paths}
        held = {name: path for path, file in self._opened.items() for name in file.keys()}  # noqa: SIM118
        if isinstance(files, dict):
            lost = [f"{name} in {path.name}" for name, path in files.items() if held.get(name) is None]
            if lost:
                raise ValueError(
                    f"{paths[0].parent}: {INDEX} promises {lost[0]}"
                    f"{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}, which is not there: download it again"
                )
        else:
            every = sorted(name for file in self._opened.values() for name in file.keys())  # noqa: SIM118
            twice = next((one for one, other in itertools.pairwise(every) if one == other), None)
            if twice is not None:
                raise ValueError(f"{paths[0].parent}: {twice} is in several of its safetensors files")
        self._held = held

    @staticmethod
    def _open(path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: is cut short or no safetensors file ({error}): copy or download it again"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._opened[self._held[name]].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the file's header alone."""
        return tuple(self._opened[self._held[name]].get_slice(name).get_shape())
