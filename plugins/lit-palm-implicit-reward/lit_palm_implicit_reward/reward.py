"""The log-ratio of two language models as a reward: of every token, of every step, or of the whole completion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lit_palm import Reward, RewardBatch
from lit_palm.models import TokenLogProbs
from lit_palm.rollout.rewards import NetworkLoader

__all__ = ["ImplicitProcessReward", "step_ends"]

Credit = Literal["token", "step", "completion", "weakest"]


class ImplicitProcessReward(Reward):
    """What an implicit process reward model says: beta * log pi / pi_ref, the sum over a completion being its score.

    Args:
        checkpoint: of a language model that tells right from wrong by its log-ratio: trained by `ImplicitPRM`, or by
            any preference objective with a reference (DPO).
        reference: checkpoint of the reference it was trained with.
        beta: the one it was trained with; 0.05 is the paper's.
        credit: who gets what. `token`: each token its own part; `step`: each step's sum, at its last token;
            `completion`: the whole sum, as a reward model's score; `weakest`: the smallest of the steps' sums, a
            score for choosing the best of n (Lightman et al. 2023).
        delimiter: text that ends a step, for `step` and `weakest`.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged.
        batch_size: rows in one forward pass; rows are sorted by length, so that little is computed on padding.

    Raises:
        ValueError: an argument is out of its range.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        checkpoint: str,
        reference: str,
        beta: float = 0.05,
        credit: Credit = "token",
        delimiter: str = "\n",
        weight: float = 1.0,
        name: str = "implicit_process_reward",
        batch_size: int = 64,
    ) -> None:
        super().__init__(weight, name)
        if not 0 < beta < math.inf:
            raise ValueError(f"beta of reward {name!r} must be finite and positive, got {beta}; 0.05 is usual")
        if credit not in get_args(Credit):
            raise ValueError(f"credit of reward {name!r} is {credit!r}: choose one of {', '.join(get_args(Credit))}")
        if not delimiter:
            raise ValueError(
                f"delimiter of reward {name!r} is empty: name the text that ends a step, such as a newline"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size of reward {name!r} is {batch_size}; it must be at least 1")
        self.checkpoint, self.reference, self.beta, self.credit = checkpoint, reference, beta, credit
        self.delimiter, self.batch_size = delimiter, batch_size
        self._decode: Callable[[list[int]], str] | None = None

    def build(self, load: NetworkLoader) -> nn.Module:
        """Both language models."""
        return nn.ModuleDict({"model": load(self.checkpoint, "policy"), "reference": load(self.reference, "policy")})

    def __call__(self, batch: RewardBatch) -> Tensor:
        """[B, T] for `token` and `step`, [B] for the others, on the device of `batch.tokens`.

        Raises:
            ValueError: a row is longer than a network's context.
        """
        values = self.log_ratios(batch)
        if self.credit == "token":
            return values
        if self.credit == "completion":
            return values.sum(1)
        steps, last = self._steps(batch, values)
        if self.credit == "step":
            return steps
        return torch.where(last, steps, math.inf).amin(1)

    @torch.no_grad()
    def log_ratios(self, batch: RewardBatch) -> Tensor:
        """beta * log pi / pi_ref of each token of the completions [B, T], in float32, zero elsewhere.

        The number of forward passes is twice ceil(B / batch_size) whatever the lengths, so ranks with as many rows stay
        in step under sharding. Dropout is off.
        """
        network = self.network
        assert isinstance(network, nn.ModuleDict), "the host sets reward.network to what build() returned"
        self._check_lengths(network, batch)
        lengths, select = batch.mask.sum(1), batch.completion_mask
        values = torch.zeros(batch.tokens.shape, dtype=torch.float32, device=batch.tokens.device)
        for rows in torch.argsort(lengths, descending=True, stable=True).split(self.batch_size):
            width = int(lengths[rows].max())
            found = []
            for part in (network["model"], network["reference"]):
                device, training = next(part.parameters()).device, part.training
                part.eval()
                tokens = batch.tokens[rows, :width].to(device)
                # right padding needs no mask: a causal network cannot see it
                head = TokenLogProbs(tokens, select[rows, :width].to(device))
                found.append(part(tokens, head=head)["logps"].to(values))
                part.train(training)
            values[rows, :width] = self.beta * (found[0] - found[1])
        return values

    def _check_lengths(self, network: nn.ModuleDict, batch: RewardBatch) -> None:
        lengths = batch.mask.sum(1)
        for role, path in (("model", self.checkpoint), ("reference", self.reference)):
            longest = getattr(getattr(network[role], "config", None), "max_length", None)
            if longest is not None and len(lengths) and int(lengths.max()) > longest:
                raise ValueError(
                    f"row {int(lengths.argmax())} has {int(lengths.max())} tokens and {path} reads at most {longest}: "
                    "lower max_new_tokens or max_prompt_length"
                )

    def _steps(self, batch: RewardBatch, values: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over each step at its last token [B, T], and which tokens those are [B, T] bool."""
        if self._decode is None:
            from lit_palm.modules.checkpoint import load_checkpoint_tokenizer  # light to import until it is used

            self._decode = load_checkpoint_tokenizer(self.checkpoint).decode
        last = torch.zeros_like(batch.completion_mask)
        for row, (prompt, ids) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
            for place in step_ends(ids.tolist(), self._decode, self.delimiter):
                last[row, len(prompt) + place] = True
        # q up to each token; what a step gained is q at its end less q at the end of the one before
        q = values.cumsum(1)
        before = torch.zeros_like(q)
        for row in range(len(q)):
            places = last[row].nonzero().squeeze(1)
            before[row, places[1:]] = q[row, places[:-1]]
        return torch.where(last, q - before, 0), last


def step_ends(ids: Sequence[int], decode: Callable[[list[int]], str], delimiter: str) -> list[int]:
    """Places of the tokens that end a step: with which a delimiter is complete, and the last one.

    Args:
        ids: of a completion.
        decode: ids -> text.
        delimiter: text that ends a step.
    """
    reach = 8 + len(delimiter.encode())  # every token adds at least a byte, save special ones
    ends = []
    for place in range(len(ids)):
        window = list(ids[max(0, place + 1 - reach) : place + 1])
        if decode(window).count(delimiter) > decode(window[:-1]).count(delimiter) or place == len(ids) - 1:
            ends.append(place)
    return ends
