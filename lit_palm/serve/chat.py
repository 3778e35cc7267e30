"""A conversation with a network: history, context, streaming, and the best of several answers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.utils.rnn import pad_sequence

from lit_palm.data.streamed_text import StreamedText
from lit_palm.data.templates import encode_chat
from lit_palm.data.tokenizers import Tokenizer
from lit_palm.models.base import Network, ScalarNetwork
from lit_palm.rollout.engine import CachedEngine, Engine
from lit_palm.rollout.sampling import Sampling, row_seeds

__all__ = ["Chat", "note"]


def note(text: str) -> None:
    """Say something that is not the answer."""
    print(text, file=sys.stderr, flush=True)


class Chat:
    """A conversation with a network.

    Args:
        network: what answers.
        tokenizer: its tokeniser, with the chat template.
        sampling: how answers are drawn.
        seed: of all answers.
        system: system prompt.
        best_of: answers to choose from.
        reward: the network that scores them; needed when there are several.
        engine: what samples; None: `CachedEngine()`.
    """

    def __init__(
        self,
        network: Network,
        tokenizer: Tokenizer,
        sampling: Sampling,
        seed: int = 0,
        system: str | None = None,
        best_of: int = 1,
        reward: ScalarNetwork | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.network, self.tokenizer, self.sampling, self.seed = network, tokenizer, sampling, seed
        self.system, self.best_of, self.reward = system, best_of, reward
        self.engine = engine or CachedEngine()
        self.turns: list[dict[str, str]] = []
        self.asked = 0
        """Questions so far, those taken back included: what the randomness of an answer comes from."""
        self.dropped = 0
        """So many of the oldest turns no longer fit the context."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def ask(self, text: str, show: Callable[[str], object]) -> str:
        """One turn: the answer, which `show` also gets piece by piece.

        An interrupted answer is kept as far as it came; without any, the question is taken back.

        Raises:
            ValueError: the template refuses the conversation, or the question alone is longer than the context.
        """
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []

        def told(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        try:
            prompt = self.prompt()
            self.asked += 1
            if self.best_of > 1:
                told(self.best(prompt))
            else:
                self.stream(prompt, told)
        except KeyboardInterrupt:
            note(" [stopped]")
            if not "".join(pieces):
                self.turns.pop()
                return ""
        except BaseException:
            self.turns.pop()
            raise
        answer = "".join(pieces)
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def prompt(self) -> torch.Tensor:
        """Ids of as many of the latest turns as leave room for an answer.

        Raises:
            ValueError: see `ask`.
        """
        longest = self.network.config.max_length
        room = min(self.sampling.max_new_tokens, max(1, longest // 4))
        system, dropped = self.messages[: len(self.messages) - len(self.turns)], 0
        while True:
            kept = [*system, *self.turns[dropped:]]
            ids = encode_chat(self.tokenizer, kept, add_generation_prompt=True)[0]
            if len(ids) + room <= longest or dropped + 1 == len(self.turns):
                break
            dropped += 2  # a question with its answer
        if len(ids) >= longest:
            raise ValueError(
                f"the question has {len(ids)} tokens with what the template puts around it, and the network reads at "
                f"most {longest}: ask a shorter one"
            )
        if dropped > self.dropped:
            note(f"[the context of {longest} tokens is full: the oldest {dropped} turns are left out]")
        self.dropped = dropped
        return torch.tensor(ids)

    def stream(self, prompt: torch.Tensor, show: Callable[[str], object]) -> None:
        """Sample one answer and show it as it comes, whole characters only and without the stop text."""
        text = StreamedText(self.tokenizer.decode, self.sampling.stop)

        def hear(row: int, token: int) -> None:
            if piece := text.push(token):
                show(piece)

        self.sample(prompt, 1, hear)
        if piece := text.finish():
            show(piece)

    def best(self, prompt: torch.Tensor) -> str:
        """Sample several answers, say what they are worth, and give the one worth most."""
        assert self.reward is not None
        answers = self.sample(prompt, self.best_of)
        longest = self.reward.trunk.config.max_length
        rows = [torch.cat((prompt, answer)) for answer in answers]
        if max(map(len, rows)) > longest:
            raise ValueError(
                f"the conversation has {max(map(len, rows))} tokens with the answer, and the reward model reads at "
                f"most {longest}: /reset, or lower --max_new_tokens"
            )
        device = next(self.reward.parameters()).device
        with torch.no_grad():  # right padding needs no mask: a score stands at the last token of its row
            scores = self.reward(pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_id).to(device))
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        worth = scores.gather(1, last[:, None]).squeeze(1)
        others = ", ".join(f"{value:.3f}" for value in worth.sort(descending=True).values[1:].tolist())
        note(f"[best of {len(rows)}: reward {worth.max():.3f}; the others {others}]")
        text = StreamedText(self.tokenizer.decode, self.sampling.stop)
        pieces = [text.push(token) for token in answers[int(worth.argmax())].tolist()]
        return "".join([*pieces, text.finish()])

    def sample(
        self, prompt: torch.Tensor, count: int, on_token: Callable[[int, int], None] | None = None
    ) -> list[torch.Tensor]:
        """So many answers to a prompt, as ids."""
        room = self.network.config.max_length - len(prompt)
        most = min(self.sampling.max_new_tokens, room)
        sampling = replace(self.sampling, max_new_tokens=most, min_new_tokens=min(self.sampling.min_new_tokens, most))
        seeds = row_seeds(self.seed, self.asked - 1, torch.arange(count))
        generation = self.engine.generate(
            self.network,
            [prompt] * count,
            sampling,
            seeds,
            pad_id=self.tokenizer.pad_id,
            eos_id=self.tokenizer.eos_id,
            decode=self.tokenizer.decode,
            on_token=on_token,
        )
        return generation.completions

    def reset(self) -> None:
        """Begin anew."""
        self.turns, self.dropped = [], 0
