"""What an engine is: prompts as token ids, a network and a `Sampling` in, sampled ids with their log-probabilities out.

Ids are never decoded and encoded again. An engine knows no Trainer and no rank. `lit_palm.testing.EngineConformance`
says what one must keep to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lit_palm.models.base import Network
from lit_palm.rollout.sampling import Sampling

__all__ = ["Engine", "Generation", "WeightsLayout", "check_limits", "check_request"]

WeightsLayout = Literal["lit-palm", "huggingface"]
"""How weights lie in a folder: under their names here, or as transformers, vLLM and SGLang read them."""


@dataclass
class Generation:
    """What was sampled, one element a prompt, on the CPU."""

    completions: list[Tensor]
    """[n] long: the sampled ids, with the EOS or stop text that ended them."""
    logps: list[Tensor]
    """[n] float32: log-probability in nats of each sampled id under softmax(logits / temperature) over the whole
    vocabulary, before penalties and filters; at temperature 0 under softmax(logits)."""
    ended: list[bool]
    """True when EOS or a stop text ended it, False when it ran out of tokens."""
    finish_reason: list[str]
    """"eos", "stop" or "length"."""


class Engine(ABC):
    """Samples completions. Entry-point group `lit_palm.engines`."""

    API_VERSION: ClassVar[int] = 1

    apart: ClassVar[bool] = False
    """True when it samples from weights of its own, elsewhere: the host hands the policy's over with `update` before
    completions are asked for, and objectives correct for what its kernels compute differently."""

    @property
    def rounds(self) -> bool:
        """Whether it samples with weights that are rounded from the policy's: its log-probabilities are another's."""
        return False

    def check(self, sampling: Sampling) -> None:  # noqa: B027
        """Refuse settings that it cannot keep to; called once, before anything is loaded.

        Raises:
            ValueError: naming the setting and the way out.
        """

    def update(self, version: str, write: Callable[[str, WeightsLayout], None] | None) -> None:  # noqa: B027
        """Take over the policy's weights as they are now, where it is `apart`; no completion is under way meanwhile.

        Args:
            version: names these weights.
            write: write(folder, layout) makes that folder with the weights as safetensors; None on all processes but
                the first, which only take note of the version.

        Raises:
            RuntimeError: they could not be handed over.
        """

    def cancel(self) -> None:  # noqa: B027
        """Have a call of `generate` in another thread end soon, with an error; asked again until it has ended.

        For an engine that does not call `on_token` as it goes; others are ended by an error from there.
        """

    @abstractmethod
    def generate(
        self,
        network: Network,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        seeds: Tensor,
        *,
        pad_id: int,
        eos_id: int | None,
        decode: Callable[[list[int]], str] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Sample one completion a prompt, without gradients and with dropout off.

        Args:
            network: the network to sample from; left in the mode it came in.
            prompts: token ids, each [n] long with n >= 1. EOS inside a prompt is an ordinary token.
            sampling: how to draw.
            seeds: [B] int64, one a prompt; a row's completion depends on its prompt and its seed alone.
            pad_id: an id to fill shorter rows with; it is never attended to.
            eos_id: the id that ends a completion; None: nothing but stop texts and `max_new_tokens` does.
            decode: ids -> text; needed for stop texts.
            on_token: called as on_token(row, id) for each sampled id, in order (streaming).

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, a prompt too long for the network's
                `max_length`, stop texts without `decode`, or a network whose logits are not finite.
        """


def check_limits(**limits: int | None) -> None:
    """Refuse limits below 1; None is no limit.

    Raises:
        ValueError: naming the limit.
    """
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: use at least 1, or leave it out for no limit")


def check_request(network: Network, prompts: Sequence[Tensor], sampling: Sampling, decode: object) -> None:
    """Refuse what cannot be generated; see `Engine.generate`."""
    config = network.config
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} is empty: give it at least one token, for example BOS")
        if len(prompt) + sampling.max_new_tokens > config.max_length:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens, with {sampling.max_new_tokens} new ones more than the "
                f"network's max_length ({config.max_length}): shorten the prompt or lower max_new_tokens"
            )
        low, high = (int(x) for x in prompt.aminmax())
        if config.vocab_size is not None and not 0 <= low <= high < config.vocab_size:
            raise ValueError(
                f"prompt {row} holds token id {low if low < 0 else high}, the network has ids 0 to "
                f"{config.vocab_size - 1}: use the tokeniser the network was trained with"
            )
    if sampling.stop and decode is None:
        raise ValueError("sampling.stop needs a tokeniser: pass decode, or leave stop empty")
