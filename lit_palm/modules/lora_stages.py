"""What each stage puts on one frozen trunk when it trains with LoRA.

    LitLanguageModel    policy
    LitRewardModel      reward, with a scalar head
    LitPolicy           policy; value, with a scalar head; the reference is the trunk as it is, or with a frozen copy of
                        the adapter that the policy starts from; reward models whose adapters stand on the same weights

So PPO has one copy of the weights in memory instead of four. A network that stands on other weights, or brings weights
of its own, is loaded beside the trunk as without LoRA.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lit_palm.models.adapted import ScalarView, View
from lit_palm.models.lora import LoRA
from lit_palm.modules.adapters import HeadWeights, base_of, described, trunk_of, whole_weight
from lit_palm.modules.shared import Adapter, SharedBlueprint, SharedNetworks
from lit_palm.modules.weights import Blueprint, blueprint, fingerprint, over
from lit_palm.rollout.rewards import RewardModel, every_reward

if TYPE_CHECKING:
    from lit_palm.modules.host import LitModule
    from lit_palm.modules.policy import LitPolicy

__all__ = ["one_role", "policy_roles"]


class Roles:
    """The adapters of a run, gathered before the network is made.

    Args:
        module: with its `lora`.
        start: the network that the first role starts as; the trunk is what that stands on.

    Raises:
        ValueError: the base of a LoRA checkpoint has changed, or the strategy splits blocks.
    """

    def __init__(self, module: LitModule, start: Blueprint) -> None:
        assert module.lora is not None
        self.module, self.lora = module, module.lora
        strategy = module.layout.strategy
        if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "model.lora: adapters cannot be split within a block: set the strategy's tensor_parallel_size to 1"
            )
        if self.lora.quantize is not None and module.layout.shards:
            raise ValueError(
                f"model.lora.quantize: quantised weights cannot be spread by {type(strategy).__name__}: use strategy "
                "auto or ddp, or leave it out"
            )
        start.seed = int(strategy.broadcast(start.seed))
        self.base, self.trunk, self.seed = base_of(start), trunk_of(start), start.seed
        self.adapters: dict[str, Adapter] = {}
        self.root: nn.Module | None = None
        problem: str | None = None
        if strategy.global_rank == 0:  # the weights are read once for it
            try:
                self.base.verify(self.trunk, start.where)
            except ValueError as error:
                problem = str(error)
        problem, self.base.fingerprint = strategy.broadcast((problem, self.base.fingerprint))
        if problem is not None:
            raise ValueError(problem)

    def shares(self, found: Blueprint) -> bool:
        """Whether a network stands on the same weights."""
        other = base_of(found)
        if other.fingerprint is not None:
            return other.fingerprint == self.base.fingerprint
        return (other.path, other.role, other.seed) == (self.base.path, self.base.role, self.base.seed)

    def add(self, role: str, found: Blueprint, lora: LoRA, trained: bool = True) -> None:
        """Put a network on the trunk, which it shares: its adapter, or a fresh one, and its scalar head.

        Args:
            role: a word.
            found: the network.
            lora: what a fresh adapter is like; of one that exists, what can still be chosen.
            trained: it is trained.
        """
        if found.adapted is not None:
            free = {name: getattr(lora, name) for name in ("dropout", "quantize", "merge_to_sample")}
            lora = dataclasses.replace(found.adapted.lora, **free)
            weights: Any = found.adapted.weights
        else:
            whole = found.pooling is not None and found.stored is not None and not found.trunk_only
            weights = HeadWeights(found.stored) if whole and found.stored is not None else None
        self.adapters[role] = Adapter(lora, weights, found.pooling, trained, found.where)

    def make(self) -> None:
        """Make the shared network, as the strategy spreads it."""
        found = SharedBlueprint(self.trunk.config, self.seed, trunk=self.trunk, adapters=self.adapters)
        self.root = self.module.make_shared(found)

    def networks(self) -> SharedNetworks:
        """The trained roles."""
        assert self.root is not None
        roles = {role: self.view(role) for role, adapter in self.adapters.items() if adapter.trained}
        return SharedNetworks(self.root, roles)

    def view(self, role: str | None) -> View | ScalarView:
        """The network of a role; None: the trunk as it is."""
        assert self.root is not None
        shared = SharedNetworks(self.root, {}).adapted
        view = shared.view(role, self.root)
        if role is not None:
            inner = view.trunk if isinstance(view, ScalarView) else view
            inner.lora = described(self.adapters[role].lora, shared.targets[role], self.base)
        return view


def check_continues(lora: LoRA, found: Blueprint) -> None:
    """Refuse settings that differ from those of the adapter that a checkpoint brings.

    Raises:
        ValueError: naming them.
    """
    if found.adapted is None:
        return
    own = found.adapted.lora
    names = ["rank", "alpha", "rslora", "dora", *(["targets"] if lora.targets is not None else [])]
    differ = {name: getattr(own, name) for name in names if getattr(own, name) != getattr(lora, name)}
    if differ.get("targets") and lora.targets == "all-linear":
        differ.pop("targets")
    if differ:
        theirs = ", ".join(f"{name}: {value}" for name, value in differ.items())
        raise ValueError(
            f"{found.where}: its adapter has {theirs}, model.lora says otherwise: say the same to go on with it, or "
            "export the checkpoint, which merges the adapter into the weights, and start a new one from that"
        )


def one_role(module: LitModule, role: str, found: Blueprint) -> SharedNetworks:
    """The networks of a stage that trains one."""
    assert module.lora is not None
    check_continues(module.lora, found)
    roles = Roles(module, found)
    roles.add(role, found, module.lora)
    roles.make()
    return roles.networks()


def policy_roles(module: LitPolicy, start: Blueprint) -> SharedNetworks:
    """The networks of a policy; puts its reference and rewards among the frozen ones.

    Raises:
        ValueError: a network cannot be an adapter on the policy's trunk.
    """
    assert module.lora is not None
    check_continues(module.lora, start)
    roles = Roles(module, start)
    roles.add("policy", start, module.lora)
    if "value" in module.objective.needs:
        roles.add("value", _value(module, roles, start), module.lora)
    there = blueprint(module.reference, overrides=module.overrides) if module.reference else start
    shares = roles.shares(there)
    if shares and there.adapted is not None:
        roles.add("reference", there, module.lora, trained=False)
    scored = _rewards(module, roles)
    roles.make()
    if shares:
        module.frozen["reference"] = roles.view("reference" if "reference" in roles.adapters else None)
        module._reference_id = _identity(roles, there)
    else:
        reference, module.reference_blueprint = module.layout.make(there, frozen=True), there
        module.frozen["reference"], module._reference_id = reference, fingerprint(reference, there)

    def load(checkpoint: str, role: str) -> nn.Module:
        shared = scored.get(checkpoint) if role == "reward" else None
        return module.load_frozen(checkpoint, role) if shared is None else roles.view(shared)

    module.build_rewards(load)
    return roles.networks()


def _value(module: LitPolicy, roles: Roles, start: Blueprint) -> Blueprint:
    """What the value network starts as, on the policy's trunk."""
    found = module.value_blueprint(start)
    if roles.shares(found):
        return found
    if module.value is not None:
        raise ValueError(
            f"model.value: {module.value} brings weights of its own, or an adapter on others than the policy's, and "
            "with model.lora the value network is an adapter on the policy's: leave model.value out, or name a LoRA "
            "checkpoint that was trained on the same weights"
        )
    rank_zero_info(
        f"the value network starts as the policy with a fresh head: {found.where} stands on other weights than the "
        "policy"
    )
    return over(start)


def _rewards(module: LitPolicy, roles: Roles) -> Mapping[str, str]:
    """Roles of the reward models that stand on the policy's trunk, by their checkpoints."""
    scored: dict[str, str] = {}
    for reward in every_reward(module.rewards):
        if isinstance(reward, RewardModel) and reward.checkpoint not in scored:
            found = blueprint(reward.checkpoint, "reward")
            if found.adapted is not None and roles.shares(found):
                scored[reward.checkpoint] = f"reward_{len(scored)}"
                roles.add(scored[reward.checkpoint], found, roles.lora, trained=False)
    return scored


def _identity(roles: Roles, reference: Blueprint) -> str:
    """A fingerprint of a reference on the shared trunk."""
    assert roles.base.fingerprint is not None
    if reference.adapted is None:
        return roles.base.fingerprint
    digest = hashlib.sha256(roles.base.fingerprint.encode())
    weights = reference.adapted.weights
    for name in sorted(weights.names()):
        digest.update(f"{name}{whole_weight(weights, name).double().sum().item():.9e}".encode())
    return digest.hexdigest()
