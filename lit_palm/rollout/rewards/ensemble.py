"""Several rewards combined into one that is harder to deceive than any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lit_palm.rollout.rewards.base import NetworkLoader, Reward, RewardBatch, Values, require_finite
from lit_palm.rollout.rewards.total import scored

__all__ = ["Ensemble"]


class Ensemble(Reward):
    """Combines rewards, usually reward models trained from different seeds, so that the policy gains nothing from what
    only one of them overrates (Coste et al. 2024; Eisenstein et al. 2023).

    With member values v_1 .. v_m of a completion, each already times its member's weight:

    - mean: the mean;
    - min: the smallest;
    - lower_bound: mean - k * std, where std divides by m.

    What the members say on their own is logged as rewards/NAME/MEMBER/mean, before their weights.

    Args:
        rewards: at least two; each needs a name of its own. Weights bring members of different scales together.
        combine: how.
        k: standard deviations that the lower bound lies below the mean.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged; None: ensemble.

    Raises:
        ValueError: when there are fewer than two rewards, two share a name, or k is negative.
    """

    def __init__(
        self,
        rewards: list[Reward],
        combine: Literal["mean", "min", "lower_bound"] = "mean",
        k: float = 1.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        require_finite(self, k=k)
        if len(rewards) < 2:
            raise ValueError(f"an Ensemble needs at least two rewards, got {len(rewards)}: list a single one by itself")
        names = [reward.name for reward in rewards]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two rewards of an Ensemble are called {twice!r}: give one of them another `name`")
        if combine not in ("mean", "min", "lower_bound"):
            raise ValueError(f"combine of Ensemble is {combine!r}; choose mean, min or lower_bound")
        if k < 0:
            raise ValueError(f"k of Ensemble is {k}; a negative one would reward what the members disagree on")
        self.rewards, self.combine, self.k = list(rewards), combine, k
        self._networks: nn.Module | None = None

    @property
    def members(self) -> Sequence[Reward]:
        return self.rewards

    def build(self, load: NetworkLoader) -> nn.Module | None:
        """The members' networks, by the member's place; None when none of them needs one."""
        built = {str(place): member.build(load) for place, member in enumerate(self.rewards)}
        networks = {place: network for place, network in built.items() if network is not None}
        return nn.ModuleDict(networks) if networks else None

    @property
    def network(self) -> nn.Module | None:  # type: ignore[override]
        """What `build` made; setting it hands each member its own."""
        return self._networks

    @network.setter
    def network(self, network: nn.Module | None) -> None:
        assert network is None or isinstance(network, nn.ModuleDict), "the host sets what build() returned"
        self._networks = network
        for place, member in enumerate(self.rewards):
            if network is None:
                member.network = None
            elif str(place) in network:
                member.network = network[str(place)]

    def __call__(self, batch: RewardBatch) -> Tensor:
        return self._combined([scored(member, batch) for member in self.rewards])

    def score(self, batch: RewardBatch) -> tuple[Values, Mapping[str, Values]]:
        found = [scored(member, batch) for member in self.rewards]
        return self._combined(found), {name: values for each in found for name, values in each.items()}

    def _combined(self, found: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[B] from what `scored` gave for each member."""
        pairs = zip(self.rewards, found, strict=True)
        values = torch.stack([member.weight * each[member.name] for member, each in pairs])
        if self.combine == "min":
            return values.amin(0)
        mean = values.mean(0)
        return mean if self.combine == "mean" else mean - self.k * values.std(0, correction=0)
