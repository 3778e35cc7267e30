"""`lit-palm import SRC DST`: somebody else's weights as a folder that every stage starts from.

    lit-palm import palm_410m_8k_v0.pt runs/palm-410m --tokenizer EleutherAI/gpt-neox-20b
    lit-palm import reward.pt runs/reward --tokenizer bytes --scope reward
    lit-palm import aya-23-8B runs/aya

What is read: checkpoints of palm-rlhf-pytorch (its PaLM, conceptofmind's four sizes, its reward model) and folders of
Cohere's first models (Command-R, Aya 23). What is written is what `lit-palm export` writes: `config.json` with the
networks and the tokeniser, and one safetensors file a network. One tensor is in memory at a time, types are kept.
"""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from lit_palm.convert.folder import check_target, new_folder
from lit_palm.data.tokenizers import Tokenizer, load_tokenizer
from lit_palm.foreign.cohere import read_architecture, read_cohere
from lit_palm.foreign.network import ForeignNetwork
from lit_palm.foreign.palm_rlhf import CONCEPTOFMIND, PaLMRLHFOptions, is_palm_rlhf, read_palm_rlhf
from lit_palm.foreign.tensors import open_tensors
from lit_palm.modules.checkpoint import FORMAT, config_to_dict
from lit_palm.modules.safetensors_file import write_safetensors
from lit_palm.version import __version__

__all__ = ["import_network", "main"]

GPT_NEOX = "EleutherAI/gpt-neox-20b"
"""The tokeniser of conceptofmind's models."""


def import_network(
    source: str,
    target: str,
    tokenizer: str | None = None,
    preset: str | None = None,
    options: PaLMRLHFOptions | None = None,
) -> ForeignNetwork:
    """Convert somebody else's checkpoint.

    Args:
        source: a checkpoint of palm-rlhf-pytorch, a folder of Cohere's first models, or the name of one on the hub.
        target: the folder to write; path or fsspec URL.
        tokenizer: what `load_tokenizer` takes; None: the one in the source, or the preset's own.
        preset: one of conceptofmind's sizes, which the checkpoint must have; it is recognised without.
        options: what a checkpoint of palm-rlhf-pytorch does not say.

    Returns:
        What was read, with notes on what was detected and left out.

    Raises:
        ValueError: nothing that can be read is there, it does not fit a network here, or the tokeniser does not fit it.
    """
    options = options or PaLMRLHFOptions()
    if preset is not None and preset not in CONCEPTOFMIND:
        raise ValueError(f"--preset {preset}: choose one of {', '.join(CONCEPTOFMIND)}")
    check_target(target)
    source = _local(source)
    found = read(source, options, preset)
    found.tokenizer = _tokenizer(source, tokenizer, found)
    wide, known = found.tokenizer.vocab_size, found.config.vocab_size or 0
    if wide > known:
        raise ValueError(
            f"{source}: has {known} token ids and its tokeniser {wide}: name the one it was trained with by --tokenizer"
        )
    with new_folder(target) as folder:
        _write(folder, found, target if "://" in target else os.path.abspath(target))
    return found


def read(source: str, options: PaLMRLHFOptions, preset: str | None = None) -> ForeignNetwork:
    """Read whatever is there; see `import_network`.

    Raises:
        ValueError: it is nothing that can be read here.
    """
    if os.path.isdir(source) and os.path.exists(os.path.join(source, "config.json")):
        asked = [
            f"--{f.name}" for f in fields(options) if f.name != "max_length" and getattr(options, f.name) != f.default
        ]
        if preset is not None or asked:
            what = ", ".join(asked or ["--preset"])
            raise ValueError(
                f"{source}: {what} is for checkpoints of palm-rlhf-pytorch, and this is a folder of transformers"
            )
        if "networks" in _config_of(source):
            raise ValueError(f"{source}: is a folder that lit-palm wrote, which every stage reads as it is")
        return read_cohere(source, options.max_length)
    tensors = open_tensors(source)
    if not is_palm_rlhf(tensors):
        some = ", ".join(list(tensors)[:3])
        raise ValueError(
            f"{source}: holds {some} ..., which are no weights of palm-rlhf-pytorch. Models of transformers are "
            "folders with a config.json"
        )
    return read_palm_rlhf(tensors, options, preset)


def _config_of(folder: str) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            found = json.load(file)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and "networks" in found else read_architecture(folder)


def _local(source: str) -> str:
    """A file or folder here: the one that is named, or what the hub has under that name.

    Raises:
        ValueError: a folder holds several checkpoints, or the hub does not provide it.
    """
    if (
        not os.path.exists(source)
        and re.fullmatch(r"[\w.-]+/[\w.-]+", source)
        and not source.endswith((".pt", ".ckpt"))
    ):
        from huggingface_hub import snapshot_download

        try:
            source = snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.pt"])
        except Exception as error:  # of the hub's client: offline, unknown, private
            why = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(
                f"{source}: there is no such file or folder here, and the hub did not provide it ({why})"
            ) from error
    if os.path.isdir(source) and not os.path.exists(os.path.join(source, "config.json")):
        found = sorted(name for name in os.listdir(source) if name.endswith(".pt"))
        if len(found) > 1:
            raise ValueError(f"{source}: holds {', '.join(found)}: name one of them")
        if found:
            return os.path.join(source, found[0])
    return source


