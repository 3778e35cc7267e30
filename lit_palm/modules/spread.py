"""A LightningModule whose networks are held as the Trainer's strategy says: whole, or each process a part of them.

It builds them in `configure_model`, each a root of its own, so that they can be called outside `training_step`; knows
which processes see the same rows; and keeps processes in step where their numbers of passes differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from torch import nn

from lit_palm.models.adapted import AdaptedNetwork
from lit_palm.models.compiled import compile_blocks
from lit_palm.models.lora import split_name
from lit_palm.modules.sharding import Layout, Sharding, check_strategy
from lit_palm.modules.weights import Blueprint
from lit_palm.parallel.sharded import clean_name, roots

if TYPE_CHECKING:
    from lit_palm.modules.shared import SharedBlueprint

__all__ = ["Networks", "SpreadModule"]


class Networks(nn.ModuleDict):
    """The trained networks by role."""

    stays = False
    """Parameters are kept on the host although the strategy moves modules to its device."""

    def _apply(self, fn: Any, recurse: bool = True) -> Networks:
        return self if self.stays else super()._apply(fn, recurse)

    def parameters_of(self, role: str) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of a role with their names."""
        return self[role].named_parameters()

    def sampled(self) -> nn.Module | None:
        """What is run when the policy is sampled from, as a strategy knows it."""
        return dict(self.items()).get("policy")


class SpreadModule(LightningModule):
    """Holds the trained networks by role.

    Args:
        sharding: how networks are spread where the Trainer's strategy spreads them.
        compile: run the blocks of trained networks compiled.
    """

    def __init__(self, sharding: Sharding | None = None, compile: bool = False) -> None:
        super().__init__()
        self._compiles = compile
        self.sharding = sharding or Sharding()
        self.networks = Networks()
        self._layout: Layout | None = None
        self._dims: dict[str, dict[str, int]] = {}
        self._sizes: dict[str, int] = {}
        self._stand_ins: dict[str, nn.Module] = {}

    def find_layout(self) -> None:
        """Read the Trainer's strategy, whose processes are connected by the time of `setup`.

        Raises:
            ValueError: it is none that these networks can be spread by.
        """
        check_strategy(self.trainer.strategy, self.sharding)
        self._layout = Layout(self.trainer.strategy, self.sharding, str(self.trainer.precision))

    @property
    def layout(self) -> Layout:
        """What this process is among all, and what it holds; after `setup`."""
        assert self._layout is not None, "processes know each other after setup"
        return self._layout

    def make(self, role: str, found: Blueprint) -> nn.Module:
        """The trained network of a role, or this process's part of it."""
        if self._layout is None:  # without a Trainer
            return found.whole()
        # a new network starts from the same weights on every process, whatever each one's generator says
        found.seed = int(self.trainer.strategy.broadcast(found.seed))
        self._dims[role] = {name: p.dim() for name, p in found.empty.named_parameters()}
        self._sizes[role] = sum(p.numel() for p in found.empty.parameters())
        return self._layout.make(found)

    def make_shared(self, found: SharedBlueprint) -> nn.Module:
        """The network that several roles share, or this process's part of it."""
        empty = found.empty
        assert isinstance(empty, AdaptedNetwork)
        frozen = sum(p.numel() for p in found.trunk.empty.parameters())
        for role in empty.trained:
            own = {n: p for n, p in empty.named_parameters() if (split_name(n) or ("",))[0] == role}
            self._dims[role] = {name: p.dim() for name, p in own.items()}
            # of a frozen matrix there is no gradient: 4 operations a weight instead of 6
            self._sizes[role] = sum(p.numel() for p in own.values()) + frozen * 2 // 3
        return self.layout.make(found)

    @property
    def flops_per_token(self) -> float | None:
        """6 x trained parameters (and 4 x frozen ones below adapters), whatever part of them this process holds; None
        before they are made."""
        return 6.0 * sum(self._sizes.values()) or None

    def build_networks(self) -> dict[str, nn.Module] | Networks:
        """The trained networks by role."""
        raise AssertionError("a module builds its networks")

    def configure_model(self) -> None:
        """Build the networks (once), each as the strategy spreads it, a root of its own."""
        if not self.networks:
            built = self.build_networks()
            self.networks = built if isinstance(built, Networks) else Networks(built)
            self.networks.stays = self.sharding.offload
            for network in self.networks.values() if self._compiles else ():
                compile_blocks(network)

    def network_of(self, role: str) -> nn.Module:
        """The network of a role, to be called."""
        return self._stand_ins.get(role, self.networks[role])

    @contextmanager
    def uneven_passes(self) -> Iterator[None]:
        """Passes without gradients whose number may differ from process to process, as when completions are sampled."""
        sampled = self.networks.sampled()
        with self.layout.passes(sampled, [n for n in self.run_beside() if n is not sampled]) as stand_in:
            if stand_in is not None and stand_in is not sampled:
                self._stand_ins["policy"] = stand_in
            try:
                yield
            finally:
                self._stand_ins.clear()

    def run_beside(self) -> list[nn.Module]:
        """Every spread network that is run while the policy samples, in the same order on every process."""
        return list(roots(self.networks))

    # ------------------------------------------------------------------ what the optimiser gets

    def parameter_groups(self) -> Iterator[dict[str, Any]]:
        """Parameter groups: one a network for matrices, one for vectors, which are not decayed."""
        for role in self.networks:
            params = [(name, p) for name, p in self.networks.parameters_of(role) if p.requires_grad]
            extra, dims = self.group_options(role), self._dims.get(role, {})
            # FSDP1 leaves flat parts, which do not tell what they are parts of
            flat = [dims.get(clean_name(name), p.dim()) <= 1 for name, p in params]
            matrices = [p for (_, p), is_vector in zip(params, flat, strict=True) if not is_vector]
            vectors = [p for (_, p), is_vector in zip(params, flat, strict=True) if is_vector]
            if matrices:
                yield {"params": matrices, **extra}
            if vectors:
                yield {"params": vectors, "weight_decay": 0.0, **extra}

    def group_options(self, role: str) -> dict[str, Any]:
        """Optimiser options of one network's groups, over the optimiser's own."""
        return {}
