"""Learning a reward model from people: pairs, rankings or ratings."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lit_palm.models.base import NetworkConfig, ScalarNetwork
from lit_palm.models.lora import LoRA
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.host import LitModule, default_optimizer
from lit_palm.modules.lora_stages import one_role
from lit_palm.modules.sharding import Sharding
from lit_palm.modules.spread import Networks
from lit_palm.modules.weights import blueprint, over
from lit_palm.objectives.base import Kind, Objective
from lit_palm.objectives.functional import RunningMoments, rows_that_count
from lit_palm.objectives.reward_ranking import RewardRanking
from lit_palm.parallel.sharded import bare
from lit_palm.types import Experience, Output

__all__ = ["LitRewardModel", "last_scores"]


def last_scores(network: nn.Module, tokens: Tensor, mask: Tensor, calibrated: bool = True) -> Tensor:
    """Score [B] at the last real token of each right-padded row."""
    values: Tensor = network(tokens, calibrated=calibrated)
    last = (mask.sum(1) - 1).clamp(min=0)
    return values.gather(1, last[:, None]).squeeze(1)


class LitRewardModel(LitModule):
    """A scalar on top of a language model, trained on pairs, rankings or ratings.

    Validation logs `val/loss`, `val/accuracy` (ranked pairs ordered as people did), `val/margin` and
    `val/{min,mean,max}_reward`; monitor `val/accuracy` (mode max) or `val/loss`. After each validation the score is
    calibrated on the validation answers, so that what a checkpoint scores has mean 0 (and deviation 1) over them; the
    metrics are of raw scores.

    Args:
        network: the path of a language model's checkpoint (its trunk gets a fresh head) or of a reward model's, or a
            configuration to start from nothing.
        objective: default RewardRanking.
        optimizer: takes parameter groups, returns the optimiser.
        scheduler: takes the optimiser, returns a learning-rate schedule, advanced by optimiser step.
        clip_per_network: clip each network's gradient by its own norm rather than all together.
        overrides: fields to change in the configuration of the checkpoint's network, such as `dropout`.
        calibrate: `mean` shifts the score to mean 0, `whiten` also scales it to deviation 1, `none` leaves it.
        pooling: read the score off the `last` token, or the running `mean` over all tokens, which small networks learn
            from less data. A reward model's checkpoint keeps its own.
        sharding: how networks are spread where the Trainer's strategy spreads them.
        lora: train an adapter beside frozen weights, which checkpoints then name instead of holding; None: train all
            weights.
        unfrozen_layers: train so many of the topmost blocks and what is above them; None: everything.
        compile: run the network's blocks through `torch.compile`: for GPUs; the first steps take minutes. A PaLM only.
    """

    kind: ClassVar[Kind] = "reward"
    progress_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __init__(
        self,
        network: str | NetworkConfig,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        scheduler: LRSchedulerCallable | None = None,
        clip_per_network: bool = False,
        overrides: dict[str, Any] | None = None,
        calibrate: Literal["none", "mean", "whiten"] = "mean",
        pooling: Literal["last", "mean"] = "last",
        sharding: Sharding | None = None,
        lora: LoRA | None = None,
        unfrozen_layers: int | None = None,
        compile: bool = False,
    ) -> None:
        objective = objective or RewardRanking()
        options = clip_per_network, overrides, sharding, lora, unfrozen_layers, compile
        super().__init__(network, objective, optimizer, scheduler, *options)
        self.calibrate = calibrate
        self.pooling = pooling
        self._moments = RunningMoments()

    @property
    def stage_name(self) -> str:
        """What the progress bar calls this stage."""
        return "reward model"

    def build_networks(self) -> dict[str, nn.Module] | Networks:
        if isinstance(self.network, str) and "reward" in read_checkpoint(self.network, True).header["networks"]:
            found = blueprint(self.network, "reward", self.overrides)
            found.unfrozen = self.unfrozen_layers
        else:
            found = over(self.blueprint(), self.pooling)
        return one_role(self, "reward", found) if self.lora is not None else {"reward": self.make("reward", found)}

    def _output(self, batch: Experience, calibrated: bool = False) -> Output:
        return Output(scores=last_scores(self.networks["reward"], batch["tokens"], batch["mask"], calibrated))

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        return self.account(self.loss_of(self._output(batch), batch), batch)

    def _evaluate(self, batch: Experience, prefix: str) -> Output:
        output = self._output(batch)
        loss = self.loss_of(output, batch)
        weight = self.objective.weight(batch)
        assert isinstance(loss.total, Tensor) and isinstance(weight, Tensor)
        self.add_to_means({"loss": (loss.total, weight), **loss.metrics}, prefix)
        return output

    def on_validation_epoch_start(self) -> None:
        self._moments = RunningMoments()

    def validation_step(self, batch: Experience, batch_idx: int, dataloader_idx: int = 0) -> None:
        output = self._evaluate(batch, "val/")
        assert output.scores is not None
        if batch_idx == 0:
            self.samples = self._as_samples(batch)
        self._moments.update(output.scores[rows_that_count(batch)])

    def _as_samples(self, batch: Experience, count: int = 8) -> list[dict[str, Any]]:
        """The first answers with their scores as they come out, for people to read."""
        rows, tokenizer = batch.select(range(min(count, batch.num_rows))), self.ready_tokenizer
        scores = self._output(rows, calibrated=True).scores
        assert scores is not None
        return [
            {
                "prompt": tokenizer.decode(tokens[mask & ~answer].tolist()),
                "completion": tokenizer.decode(tokens[answer].tolist()),
                "rewards": {"score": score},
            }
            for tokens, mask, answer, score in zip(
                rows["tokens"], rows["mask"], rows["loss_mask"], scores.tolist(), strict=True
            )
        ]

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.calibrate == "none" or self.trainer.sanity_checking or self.trainer.state.fn != TrainerFn.FITTING:
            return
        moments = self._moments
        own = torch.tensor([moments.count, moments.mean, moments.sum_sq], dtype=torch.float64, device=self.device)
        mean, std = _merge(torch.stack([part.to(self.device) for part in self.layout.gather(own)]))
        scalar = bare(self.networks["reward"])
        assert isinstance(scalar, ScalarNetwork)
        scalar.calibrate(mean, std if self.calibrate == "whiten" else None)

    def test_step(self, batch: Experience, batch_idx: int) -> None:
        self._evaluate(batch, "test/")

    def predict_step(self, batch: Experience, batch_idx: int) -> dict[str, Any]:
        """Scores of a batch of answers, with their group."""
        scores = self._output(batch, calibrated=True).scores
        assert scores is not None
        return {"scores": scores.cpu(), "group": batch["group"].cpu() if "group" in batch else None}


def _merge(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation from (count, mean, sum of squares) of several ranks."""
    count, mean, sum_sq = moments.unbind(1)
    total = count.sum().clamp(min=1)
    overall = (count * mean).sum() / total
    spread = (sum_sq + count * (mean - overall).square()).sum()
    std = (spread / (total - 1).clamp(min=1)).sqrt()
    return overall.float(), torch.where(std > 0, std, 1.0).float()
