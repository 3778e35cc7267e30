"""Models in GGUF files, which `transformers` reads into its own layout in float32, whatever their quantisation."""

from __future__ import annotations

import json
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
            listed: Any = reader.fields.get("tokenizer.ggml.tokens")
            self.num_tokens = len(listed.data) if listed is not None else 0
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
        return _without_additions(HFTokenizer.from_transformers(loaded, self.path.name).to_dict(), self.num_tokens)

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


def _without_additions(tokenizer: dict[str, Any], num_tokens: int) -> dict[str, Any]:
    """A tokeniser without the tokens that its class in `transformers` adds to those of the file.

    The network has no weights for them.
    """
    data = json.loads(tokenizer["json"])
    added = data["added_tokens"]
    beyond = {token["content"] for token in added if token["id"] >= num_tokens}
    if not beyond or tokenizer["eos_token"] in beyond:
        return tokenizer
    data["added_tokens"] = [token for token in added if token["content"] not in beyond]
    if data["model"].get("unk_token") in beyond:
        data["model"]["unk_token"] = None
    pad = tokenizer["pad_token"]
    if pad in beyond:
        pad = next(text for text in data["model"]["vocab"] if text != tokenizer["eos_token"])
    bos = None if tokenizer["bos_token"] in beyond else tokenizer["bos_token"]
    bos_text = "" if tokenizer["bos_text"] in beyond else tokenizer["bos_text"]
    return tokenizer | {"json": json.dumps(data), "pad_token": pad, "bos_token": bos, "bos_text": bos_text}
