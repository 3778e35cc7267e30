"""Models in GGUF files, which `transformers` reads into its own layout in float32, whatever their quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_palm.data.tokenizers import HFTokenizer
from lit_palm.foreign.shapes import whole_model
from lit_palm.models.huggingface_config import HuggingFaceConfig, plain_architecture

__all__ = ["GGUFFile", "find_gguf", "read_gguf"]


def find_gguf(place: Path) -> Path | None:
    """The GGUF file at a path, or in a folder that has no safetensors.

    Raises:
        ValueError: a folder has several.
    """
    if place.is_file():
        return place if place.suffix == ".gguf" else None
    found = sorted(place.glob("*.gguf"))
    if not found or any(place.glob("*.safetensors")):
        return None
    if len(found) > 1:
        raise ValueError(f"{place}: has {len(found)} GGUF files: name one of them, such as {found[0]}")
    return found[0]


def read_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file.

    Raises:
        ValueError: it is none, of an architecture or a tensor type that nothing here reads, or a package is missing.
    """
    stat = path.stat()
    return _open(str(path.resolve()), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _open(path: str, changed: int, size: int) -> GGUFFile:
    return GGUFFile(Path(path))


class GGUFFile:
    """One file: configuration, tokeniser and weights."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ValueError(f"{path}: reading GGUF files needs a package: pip install 'lit-palm[gguf]'") from error
        self.path = path
        try:
            reader = GGUFReader(path)
            field: Any = reader.fields["general.architecture"]
            self.architecture = str(field.contents())
        except Exception as error:  # the reader raises whatever it stumbles over
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{path}: is cut short, or no GGUF file that can be read ({why})") from error

    def config(self) -> HuggingFaceConfig:
        """The architecture.

        Raises:
            ValueError: `transformers` has no reader for it.
        """
        from transformers import AutoConfig

        found = self._read(lambda: AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name))
        return HuggingFaceConfig(architecture=plain_architecture(found))

    def tokenizer(self) -> dict[str, Any]:
        """What a checkpoint would carry of its tokeniser.

        Raises:
            ValueError: it is of a kind that cannot be read.
        """
        from transformers import AutoTokenizer

        loaded = self._read(lambda: AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name))
        return HFTokenizer.from_transformers(loaded, self.path.name).to_dict()

    def weights(self) -> Mapping[str, Tensor]:
        """The weights in float32, by their names in a model of `transformers`."""
        return whole_model(str(self.path.parent), self.config(), gguf_file=self.path.name, dtype=torch.float32)

    def _read(self, read: Any) -> Any:
        try:
            return read()
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{self.path}: a GGUF file of the architecture {self.architecture!r} that transformers cannot read "
                f"({why}): use the model's safetensors folder"
            ) from error
