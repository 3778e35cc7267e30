"""Stop a policy that has collapsed, before it burns the rest of the budget and overwrites what was good.

Read are the collection's own metrics, which are the same on every rank, once a collection.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["STATUS", "CollapseGuard"]

STATUS = 3
"""Exit status of a run that was stopped because its policy collapsed."""

# what a bound is held against: the first of these metrics that the policy logs
_READS = {
    "max_kl": ("objective/kl", "kl"),
    "min_reward": ("objective/scores", "reward"),
    "max_reward_drop": ("objective/scores", "reward"),
    "min_entropy": ("policy/entropy_avg", "entropy"),
    "max_clipped": ("completions/clipped_ratio",),
    "min_length": ("completions/mean_length",),
    "max_length": ("completions/mean_length",),
}


class CollapseGuard(Callback):
    """Stop training, with the reason, when a policy is outside one of its bounds for several collections in a row.

    A bound is held against what the policy logs for a collection. The reason is printed, the checkpoint callbacks save
    as at any end, and the command line ends with status 3. A run that is resumed goes on counting.

    Args:
        max_kl: largest divergence from the reference in nats a completion (`objective/kl`; of objectives that log
            only `kl`, a token).
        min_reward: smallest mean reward (`objective/scores`, or `reward`).
        max_reward_drop: how far the mean reward may fall below its best so far, as a share of the best's size. Of
            rewards around zero use min_reward.
        min_entropy: smallest entropy of the policy in nats a token (`policy/entropy_avg`, or `entropy`).
        max_clipped: largest share of completions that run out of tokens (`completions/clipped_ratio`).
        min_length: smallest mean length of completions in tokens (`completions/mean_length`).
        max_length: largest mean length of completions in tokens.
        reward: metric that the bounds on the reward read, such as rewards/NAME/mean; None: see there.
        patience: collections in a row outside of a bound that end the run.
    """

    def __init__(
        self,
        max_kl: float | None = None,
        min_reward: float | None = None,
        max_reward_drop: float | None = None,
        min_entropy: float | None = None,
        max_clipped: float | None = None,
        min_length: float | None = None,
        max_length: float | None = None,
        reward: str | None = None,
        patience: int = 3,
    ) -> None:
        bounds = {
            "max_kl": max_kl, "min_reward": min_reward, "max_reward_drop": max_reward_drop,
            "min_entropy": min_entropy, "max_clipped": max_clipped, "min_length": min_length, "max_length": max_length,
        }  # fmt: skip
        self.bounds = {name: float(value) for name, value in bounds.items() if value is not None}
        if not self.bounds:
            raise ValueError(f"CollapseGuard watches nothing: set at least one of {', '.join(bounds)}")
        for name, value in self.bounds.items():
            low, high = (-math.inf, math.inf) if name == "min_reward" else (0, 1 if name == "max_clipped" else math.inf)
            if not (low <= value <= high and math.isfinite(value)):
                wanted = "finite" if name == "min_reward" else f"in [0, {high:g}]" if high == 1 else "at least 0"
                raise ValueError(f"CollapseGuard: {name} is {value}; it must be {wanted}")
        if patience < 1:
            raise ValueError(f"CollapseGuard: patience is {patience}; it must be at least 1")
        if self.bounds.get("min_length", 0) > self.bounds.get("max_length", math.inf):
            raise ValueError(f"CollapseGuard: min_length {min_length} is above max_length {max_length}")
        self.reward, self.patience = reward, patience
        self.reason = ""
        self._judged = -1
        self._best: float | None = None
        self._outside: dict[str, int] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.reason = ""
        needs = getattr(getattr(pl_module, "objective", None), "needs", ())
        if stage == "fit" and "rollouts" not in needs:
            raise ValueError(
                "CollapseGuard watches what a policy samples while it trains, and this run does not sample: leave it "
                "out (SpikeRewind watches a loss)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        loader = pl_module.rollouts.loader
        if loader.buffer is not None:  # resumed within a collection, whose metrics were logged with its first step
            self._judged = loader.collection

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        collection = pl_module.rollouts.loader.collection
        if collection == self._judged:
            return
        self._judged = collection
        values = self._values(trainer, pl_module)
        for name, limit in self.bounds.items():
            bound = self._bound(name, limit)
            value = values[name]
            good = value >= bound if name.startswith("min") or name == "max_reward_drop" else value <= bound
            self._outside[name] = 0 if good else self._outside.get(name, 0) + 1
            if self._outside[name] >= self.patience and not self.reason:
                side = "below" if value < bound else "above" if value > bound else "no number against"
                self.reason = (
                    f"{self._metric(trainer, name)} was {value:.4g} in collection {collection}, {side} {bound:.4g} "
                    f"({name} {limit:g}) for {self._outside[name]} collections in a row"
                )
        if "max_reward_drop" in values and values["max_reward_drop"] > (
            -math.inf if self._best is None else self._best
        ):
            self._best = values["max_reward_drop"]
        if self.reason:
            self._stop(trainer)

    def _bound(self, name: str, limit: float) -> float:
        if name != "max_reward_drop":
            return limit
        return -math.inf if self._best is None else self._best - limit * abs(self._best)

    def _metric(self, trainer: Trainer, bound: str) -> str:
        """The metric that a bound reads.

        Raises:
            ValueError: the policy logs none of them.
        """
        names = (self.reward,) if self.reward and "reward" in bound else _READS[bound]
        for name in names:
            if name in trainer.callback_metrics:
                return name
        raise ValueError(
            f"CollapseGuard: {bound} reads {' or '.join(names)}, which this policy does not log: leave {bound} out"
        )

    def _values(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The metric of each bound; the mean over ranks, so that all decide alike on those of a rank's own rows."""
        found = [float(trainer.callback_metrics[self._metric(trainer, name)]) for name in self.bounds]
        if trainer.world_size > 1:
            shared = torch.tensor(found, device=pl_module.device)
            found = trainer.strategy.reduce(shared, reduce_op="mean").tolist()  # type: ignore[union-attr]
        return dict(zip(self.bounds, found, strict=True))

    def _stop(self, trainer: Trainer) -> None:
        trainer.should_stop = True
        if trainer.is_global_zero:
            # of the first process only: Lightning's launcher takes a bad status of another for a crash
            trainer.exit_status = STATUS  # type: ignore[attr-defined]
            print(f"lit-palm: stopped by CollapseGuard: {self.reason}", file=sys.stderr, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """The best reward, the last collection judged, and for how many each bound was broken."""
        return {"judged": self._judged, "best": self._best, "outside": dict(self._outside)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self._judged, self._best = int(state_dict["judged"]), state_dict["best"]
        self._outside = {name: int(count) for name, count in state_dict["outside"].items()}
