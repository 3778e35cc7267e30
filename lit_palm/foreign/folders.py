"""A folder, GGUF file or hub name as a checkpoint: what is there, and the header it would have."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_palm.data.tokenizer_base import TOKENIZER_FILE
from lit_palm.data.tokenizers import HFTokenizer, load_tokenizer
from lit_palm.foreign.gguf_files import find_gguf, read_gguf
from lit_palm.foreign.heads import Head, find_head
from lit_palm.foreign.safetensors_files import SafetensorsFiles, index_of
from lit_palm.foreign.shapes import Renamed, rename, whole_model
from lit_palm.models.huggingface_config import HuggingFaceConfig, check_supported, plain_architecture
from lit_palm.version import __version__

__all__ = ["fetch", "foreign_header", "foreign_weights", "is_foreign"]

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def is_foreign(path: str) -> bool:
    """Whether something local is a Hugging Face folder, a folder with a GGUF file, or a GGUF file."""
    place = Path(path)
    if place.is_file():
        return place.suffix == ".gguf"
    if not place.is_dir() or (place / "meta.pt").exists():
        return False
    config = _config_json(place)
    return find_gguf(place) is not None if config is None else "networks" not in config


def fetch(name: str) -> str | None:
    """The local folder of a hub name, downloaded if need be; None when the name is none of the hub's form.

    Raises:
        ValueError: the hub has no such model, or cannot be reached.
    """
    if not _HUB_NAME.fullmatch(name) or os.path.exists(name) or name.endswith((".ckpt", ".pt")):
        return None
    if os.path.isdir(name.partition("/")[0]):  # a mistyped path, which nobody wants to be asked of the hub
        return None
    from huggingface_hub import snapshot_download

    patterns = [*_FILES, "*.py"] if _remote_code() else _FILES
    try:
        return str(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name}: there is no such file or folder here, and no such model on the Hugging Face hub that can be "
            f"reached ({why})"
        ) from error


def foreign_header(path: str) -> dict[str, Any]:
    """The `lit_palm` entry of the checkpoint that the folder stands for.

    Raises:
        ValueError: no weights, an architecture that is not supported, or files that cannot be read.
    """
    place = Path(path)
    return json.loads(_header(str(place.resolve()), _stamp(place)))  # type: ignore[no-any-return]


def foreign_weights(path: str) -> Mapping[str, Tensor]:
    """Its weights by the names they have in a checkpoint, each read when it is asked for where that is possible.

    Raises:
        ValueError: a file is missing or cut short, or weights of the model are not there.
    """
    header = foreign_header(path)
    (role, entry), *_ = header["networks"].items()
    config = HuggingFaceConfig(**entry["init_args"])
    place = Path(path)
    if (gguf := find_gguf(place)) is not None:
        return Renamed(read_gguf(gguf).weights(), {}, f"networks.{role}.lm.")
    files = SafetensorsFiles(index_of(place))
    head = find_head(files, str(place)) if role == "reward" else None
    if head is not None:
        own = (_config_json(place) or {}).get("lit_palm") or {}
        head.constant = float(own.get("score_bias", 0.0))
    below = f"networks.{role}.trunk.lm." if head else f"networks.{role}.lm."
    names = rename(config, files, below_head=head is not None)
    trunk: Mapping[str, Tensor] = files
    if names is None:  # transformers knows how to put this model's weights together
        trunk = whole_model(path, config, below_head=head is not None)
        names = {name: name for name in trunk}
    weights = Renamed(trunk, names, below)
    return weights.with_head(head.tensors(), f"networks.{role}.") if head else weights


def _config_json(folder: Path) -> dict[str, Any] | None:
    try:
        loaded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: cannot be read as JSON ({error})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{folder / 'config.json'}: holds a {type(loaded).__name__}, not a model's configuration")
    return loaded


def _stamp(place: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when what the header is made of does."""
    files = [place] if place.is_file() else sorted(p for p in place.iterdir() if p.is_file())
    return tuple((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in files)


@lru_cache(maxsize=8)
def _header(path: str, stamp: tuple[tuple[str, int, int], ...]) -> str:
    place = Path(path)
    gguf = find_gguf(place)
    head: Head | None = None
    if gguf is not None:
        opened = read_gguf(gguf)
        network: HuggingFaceConfig = opened.config()
        tokenizer: dict[str, Any] | None = opened.tokenizer()
    else:
        files = SafetensorsFiles(index_of(place))
        architectures = (_config_json(place) or {}).get("architectures") or []
        scores = any(re.search(r"(SequenceClassification|Reward\w*)$", name) for name in architectures)
        head = find_head(files, path) if scores else None
        network, tokenizer = _network_config(place), _tokenizer(place)
    role = "reward" if head else "policy"
    arguments = dataclasses.asdict(network)
    entry: dict[str, Any] = {"class_path": f"{HuggingFaceConfig.__module__}.HuggingFaceConfig", "init_args": arguments}
    if head:
        entry["pooling"] = "last"
    header = {
        "format": 1,
        "version": __version__,
        "kind": "reward" if head else "language_model",
        "networks": {role: entry},
        "tokenizer": tokenizer,
        "foreign": "gguf" if gguf is not None else "huggingface",
    }
    return json.dumps(header)


def _network_config(folder: Path) -> HuggingFaceConfig:
    """The architecture that a folder describes."""
    import transformers

    raw = _config_json(folder)
    if raw is None:
        raise ValueError(f"{folder}: has no config.json, so it is no folder of a model")
    kind = raw.get("model_type")
    if kind is None:
        raise ValueError(f"{folder / 'config.json'}: has no model_type, so it is not the folder of a language model")
    needs_code = "auto_map" in raw and kind not in transformers.CONFIG_MAPPING
    if needs_code and not _remote_code():
        raise ValueError(
            f"{folder}: the architecture {kind!r} is defined by Python files of its own, which are not run unless you "
            "have read them and say so with LIT_PALM_REMOTE_CODE=1"
        )
    try:
        found = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=needs_code)
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} cannot read its config.json, model type {kind!r} "
            f"({why}): install a newer transformers, or convert the model to an architecture it knows"
        ) from error
    if needs_code:
        return HuggingFaceConfig(architecture=plain_architecture(found), code=str(folder))
    try:
        check_supported(found.get_text_config(decoder=True))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return HuggingFaceConfig(architecture=plain_architecture(found))


def _tokenizer(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint would carry of the folder's tokeniser; None when there is none."""
    if (folder / TOKENIZER_FILE).exists():  # exported by us: exactly the one that the network was trained with
        return load_tokenizer(str(folder)).to_dict()
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if not any((folder / name).exists() for name in names):
        return None
    tokenizer = HFTokenizer(str(folder))
    tokenizer.load()
    return tokenizer.to_dict()


def _remote_code() -> bool:
    return os.environ.get("LIT_PALM_REMOTE_CODE", "") == "1"
