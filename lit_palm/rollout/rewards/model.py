"""A learned reward model as a reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_palm.parallel.sharded import is_sharded
from lit_palm.rollout.lengths import cost_of_a_pass, parts_of_similar_length
from lit_palm.rollout.rewards.base import NetworkLoader, Reward, RewardBatch

__all__ = ["RewardModel"]


class RewardModel(Reward):
    """Scores completions with a learned reward model: its calibrated scalar at the last real token.

    Args:
        checkpoint: checkpoint of `LitRewardModel`.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged.
        batch_size: most rows in one forward pass; rows of similar length go together, so that little is computed on
            padding.
    """

    def __init__(self, checkpoint: str, weight: float = 1.0, name: str = "reward_model", batch_size: int = 64) -> None:
        super().__init__(weight, name)
        if batch_size < 1:
            raise ValueError(f"batch_size of reward {name!r} is {batch_size}; it must be at least 1")
        self.checkpoint = checkpoint
        self.batch_size = batch_size

    def build(self, load: NetworkLoader) -> nn.Module:
        return load(self.checkpoint, "reward")

    @torch.no_grad()
    def __call__(self, batch: RewardBatch) -> Tensor:
        """Scores [B] in float32, on the device of `batch.tokens`.

        The number of forward passes of a sharded network is ceil(B / batch_size) whatever the lengths, so ranks with as
        many rows stay in step. Dropout is off.

        Raises:
            ValueError: when a row is empty or longer than the network's context.
        """
        network = self.network
        assert network is not None, "the host sets reward.network to what build() returned"
        lengths = batch.mask.sum(1)
        self._check_lengths(network, lengths)
        device = next(network.parameters()).device
        training = network.training
        network.eval()
        try:
            scores = torch.zeros(len(lengths), dtype=torch.float32, device=device)
            for rows in self._parts(network, lengths.cpu(), device):
                last = lengths[rows] - 1
                tokens = batch.tokens[rows, : int(last.max()) + 1].to(device)
                # Right padding needs no mask: a causal network cannot see it from the last real token.
                values = network(tokens)
                picked = values.gather(1, last.to(device)[:, None]).squeeze(1)
                scores[rows.to(device)] = picked.float()
        finally:
            network.train(training)
        return scores.to(batch.tokens.device)

    def _parts(self, network: nn.Module, lengths: Tensor, device: torch.device) -> Sequence[Tensor]:
        if is_sharded(network):
            return torch.argsort(lengths, descending=True, stable=True).split(self.batch_size)
        return parts_of_similar_length(lengths, cost_of_a_pass(device), most=self.batch_size)

    def _check_lengths(self, network: nn.Module, lengths: Tensor) -> None:
        if len(lengths) and int(lengths.min()) < 1:
            raise ValueError(f"row {int(lengths.argmin())} has no tokens, neither prompt nor completion")
        config = getattr(getattr(network, "trunk", network), "config", None)
        longest = getattr(config, "max_length", None)
        if longest is not None and len(lengths) and int(lengths.max()) > longest:
            raise ValueError(
                f"row {int(lengths.argmax())} has {int(lengths.max())} tokens and the reward model {self.checkpoint} "
                f"reads at most {longest}: lower max_new_tokens or max_prompt_length"
            )
