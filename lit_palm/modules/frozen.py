"""Where a policy's frozen networks are: reference and reward models, on the device or kept on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_palm.models.adapted import is_view
from lit_palm.parallel.sharded import is_sharded, roots

if TYPE_CHECKING:
    from lit_palm.modules.policy import LitPolicy

__all__ = ["move_frozen", "place_frozen", "stays_away"]


def stays_away(module: LitPolicy) -> bool:
    """Whether frozen networks are on the device only while completions are sampled and judged."""
    return module.sharding.frozen == "offloaded" and "rollouts" in module.objective.needs


def move_frozen(module: LitPolicy, to_device: bool) -> None:
    """Whole frozen networks to the device, or back to the host; sharded ones see to it themselves."""
    for network in module.frozen.values():
        if not list(roots(network)) and not is_view(network):
            network.to(module.device) if to_device else network.cpu()


def place_frozen(module: LitPolicy, stage: str) -> None:
    """Before a stage: frozen networks where they belong, and a reference that is precomputed off the device.

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
    reference = module.frozen["reference"]
    if all(known) and not is_sharded(reference) and not is_view(reference):
        reference.cpu()
