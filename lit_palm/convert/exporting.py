"""`lit-palm export CKPT DST`: a checkpoint as other tools load it.

    lit-palm export runs/demo/ppo/last.ckpt runs/exported                    transformers, vLLM
    lit-palm export runs/demo/ppo/last.ckpt runs/policy.gguf --format gguf   llama.cpp
    lit-palm export runs/demo/ppo/last.ckpt runs/folder --format lit-palm    every stage here
    lit-palm export runs/demo/ppo/last.ckpt runs/exported --push me/policy   and to the hub, private

The layout of transformers holds one network: of several it is the policy, unless `--network` says another.
A network of transformers goes back to the layout that it came from. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_palm.convert.card import model_card
from lit_palm.convert.chosen import choose
from lit_palm.convert.folder import new_folder
from lit_palm.convert.tokenizer_files import write_tokenizer
from lit_palm.data.tokenizers import Tokenizer
from lit_palm.foreign.as_cohere import CLASSIFIER, cohere_architecture, cohere_weights, scalar_head
from lit_palm.foreign.as_huggingface import huggingface_model
from lit_palm.foreign.network import Weights
from lit_palm.models.base import NetworkConfig
from lit_palm.models.palm import PaLMConfig
from lit_palm.modules.checkpoint import Checkpoint, Role, export_folder
from lit_palm.modules.shards import write_shards
from lit_palm.modules.storage import is_local
from lit_palm.modules.whole import WholeWeights
from lit_palm.version import __version__

__all__ = ["Exported", "export_huggingface", "main", "prepare"]

DTypes = Literal["auto", "float32", "float16", "bfloat16"]


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass
class Exported:
    """A network in the layout of transformers, before it is written.

    Args:
        checkpoint: where it comes from.
        architecture: the `config.json`.
        tokenizer: comes along.
        config: of the network.
        weights: of a PaLM, by their names in that layout, made when they are asked for.
        model: of transformers, with the weights, where the network is one of theirs.
    """

    checkpoint: Checkpoint
    architecture: dict[str, Any]
    tokenizer: Tokenizer
    config: NetworkConfig
    weights: Weights | None = None
    model: Any = None

    @property
    def num_parameters(self) -> int:
        """Numbers in its weights."""
        if self.weights is not None:
            return sum(shape.numel() for shape in self.weights.shapes.values())
        return int(self.model.num_parameters())


def prepare(path: str, network: Role | None = None, dtype: DTypes = "auto") -> Exported:
    """Look at a checkpoint and say how its network is called and laid out in transformers; weights are not read yet.

    Args:
        path: a checkpoint: file, folder of shards, exported or imported folder.
        network: which of its networks; None: the policy, else the reward model, else the value network.
        dtype: of the weights; auto: as they are.

    Raises:
        ValueError: as `choose`, or the network has what the layout has not.
    """
    chosen = choose(path, network)
    checkpoint, config, tokenizer = chosen.checkpoint, chosen.config, chosen.tokenizer
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    weights = WholeWeights(path, chosen.role)
    if isinstance(config, PaLMConfig):
        exported, bias = _palm(checkpoint, config, weights, tokenizer, wanted)
    else:
        model, bias = huggingface_model(config, weights, tokenizer, wanted, path)
        architecture = json.loads(model.config.to_json_string(use_diff=True))
        architecture["architectures"] = [type(model).__name__]
        exported = Exported(checkpoint, architecture, tokenizer, config, model=model)
    own: dict[str, Any] = {"version": __version__, "kind": checkpoint.header.get("kind"), "network": chosen.role}
    exported.architecture["lit_palm"] = own if bias is None else own | {"score_bias": bias}
    return exported


def _palm(
    checkpoint: Checkpoint,
    config: PaLMConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype | None,
) -> tuple[Exported, float | None]:
    """A PaLM in Cohere's layout, and for a scalar network the constant that its score leaves out."""
    scalar = "head.weight" in weights
    prefix = "trunk." if scalar else ""
    dtype = dtype or weights[f"{prefix}embedding.weight"].dtype
    architecture = cohere_architecture(config, tokenizer, dtype, checkpoint.path)
    made = cohere_weights(config, weights, prefix, dtype)
    bias = None
    if scalar:
        recipe, bias = scalar_head(weights, dtype)
        made.recipes = {**made.recipes, "score.weight": recipe}
        labels = {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
        architecture |= {"architectures": [CLASSIFIER], **labels}
    return Exported(checkpoint, architecture, tokenizer, config, weights=made), bias


def export_huggingface(exported: Exported, target: str, max_shard_size: int, name: str | None = None) -> None:
    """Write a folder that transformers loads: weights, configuration, tokeniser, generation settings, model card.

    Args:
        exported: what to write.
        target: the folder, path or fsspec URL.
        max_shard_size: of one file of weights, in bytes.
        name: what the model card calls it; None: as the folder.

    Raises:
        ValueError: the tokeniser cannot be written, or the target holds something that was not exported.
    """
    architecture = exported.architecture
    with new_folder(target) as folder:
        if exported.weights is not None:
            write_shards(folder, exported.weights, max_shard_size)
            if not architecture["architectures"][0].endswith("ForSequenceClassification"):
                special = ("bos_token_id", "eos_token_id", "pad_token_id")
                _write_json(folder, "generation_config.json", {k: architecture.get(k) for k in special})
        else:
            exported.model.save_pretrained(folder, max_shard_size=max_shard_size)
        write_tokenizer(folder, exported.tokenizer, exported.config.max_length, exported.checkpoint.path)
        name = name or os.path.basename(target.rstrip("/"))
        with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
            file.write(model_card(exported.checkpoint.header, architecture, name, exported.num_parameters))
        _write_json(folder, "config.json", architecture)


def _write_json(folder: str, name: str, data: dict[str, Any]) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2, ensure_ascii=False)


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB`, `500MB`, `2GiB`.

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ValueError(f"--max_shard_size {text}: is no size; write 5GB or 500MB")
    return size


def main(argv: Sequence[str]) -> int:
    """Run `lit-palm export`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="lit-palm export", description="Write a checkpoint as other tools load it.", exit_on_error=False
    )
    parser.add_argument("checkpoint", type=str, help="A checkpoint file or directory.")
    parser.add_argument("folder", type=str, help="Where to write; for gguf the name of a file.")
    parser.add_argument(
        "--format",
        type=Literal["huggingface", "gguf", "lit-palm"],
        default="huggingface",
        help="huggingface: a folder of transformers; gguf: one of llama.cpp; lit-palm: all networks, for stages here.",
    )
    parser.add_argument("--gguf", action="store_true", help="The same as --format gguf.")
    parser.add_argument("--network", type=Role | None, help="Which network; by default the policy, else the reward.")
    parser.add_argument(
        "--lora",
        type=Literal["merged", "adapter"],
        default="merged",
        help="Of a LoRA checkpoint: merged into the weights, or the adapter alone, for `peft` over the base.",
    )
    parser.add_argument("--base", type=str | None, help="Where that base is in transformers: folder or hub name.")
    parser.add_argument("--dtype", type=DTypes, default="auto", help="Type of the weights; auto: as they are.")
    parser.add_argument("--max_shard_size", type=str, default="5GB", help="Of one file of weights.")
    parser.add_argument("--push", type=str | None, help="Also upload the folder to this repository of the hub.")
    parser.add_argument("--private", type=bool, default=True, help="Whether a repository that --push makes is private.")
    try:
        args = parser.parse_args(list(argv))
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    if args.gguf:
        args.format = "gguf"
    if args.lora == "adapter" and args.format != "huggingface":
        raise ValueError(f"--lora adapter writes a folder of peft, not --format {args.format}")
    if args.push is not None:
        _check_push(args.push, args.format, args.folder)
    if args.format == "lit-palm":
        with new_folder(args.folder) as folder:
            export_folder(args.checkpoint, folder)
    elif args.format == "gguf":
        from lit_palm.convert.gguf_file import write_gguf

        write_gguf(prepare(args.checkpoint, args.network, args.dtype), args.folder)
    elif args.lora == "adapter":
        from lit_palm.convert.adapter import export_adapter

        export_adapter(choose(args.checkpoint, args.network), args.folder, args.base, args.push)
    else:
        size = parse_size(args.max_shard_size)
        exported = prepare(args.checkpoint, args.network, args.dtype)
        export_huggingface(exported, args.folder, size, args.push)
    print(f"wrote {args.folder}", file=sys.stderr)
    if args.format != "lit-palm":
        _say_what_is_left_out(args.checkpoint, args.network)
    if args.push is not None:
        from lit_palm.convert.push import push

        print(f"uploaded to {push(args.folder, args.push, args.private)}", file=sys.stderr)
    return 0


def _say_what_is_left_out(path: str, network: Role | None) -> None:
    chosen = choose(path, network)
    others = [role for role in chosen.checkpoint.header["networks"] if role != chosen.role]
    if others:
        print(f"that is its {chosen.role}; --network takes its {' or '.join(others)} instead", file=sys.stderr)


def _check_push(repository: str, kind: str, folder: str) -> None:
    """Refuse before anything is written.

    Raises:
        ValueError: nothing that a repository could take, or nobody who could upload.
    """
    from lit_palm.convert.push import check_login

    if kind != "huggingface":
        raise ValueError(f"--push {repository}: uploads a folder of transformers, not --format {kind}")
    if not is_local(folder):
        raise ValueError(f"--push {repository}: uploads from a folder on this machine, not from {folder}")
    check_login(repository)