def _tokenizer(source: str, given: str | None, found: ForeignNetwork) -> Tokenizer:
    if given is not None:
        chosen = load_tokenizer(given)
    elif os.path.isdir(source):
        names = os.listdir(source)
        if not any(name.startswith("tokenizer") or name == "lit_palm_tokenizer.json" for name in names):
            raise ValueError(f"{source}: the folder has no tokeniser (tokenizer.json): name one by --tokenizer")
        chosen = load_tokenizer(source)
    elif any("conceptofmind" in note for note in found.notes):
        try:
            chosen = load_tokenizer(GPT_NEOX)
        except ValueError as error:
            raise ValueError(
                f"{source}: was trained with the tokeniser {GPT_NEOX}, which the hub did not provide: name a folder or "
                "a tokenizer.json that holds it by --tokenizer"
            ) from error
        found.notes.append(f"takes the tokeniser {GPT_NEOX}")
    else:
        raise ValueError(
            f"{source}: a state dict brings no tokeniser: name the one it was trained with by --tokenizer (bytes, a "
            "file, a folder, or a hub name)"
        )
    if not chosen.trained:
        raise ValueError(f"--tokenizer {given}: has no vocabulary yet")
    return chosen


def _write(folder: str, found: ForeignNetwork, final: str) -> None:
    """Fill a folder that will be at `final`."""
    assert found.tokenizer is not None
    weights = found.weights
    names = {name: name for name in weights}
    write_safetensors(os.path.join(folder, f"{found.role}.safetensors"), names, weights, weights.shapes)
    network = config_to_dict(found.config)
    if found.pooling is not None:
        network["pooling"] = found.pooling
    header = {
        "format": FORMAT,
        "version": __version__,
        "kind": "reward_model" if found.role == "reward" else "language_model",
        "networks": {found.role: network},
        "tokenizer": found.tokenizer.to_dict(),
        "imported": {"from": os.path.basename(found.where.rstrip("/")), "notes": found.notes},
    }
    for scope, (described, tensors) in found.adapters.items():
        _write_adapter(os.path.join(folder, f"adapter-{scope}"), header, found.role, final, described, tensors)
    _write_json(folder, "config.json", header)


def _write_adapter(
    folder: str, header: dict[str, Any], role: str, base: str, described: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """An adapter for `peft`, and beside it the same as a LoRA checkpoint that stages here go on with."""
    os.makedirs(folder)
    write_safetensors(os.path.join(folder, "adapter_model.safetensors"), {name: name for name in tensors}, tensors)
    _write_json(folder, "adapter_config.json", described)
    # as lit_palm.modules.adapters has it: `trunk.LAYER.lora_A.ROLE.weight`
    names = {re.sub(r"^base_model\.model\.(.*)\.weight$", rf"trunk.\1.{role}.weight", name): name for name in tensors}
    write_safetensors(os.path.join(folder, f"{role}.safetensors"), names, tensors)
    lora = {
        "rank": described["r"],
        "alpha": float(described["lora_alpha"]),
        "targets": described["target_modules"],
        "base": {"path": base, "role": role, "seed": None, "fingerprint": None},
    }
    _write_json(folder, "config.json", header | {"networks": {role: header["networks"][role] | {"lora": lora}}})


def _write_json(folder: str, name: str, data: dict[str, Any]) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)


def main(argv: Sequence[str]) -> int:
    """Run `lit-palm import`."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="lit-palm import",
        description="Turn somebody else's weights into a folder that every stage starts from.",
        exit_on_error=False,
    )
    parser.add_argument(
        "source", type=str, help="A checkpoint of palm-rlhf-pytorch, or a folder (hub name) of Cohere's."
    )
    parser.add_argument("target", type=str, help="The folder to write.")
    parser.add_argument("--tokenizer", type=str | None, help="File, folder, hub name, checkpoint, or `bytes`.")
    parser.add_argument("--preset", type=str | None, help=f"A size it must have: {', '.join(CONCEPTOFMIND)}.")
    parser.add_class_arguments(PaLMRLHFOptions, None)
    try:
        args = parser.parse_args(list(argv))
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    options = PaLMRLHFOptions(**{f.name: args[f.name] for f in fields(PaLMRLHFOptions)})
    found = import_network(args.source, args.target, args.tokenizer, args.preset, options)
    for note in found.notes:
        print(f"{os.path.basename(found.where.rstrip('/'))}: {note}", file=sys.stderr)
    print(f"wrote {args.target}", file=sys.stderr)
    return 0
