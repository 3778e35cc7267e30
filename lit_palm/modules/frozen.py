"""Where a policy's frozen networks are: reference and reward models, on the device, kept on the host, or let go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lit_palm.models.adapted import is_view
from lit_palm.modules.weights import fingerprint
from lit_palm.parallel.sharded import is_sharded, roots

if TYPE_CHECKING:
    from lit_palm.modules.policy import LitPolicy

__all__ = ["move_frozen", "place_frozen", "reference_of", "stays_away"]


def stays_away(module: LitPolicy) -> bool:
    """Whether frozen networks are on the device only while completions are sampled and judged."""
    return module.sharding.frozen == "offloaded" and "rollouts" in module.objective.needs


def move_frozen(module: LitPolicy, to_device: bool) -> None:
    """Whole frozen networks to the device, or back to the host; sharded ones see to it themselves."""
    for network in module.frozen.values():
        if not list(roots(network)) and not is_view(network):
            network.to(module.device) if to_device else network.cpu()


def place_frozen(module: LitPolicy, stage: str) -> None:
    """Before a stage: frozen networks where they belong, and of a reference that is precomputed no weights.

    Args:
        module: the policy.
        stage: `fit`, `validation`, `test` or `predict`.
    """
    move_frozen(module, not stays_away(module))
    for reward in module.rewards:
        reward.network = module.frozen.get(f"reward/{reward.name}", reward.network)
    if module.precomputed is None or "reference" not in module.objective.needs or stage == "predict":
        return
    sources = getattr(getattr(module.trainer, "datamodule", None), "sources", {})
    stages = ("train", "validation") if stage == "fit" else (stage,)
    used = [part for part in stages if part not in sources or sources[part][0] is not None]
    known = [module.precomputed.fill(module, part) for part in used]
    reference = module.frozen.get("reference")
    if all(known) and reference is not None and not is_sharded(reference) and not is_view(reference):
        del module.frozen["reference"]


def reference_of(module: LitPolicy) -> nn.Module:
    """The frozen reference; where it was let go, made again from what it was made of.

    Raises:
        ValueError: the checkpoint that it comes from has changed since.
    """
    if "reference" not in module.frozen:
        found = module.reference_blueprint
        assert found is not None, "made with the networks"
        with module.trainer.strategy.tensor_init_context():
            network = module.layout.make(found, frozen=True)
        if fingerprint(network, found) != module._reference_id:
            raise ValueError(f"{found.where} has changed since the run began, which needs it as its reference again")
        module.frozen["reference"] = network.to(module.device)
    return module.frozen["reference"]
