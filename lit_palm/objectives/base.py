"""What an objective is: pure functions of tensors that say what to optimise.

An objective never sees a model, a Trainer, an optimiser, a device or a rank. The host runs the networks, hands over an
`Output` and an `Experience`, divides the summed loss and applies it. Entry-point group `lit_palm.objectives`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor

from lit_palm.types import Experience, Loss, Output

__all__ = ["Kind", "Need", "Objective"]

Kind = Literal["language_model", "reward", "policy"]
Need = Literal["rollouts", "old_logps", "rollout_logps", "reference", "value", "reward", "entropy", "log_z"]


class Objective(ABC):
    """Base class of every objective; subclass it, implement `weight` and `loss`, and register an entry point.

    The life of a batch: (rollout objectives) `prepare` once for each collection of all ranks -> minibatches ->
    the networks give an `Output` -> `loss` -> backward -> gradients divided by the summed `weight` of the optimiser
    step -> clip -> step. `state_dict` holds what is carried from step to step and is saved in every checkpoint.
    """

    API_VERSION: ClassVar[int] = 1
    """The plugin interface this class was written for; a plugin states a literal of its own."""

    kind: ClassVar[Kind] = "policy"
    """Which LightningModule runs it."""

    grouped: ClassVar[bool] = False
    """True when rows of one `group` must stay in one micro-batch (pairs, rankings, groups of completions)."""

    @property
    def coupled(self) -> bool:
        """True when the loss of a row depends on other rows of its micro-batch beyond its group (a sort, a batch
        statistic), so that cutting a batch into micro-batches changes it. What is coupled cannot promise that
        accumulation and several processes take the step of one large batch."""
        return False

    @property
    def needs(self) -> frozenset[Need]:
        """What the host must provide: `rollouts` (sample completions), `old_logps` (of the policy that sampled, as
        training computes them), `rollout_logps` (as the engine reported them), `reference` (ref_logps), `value` (a
        value network), `reward` (scores), `entropy` and `log_z` (in the output)."""
        return frozenset()

    @property
    def old_logps_dispensable(self) -> bool:
        """True when `prepare` does without `old_logps`, and `loss` takes the output's own log-probabilities, detached,
        where a batch has none: what the policy that sampled would say, as long as no step has been taken since. A
        collection that is learned from in one step is then spared the pass for them."""
        return False

    importance_cap: float | None = None
    """Where it cuts the ratios that it weighs tokens by, where completions come from elsewhere; None: it does not."""

    def sampled_elsewhere(self) -> None:  # noqa: B027
        """Told once, before training, that completions come from other kernels or older weights than those trained (a
        remote engine, asynchronous rollouts): an objective that can correct for it needs `rollout_logps` from then
        on, unless its settings say otherwise."""

    @property
    def extras(self) -> frozenset[str]:
        """Names of what the network must give beside log-probabilities, in `output.extra`: for objectives that come
        with a network of their own, whose `Network.extras` has them."""
        return frozenset()

    def accept(self, experience: Experience) -> Tensor | None:
        """Which sampled rows may enter the collection, before `prepare`; others are replaced by new prompts.

        Dynamic sampling (DAPO) drops groups whose rewards are all equal. As long as rows are missing, further prompts
        are sampled, for at most `rollout.max_rounds` rounds in all; then the collection stays smaller.

        Args:
            experience: the rows of all ranks of one round, annotated, with whole groups, on the CPU.

        Returns:
            [B] bool, equal within a group; None accepts everything.
        """
        return None

    def prepare(self, experience: Experience) -> Experience:
        """Add what the loss needs, once for each collection; gets the rows of all ranks, on the CPU.

        Args:
            experience: the whole collection.

        Returns:
            The experience with more fields, and possibly fewer rows (best-of-n selection).
        """
        return experience

    def num_kept(self, num_prompts: int, completions: int) -> int:
        """How many rows `prepare` keeps at most; override it together with a selection.

        A collection that keeps fewer makes a shorter epoch.

        Args:
            num_prompts: prompts of a collection.
            completions: completions sampled for each.

        Raises:
            ValueError: the objective cannot work with so many completions a prompt.
        """
        return num_prompts * completions

    @abstractmethod
    def weight(self, experience: Experience) -> Tensor | dict[str, Tensor]:
        """What the summed loss is divided by: the number of valid tokens, pairs or rows of this micro-batch.

        Returns:
            A scalar tensor, or one by name when `Loss.total` has several terms.
        """

    @abstractmethod
    def loss(self, output: Output, experience: Experience) -> Loss:
        """The summed loss of a micro-batch with its metrics (each a sum and a count)."""

    def after_step(self, metrics: dict[str, float]) -> bool:
        """Told the metrics of the optimiser step over all ranks, before the step is taken.

        Returns:
            True to leave the remaining minibatches of this collection unused (for example on too large a KL); the
            step that found out is not taken.
        """
        return False

    @property
    def watches(self) -> tuple[str, ...]:
        """Names of the metrics that `after_step` reads; others are not reduced over the ranks for it."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What is carried from step to step, as plain numbers, strings and tensors (safe to load)."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore what `state_dict` gave."""
