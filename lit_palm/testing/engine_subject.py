"""What the checks of an engine start from: the author's fixture, a network, prompts, and what can be set otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lit_palm.data.tokenizers import ByteTokenizer, Tokenizer
from lit_palm.models.base import Network
from lit_palm.models.weights import named_weights
from lit_palm.modules.handover import write_weights
from lit_palm.rollout.engine import Engine, Generation
from lit_palm.rollout.sampling import Sampling
from lit_palm.testing.batches import tiny_network

__all__ = ["VARIED", "EngineSubject", "Factory", "logps_of", "next_logits"]

Factory = Callable[..., Engine]

TEXTS = ("The", "A film that", "x", "I like it", "The", "so on and")
"""Prompts, two of them equal."""
VARIED: dict[str, dict[str, Any]] = {
    "plain": {},
    "cool": {"temperature": 0.7},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5},
}
"""Settings by name."""


class EngineSubject:
    """The engine under test and what it is asked; class attributes and methods that a subclass may override.

    Attributes:
        tolerance: nats by which its log-probabilities may differ from those of the network's forward.
        repeatable: whether equal seeds give equal tokens whatever is sampled beside them; a server that batches in
            other ways each time may not.
        installed: whether the class comes from an installed distribution and must have an entry point; None: found
            out. False for a variant that only tests use.
    """

    tolerance: ClassVar[float] = 1e-4
    repeatable: ClassVar[bool] = True
    installed: ClassVar[bool | None] = None

    @pytest.fixture
    def engine(self) -> Factory:
        """The class under test, or functools.partial of it with arguments."""
        pytest.fail(
            f"{type(self).__name__} has no fixture `engine`: define one that returns your class, or "
            "functools.partial(YourClass, argument=value)"
        )

    def network(self) -> Network:
        """What is sampled from, the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return tiny_network().eval()

    def tokenizer(self) -> Tokenizer:
        """Of that network."""
        return ByteTokenizer()

    def make(self, engine: Factory, network: Network) -> Engine:
        """A fresh engine that has the network's weights."""
        made = engine()
        assert isinstance(made, Engine), (
            f"the fixture `engine` must return a class, or a functools.partial of one: calling it gave a "
            f"{type(made).__name__}, which is no lit_palm engine"
        )
        self.hand_over(made, network, "1")
        return made

    def hand_over(self, engine: Engine, network: Network, version: str) -> None:
        """What a run does before a collection."""
        if engine.apart:
            weights = dict(named_weights(network))
            engine.update(version, partial(self._write, network, weights))

    def _write(self, network: Network, weights: dict[str, Tensor], folder: str, layout: Any) -> None:
        write_weights(folder, layout, network.config, weights, self.tokenizer())

    def call(
        self, engine: Engine, network: Network, prompts: Sequence[Tensor], seeds: Tensor | None = None, **options: Any
    ) -> Generation:
        """Ask an engine; options are of `Sampling`, and `on_token`."""
        on_token = options.pop("on_token", None)
        tokenizer, seeds = self.tokenizer(), self.seeds(len(prompts)) if seeds is None else seeds
        return engine.generate(
            network, prompts, Sampling(**options), seeds, pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id,
            decode=tokenizer.decode, on_token=on_token,
        )  # fmt: skip

    def generate(
        self,
        engine: Factory,
        prompts: Sequence[Tensor],
        seeds: Tensor | None = None,
        network: Network | None = None,
        **options: Any,
    ) -> Generation:
        """Ask a fresh engine."""
        network = network or self.network()
        return self.call(self.make(engine, network), network, prompts, seeds, **options)

    def many(self, engine: Factory, **options: Any) -> Generation:
        """Completions of many rows, some of which end."""
        prompts = [prompt for prompt, _ in zip(itertools.cycle(self.prompts()), range(48), strict=False)]
        return self.generate(engine, prompts, **options)

    def prompts(self) -> list[Tensor]:
        """Of different lengths."""
        tokenizer = self.tokenizer()
        return [torch.tensor([*tokenizer.prefix, *tokenizer.encode(text)]) for text in TEXTS]

    def seeds(self, count: int = len(TEXTS)) -> Tensor:
        """One for each prompt."""
        return torch.arange(count) * 7919 + 11

    def allowed(self, engine: Factory) -> dict[str, dict[str, Any]]:
        """The settings that the engine does not refuse."""
        made, found = engine(), {}
        for name, settings in VARIED.items():
            try:
                made.check(Sampling(**settings))
            except ValueError:
                continue
            found[name] = settings
        return found

    def needs_repeatable(self) -> None:
        """Skip a check of what an engine says not to keep."""
        if not self.repeatable:
            pytest.skip("this engine does not promise equal tokens for equal seeds")


@torch.no_grad()
def next_logits(network: Network, prompt: Tensor, ids: Tensor) -> Tensor:
    """Logits [n, V] from which each of n ids was drawn: a forward over the whole row, without cache."""
    row = torch.cat([prompt, ids])
    logits: Tensor = network(row[None])[0].float()
    return logits[len(prompt) - 1 : -1]


def logps_of(network: Network, prompt: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [n] of ids after a prompt."""
    logits = next_logits(network, prompt, ids) / (temperature or 1.0)
    return logits.log_softmax(1).gather(1, ids[:, None]).squeeze(1)
