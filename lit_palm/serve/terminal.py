"""`lit-palm chat CHECKPOINT`: a conversation on the terminal, or one turn a line from a pipe.

lit-palm chat runs/demo/ppo/last.ckpt --system "Be brief." --temperature 0.7
lit-palm chat runs/demo/sft/last.ckpt --best_of 8 --reward runs/demo/reward/last.ckpt
echo "The film" | lit-palm chat runs/demo/ppo/last.ckpt

Answers go to stdout as they are sampled; everything else goes to stderr, so that a pipe gets answers alone. Ctrl-C ends
the answer, not the chat.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lit_palm.data.templates import encode_chat
from lit_palm.models.base import Network, ScalarNetwork
from lit_palm.models.matrices import Weights
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.sampling import Sampling
from lit_palm.serve.chat import Chat, note

__all__ = ["main"]

HELP = """\
/reset          begin anew (the system prompt stays)
/undo           take back the last question and its answer
/system TEXT    set the system prompt and begin anew; without TEXT, show it
/save FILE      add the conversation to FILE as a row {"messages": [...]}, which DemonstrationData reads
/help           this list
/exit           leave (ctrl-d too); ctrl-c ends an answer
//TEXT          say /TEXT"""


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="lit-palm chat", description="Talk to a checkpoint.", exit_on_error=False)
    parser.add_argument("checkpoint", type=str, help="A checkpoint with a language model or policy.")
    parser.add_argument("--system", type=str | None, help="System prompt.")
    parser.add_argument("--seed", type=int, default=0, help="The same seed and questions give the same answers.")
    parser.add_argument(
        "--best_of", type=int, default=1, help="Sample so many answers and show the best; needs --reward."
    )
    parser.add_argument("--reward", type=str | None, help="Checkpoint of the reward model that chooses among them.")
    parser.add_argument("--weights", type=Weights | None, help="Type of a PaLM's weights while it decodes.")
    parser.add_argument("--compile", type=bool, default=False, help="Decode with torch.compile.")
    parser.add_class_arguments(Sampling, None)
    parser.set_defaults(max_new_tokens=256)
    return parser


def command(chat: Chat, line: str) -> bool:
    """Do what a line that begins with a slash says; False: leave."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    if name in ("exit", "quit"):
        return False
    if name == "reset":
        chat.reset()
        note("[a new conversation]")
    elif name == "undo":
        note("[taken back]" if chat.turns else "[there is nothing to take back]")
        del chat.turns[-2:]
    elif name == "system":
        if rest:
            chat.system = rest
            chat.reset()
            note("[a new conversation]")
        else:
            note(f"[system prompt: {chat.system or 'none'}]")
    elif name == "save":
        note(save(chat, rest))
    elif name == "help":
        note(HELP)
    else:
        note(f"[there is no /{name}: /help lists what there is]")
    return True


def save(chat: Chat, path: str) -> str:
    """Add the conversation to a file of rows; what to say about it."""
    if not path:
        return "[name a file: /save chat.jsonl]"
    if not chat.turns:
        return "[there is nothing to save]"
    try:
        file = Path(path).expanduser()
        before = file.read_text(encoding="utf-8") if file.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f".{file.name}.tmp")
        row = json.dumps({"messages": chat.messages}, ensure_ascii=False)
        new.write_text(f"{before}{row}\n", encoding="utf-8")
        os.replace(new, file)
    except (OSError, UnicodeError) as error:
        return f"[not saved: {error}]"
    return f"[saved as row {before.count(chr(10)) + 1} of {path}]"


def lines(terminal: bool) -> Iterator[str]:
    """What the user says, a line at a time."""
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            if not terminal:
                return
            note("\n[/exit or ctrl-d leaves]")
            continue
        if not terminal and not line:
            return
        yield line.strip()


def show(piece: str) -> None:
    """Print a piece of an answer. What would steer a terminal is shown, not sent: an answer is anybody's text."""
    if sys.stdout.isatty():
        piece = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", piece)
    print(piece, end="", flush=True)


def converse(chat: Chat, terminal: bool) -> None:
    """Questions and answers until there are no more.

    Raises:
        ValueError: what is asked from a pipe cannot be answered; on a terminal that is said, and the chat goes on.
    """
    for line in lines(terminal):
        if not line:
            continue
        if line.startswith("/") and not line.startswith("//"):
            if not command(chat, line):
                return
            continue
        try:
            chat.ask(line.removeprefix("/"), show)
        except ValueError as error:
            if not terminal:
                raise
            note(f"[{error}]")
        print(flush=True)


def load(args: Any) -> Chat:
    """What the command line asks for.

    Raises:
        ValueError: checkpoints that cannot be used, a template that refuses, arguments that do not fit together.
    """
    from lit_palm.modules.checkpoint import load_checkpoint_tokenizer
    from lit_palm.modules.weights import load_network

    if args.best_of < 1:
        raise ValueError(f"--best_of is {args.best_of}: use at least 1")
    if (args.best_of > 1) != (args.reward is not None):
        raise ValueError("--best_of N, with N above 1, and --reward CHECKPOINT go together")
    sampling = Sampling(**{f.name: args[f.name] for f in fields(Sampling)})
    tokenizer = load_checkpoint_tokenizer(args.checkpoint)
    if args.reward is not None:
        scorer = load_checkpoint_tokenizer(args.reward)
        if scorer.fingerprint() != tokenizer.fingerprint():
            raise ValueError(
                f"{args.reward}: has another tokeniser than {args.checkpoint}, so it cannot read its answers"
            )
    opening = [{"role": "system", "content": args.system}] if args.system else []
    try:
        encode_chat(tokenizer, [*opening, {"role": "user", "content": "hello"}], add_generation_prompt=True)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint}: {error}") from error
    network = load_network(args.checkpoint)
    reward = load_network(args.reward, "reward") if args.reward is not None else None
    assert isinstance(network, Network) and (reward is None or isinstance(reward, ScalarNetwork))
    device = torch.accelerator.current_accelerator()
    for module in (network, reward):
        if module is not None and device is not None:
            module.to(device)
        if module is not None:
            module.eval()
    engine = CachedEngine(weights=args.weights, compile=args.compile)
    return Chat(network, tokenizer, sampling, args.seed, args.system, args.best_of, reward, engine)


def main(argv: Sequence[str]) -> int:
    """Run `lit-palm chat`."""
    try:
        args = _parser().parse_args(list(argv))
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    chat = load(args)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot say must not end the chat
            stream.reconfigure(errors="replace")
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401  (arrow keys and history)

        note(f"{args.checkpoint}: ask, or /help")
    converse(chat, terminal)
    return 0
