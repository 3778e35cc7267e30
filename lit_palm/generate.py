"""`lit-palm generate` and `consolidate`: what to do with a checkpoint when no Trainer is needed.

lit-palm generate --checkpoint runs/demo/ppo/last.ckpt --prompt "The film" --max_new_tokens 40
lit-palm generate --checkpoint runs/demo/ppo/last.ckpt --file prompts.txt --output completions.jsonl
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lit_palm.models.matrices import Weights
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.sampling import Sampling

__all__ = ["consolidate_main", "main"]


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="lit-palm generate", description="Complete prompts with a checkpoint.", exit_on_error=False
    )
    parser.add_argument("--checkpoint", type=str, required=True, help="A checkpoint with a language model or policy.")
    parser.add_argument("--prompt", type=str, nargs="+", help="Prompts; several complete side by side.")
    parser.add_argument("--file", type=str | None, help="A .txt file with a prompt a line, or .jsonl with a `prompt`.")
    parser.add_argument("--output", type=str | None, help="Write {prompt, completion} as jsonl instead of printing.")
    parser.add_argument("--chat", type=bool, default=False, help="Put each prompt through the chat template.")
    parser.add_argument("--seed", type=int, default=0, help="The same seed gives the same completions.")
    parser.add_argument("--weights", type=Weights | None, help="Type of a PaLM's weights while it decodes.")
    parser.add_argument("--compile", type=bool, default=False, help="Decode with torch.compile.")
    parser.add_class_arguments(Sampling, None)
    return parser


def _parse(parser: Any, argv: Sequence[str]) -> Any:
    try:
        return parser.parse_args(list(argv))
    except ArgumentError as error:
        raise ValueError(str(error)) from error


def read_prompts(path: str) -> list[str]:
    """Prompts of a .txt file (one a line) or a .jsonl file (key `prompt`).

    Raises:
        ValueError: the file is missing or empty, or a line is no JSON object with a `prompt`.
    """
    try:
        with open(path, encoding="utf-8") as file:
            numbered = [(number, line.rstrip("\r\n")) for number, line in enumerate(file, 1) if line.strip()]
    except OSError as error:
        raise ValueError(f"--file {path}: {error.strerror}") from error
    if not numbered:
        raise ValueError(f"--file {path}: holds no prompts")
    if not path.endswith(".jsonl"):
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a JSON object with a `prompt` ({error})") from error
    return prompts


def main(argv: Sequence[str]) -> int:
    """Run `lit-palm generate`."""
    from lit_palm.data.streamed_text import StreamedText
    from lit_palm.data.templates import encode_chat
    from lit_palm.models.base import Network
    from lit_palm.modules.checkpoint import load_checkpoint_tokenizer
    from lit_palm.modules.weights import load_network
    from lit_palm.rollout.sampling import row_seeds

    args = _parse(_parser(), argv)
    sampling = Sampling(**{f.name: args[f.name] for f in fields(Sampling)})
    if bool(args.prompt) == bool(args.file):
        raise ValueError("name either --prompt or --file")
    prompts = args.prompt or read_prompts(args.file)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    tokenizer = load_checkpoint_tokenizer(args.checkpoint)
    network = load_network(args.checkpoint)
    assert isinstance(network, Network)
    device = torch.accelerator.current_accelerator()
    if device is not None:
        network.to(device)

    def encode(prompt: str) -> torch.Tensor:
        if args.chat:
            messages = [{"role": "user", "content": prompt}]
            return torch.tensor(encode_chat(tokenizer, messages, add_generation_prompt=True)[0])
        return torch.tensor(tokenizer.prefix + tokenizer.encode(prompt), dtype=torch.long)

    engine = CachedEngine(weights=args.weights, compile=args.compile)
    stream = StreamedText(tokenizer.decode) if not args.output and len(prompts) == 1 else None
    if stream is not None:
        print(prompts[0], end="", flush=True)

    def hear(row: int, token: int) -> None:
        assert stream is not None
        print(stream.push(token), end="", flush=True)

    generation = engine.generate(
        network,
        [encode(p) for p in prompts],
        sampling,
        row_seeds(args.seed, 0, torch.arange(len(prompts))),
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        decode=tokenizer.decode,
        on_token=None if stream is None else hear,
    )
    texts = [tokenizer.decode(c.tolist()) for c in generation.completions]
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            for prompt, text, reason in zip(prompts, texts, generation.finish_reason, strict=True):
                row = {"prompt": prompt, "completion": text, "finish_reason": reason}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"wrote {len(texts)} completions to {args.output}", file=sys.stderr)
    elif stream is not None:
        print(stream.finish())  # a character that was never completed
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"{prompt}{text}\n")
    return 0


def consolidate_main(argv: Sequence[str]) -> int:
    """Run `lit-palm consolidate`."""
    from jsonargparse import ArgumentParser

    from lit_palm.modules.checkpoint import consolidate

    parser = ArgumentParser(prog="lit-palm consolidate", description=consolidate.__doc__, exit_on_error=False)
    parser.add_argument("checkpoint", type=str, help="A folder of shards, or any other checkpoint.")
    parser.add_argument("target", type=str, help="A folder for safetensors files, or the name of a file, x.ckpt.")
    args = _parse(parser, argv)
    consolidate(args.checkpoint, args.target)
    print(f"wrote {args.target}", file=sys.stderr)
    return 0
