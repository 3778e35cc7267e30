"""The one host of every objective: runs the networks, divides the summed loss, clips, logs and checkpoints.

Reading order is Lightning's: setup -> configure_model -> configure_optimizers -> training_step ->
on_before_optimizer_step -> configure_gradient_clipping -> on_save_checkpoint.

Optimisation is automatic, so `accumulate_grad_batches`, `gradient_clip_val`, `precision`, `max_steps` and schedulers by
step keep the meaning a Lightning user knows. The one addition: an objective returns a *sum*, and after backward the
gradients are divided by the weight of the whole optimiser step, over all micro-batches and ranks. One large batch,
accumulation and data parallelism therefore take the same step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.optim import Optimizer

from lit_palm.data.tokenizers import Tokenizer
from lit_palm.models.base import NetworkConfig
from lit_palm.models.lora import LoRA
from lit_palm.models.weights import local
from lit_palm.modules import restoring, resume
from lit_palm.modules.checkpoint import FORMAT, network_to_dict, read_checkpoint, read_config
from lit_palm.modules.compatibility import (
    check_extras,
    check_objective,
    check_resumable,
    check_same_run,
    config_of,
    language_model_of,
)
from lit_palm.modules.finite import FiniteSteps, leave_out
from lit_palm.modules.means import Means
from lit_palm.modules.origin import origin
from lit_palm.modules.sharding import Sharding
from lit_palm.modules.spread import SpreadModule
from lit_palm.modules.step_weight import StepWeight
from lit_palm.modules.weights import Blueprint, blueprint
from lit_palm.objectives.base import Kind, Objective
from lit_palm.optim import Adafactor, fuse
from lit_palm.parallel.sharded import bare, roots, sum_over, total_norm
from lit_palm.types import Experience, Loss, Output
from lit_palm.version import __version__

__all__ = ["LitModule"]


def default_optimizer(params: Any) -> Optimizer:
    """AdamW with betas (0.9, 0.95), no weight decay and lr 1e-3."""
    return torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)


class LitModule(SpreadModule):
    """What `LitLanguageModel`, `LitRewardModel` and `LitPolicy` share; see the module's docstring.

    Args:
        network: a configuration to start from nothing, or the path of an earlier stage's checkpoint, which then also
            brings tokeniser and template.
        objective: what to optimise.
        optimizer: takes parameter groups, returns the optimiser.
        scheduler: takes the optimiser, returns a learning-rate schedule, advanced by optimiser step.
        clip_per_network: clip each network's gradient by its own norm rather than all together.
        overrides: fields to change in the configuration of the checkpoint's network, such as `dropout`.
        sharding: how networks are spread where the Trainer's strategy spreads them.
        lora: train adapters beside frozen weights; None: all weights.
        unfrozen_layers: train so many of the topmost blocks and what is above them; None: everything.
        compile: run the network's blocks through `torch.compile`: for GPUs; the first steps take minutes. A PaLM only.
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        network: str | NetworkConfig,
        objective: Objective,
        optimizer: OptimizerCallable = default_optimizer,
        scheduler: LRSchedulerCallable | None = None,
        clip_per_network: bool = False,
        overrides: dict[str, Any] | None = None,
        sharding: Sharding | None = None,
        lora: LoRA | None = None,
        unfrozen_layers: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(sharding, compile)
        if lora is not None:
            lora.check_installed()
        if lora is not None and unfrozen_layers is not None:
            raise ValueError("model.lora trains adapters and freezes all blocks: leave model.unfrozen_layers out")
        self.lora, self.unfrozen_layers = lora, unfrozen_layers
        check_objective(objective, type(self).__name__, self.kind, lora is not None)
        self.network = network
        self.objective = objective
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.clip_per_network = clip_per_network
        self.overrides = overrides or {}
        if self.overrides and not isinstance(network, str):
            raise ValueError("model.overrides changes a checkpoint's network; a new one is configured in model.network")
        self.tokenizer: Tokenizer | None = None
        self.samples: list[dict[str, Any]] = []
        self.num_tokens_seen: int | Tensor = 0
        self.means = Means()
        self.loss_terms: tuple[str, ...] = ()
        """Validation metrics that add up to the loss, of an objective with several terms."""
        self._seed: int | None = None
        self.run_config: dict[str, Any] | None = None
        self.step_weight, self.finite = StepWeight(), FiniteSteps()
        self.followed = 0
        """Optimiser steps after which everything has moved that follows trained weights."""
        self._frozen: frozenset[str] = frozenset()
        self._watched: dict[str, list[Tensor]] = {}

    # ------------------------------------------------------------------ set-up

    def load_tokenizer(self) -> Tokenizer | None:
        """The tokeniser of the checkpoint that `network` is or starts from; None when there is none."""
        path = self.network if isinstance(self.network, str) else next(iter(self.network.starts.values()), None)
        if self.tokenizer is None and path is not None:
            self.tokenizer = read_checkpoint(path, header_only=True).tokenizer
        return self.tokenizer

    def setup(self, stage: str) -> None:
        """Take the data's tokeniser, which has been checked against the checkpoint's."""
        data = getattr(self.trainer, "datamodule", None)
        self.tokenizer = getattr(data, "tokenizer", None) or self.load_tokenizer()
        if self.tokenizer is None or isinstance(self.tokenizer, str):
            raise ValueError("no tokeniser: name one with --data.tokenizer, or a checkpoint with --model.network")
        self.find_layout()
        restoring.install(self.trainer, lambda header: check_resumable(header, self.header(), self.networks))
        if stage == "fit":
            resume.check_trainer(self.trainer, "rollouts" in self.objective.needs)
        # with 16-bit weights Lightning would round what batches hold (old log-probabilities, advantages, returns), and
        # move the first ratio off 1; networks are given token ids alone
        self.trainer.precision_plugin.convert_input = _as_it_is  # type: ignore[method-assign]

    @property
    def ready_tokenizer(self) -> Tokenizer:
        """The tokeniser, after `setup`."""
        assert self.tokenizer is not None, "the tokeniser is known after setup"
        return self.tokenizer

    @property
    def pad_id(self) -> int:
        """The id that fills rows up."""
        return self.ready_tokenizer.pad_id

    @property
    def between_steps(self) -> bool:
        """True when no micro-batch waits for the rest of its optimiser step."""
        return self.step_weight.value is None

    def blueprint(self) -> Blueprint:
        """The language model that `network` describes, with its vocabulary taken from the tokeniser.

        Raises:
            ValueError: the vocabulary is smaller than the tokeniser's, or the checkpoint is unusable.
        """
        assert self.tokenizer is not None
        if not isinstance(self.network, str) and self.network.vocab_size is None:
            self.network.vocab_size = self.tokenizer.vocab_size
        found = blueprint(self.network, overrides=self.overrides)
        if (found.config.vocab_size or 0) < self.tokenizer.vocab_size:
            raise ValueError(
                f"the network has {found.config.vocab_size} token ids, the tokeniser {self.tokenizer.vocab_size}: "
                "leave model.network.init_args.vocab_size out to follow the tokeniser"
            )
        found.unfrozen = self.unfrozen_layers
        return found

    def configure_model(self) -> None:
        """Build the networks (once), and see that they give what the objective reads."""
        super().configure_model()
        if self.kind != "reward":
            check_extras(self.objective, self.networks["policy"])

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """One optimiser over all networks; the schedule advances by optimiser step."""
        optimizer = self.optimizer(list(self.parameter_groups()))
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            fuse(optimizer)
        if isinstance(optimizer, Adafactor) and isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "model.optimizer: Adafactor looks at whole matrices, of which FSDPStrategy leaves flat parts: use "
                "ModelParallelStrategy (configs/strategy/fsdp.yaml), or AdamW"
            )
        if self.scheduler is None:
            return {"optimizer": optimizer}
        scheduler = self.scheduler(optimizer)
        if hasattr(scheduler, "set_total_steps"):
            scheduler.set_total_steps(self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ------------------------------------------------------------------ the step

    def on_train_start(self) -> None:
        self.reset_step()
        if self._seed is None:  # a resumed run goes on with the seed it began with
            self._seed = int(self.trainer.strategy.broadcast(torch.initial_seed() % 2**63))

    def on_train_batch_start(self, batch: Experience, batch_idx: int) -> None:
        assert self._seed is not None
        resume.align(self.trainer, self._seed, self.layout.rank)
        self.follow()

    def follow(self) -> None:
        """Let what follows trained weights move where it is due, before the next batch.

        Not right after the step: a checkpoint that is saved there holds what comes before.
        """
        before, self.followed = self.followed, self.trainer.global_step
        with torch.no_grad():
            for network in self.networks.values():
                language_model_of(network).follow(before, self.followed)

    def reset_step(self) -> None:
        self.step_weight, self._frozen, self._watched = StepWeight(), frozenset(), {}
        self.finite.forget()

    def loss_of(self, output: Output, batch: Experience) -> Loss:
        """The objective's summed loss of a micro-batch.

        Raises:
            ValueError: the data lacks a field that the objective reads, or it returns something else than a Loss.
        """
        try:
            loss = self.objective.loss(output, batch)
        except KeyError as error:
            if error.args[0] in batch:
                raise
            raise ValueError(
                f"{type(self.objective).__name__} needs the field {error} in every batch; this data gives "
                f"{', '.join(batch)}: use a data module and columns that it was written for"
            ) from error
        if not isinstance(loss, Loss):
            raise ValueError(
                f"{type(self.objective).__name__}.loss() returned a {type(loss).__name__}: it must return "
                "lit_palm.Loss(sum over the rows, metrics)"
            )
        return loss

    def account(self, loss: Loss, batch: Experience) -> Tensor:
        """Add a micro-batch's weight to the optimiser step's, log its metrics, and give the scalar to differentiate."""
        total, shown = self.step_weight.add(self, loss, batch)
        self.finite.saw(total)
        self._frozen |= loss.frozen
        for name in self.objective.watches:
            value, count = loss.metrics[name]
            self._watched.setdefault(name, []).append(torch.stack([value.float(), count.float()]))
        self.num_tokens_seen = self.num_tokens_seen + batch["mask"].sum()
        self.log("loss", shown, prog_bar=True, batch_size=1)
        for name, (value, count) in loss.metrics.items():
            self.log(name, value / count.clamp(min=1), prog_bar=name in self.progress_metrics, batch_size=1)
        return total

    progress_metrics: ClassVar[tuple[str, ...]] = ()
    """Metrics shown beside the loss in the progress bar."""

    def all_sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks that see different rows."""
        return self.layout.sum(value)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide by the weight of the whole step; drop what this step must not change."""
        if not self.finite.taken(self, optimizer):
            return  # its gradients are dropped
        factor = self.step_weight.factor(self)
        if "rollouts" in self.objective.needs:  # nothing to learn from: momentum and decay must not move anything
            leave_out(self, optimizer, self.step_weight.total <= 0)
        grads = [local(p.grad) for p in self.parameters() if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor.to(grads[0]))
        for role in self._frozen:
            for _, parameter in self.networks.parameters_of(role):
                parameter.grad = None
        if self._watched and not self.finite.spoilt:
            sums = {k: self.all_sum(torch.stack(v).sum(0)).tolist() for k, v in self._watched.items()}
            if self.objective.after_step({k: s / max(n, 1) for k, (s, n) in sums.items()}):
                self.drop_gradients(self.networks)
                self.stop_update()
        self.reset_step()

    def stop_update(self) -> None:
        """Leave the rest of a collection's minibatches unused; modules with rollouts override it."""

    def drop_gradients(self, network: nn.Module) -> None:
        for p in network.parameters():
            p.grad = None  # not zero: momentum and weight decay would move the weights all the same

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning's, and logs `grad_norm` (before clipping); optionally each network by its own norm."""
        if gradient_clip_algorithm == "value" and gradient_clip_val is not None:
            if any(p.grad is not None for p in self.parameters()):  # torch cannot clip the values of a dropped step
                self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            gradient_clip_val = None
        group = next((root.process_group for root in roots(self.networks) if isinstance(root, FSDP)), None)
        squares = []
        roles = list(self.networks)
        for part in [[role] for role in roles] if self.clip_per_network else [roles]:
            parameters = [p for role in part for _, p in self.networks.parameters_of(role)]
            norm = total_norm(parameters, self.device)
            if group is not None:  # FSDP1's parts know nothing of each other
                norm = sum_over(norm.square(), group)
            squares.append(norm.square())
            if gradient_clip_val:
                nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)
        self.log("grad_norm", torch.stack(squares).sum().sqrt())

    # ------------------------------------------------------------------ checkpoints

    def header(self) -> dict[str, Any]:
        """The `lit_palm` entry of a checkpoint (see `lit_palm.modules.checkpoint`)."""
        assert self.tokenizer is not None
        return {
            "format": FORMAT,
            "version": __version__,
            "kind": self.kind,
            "networks": {role: network_to_dict(bare(network)) for role, network in self.networks.items()},
            "tokenizer": self.tokenizer.to_dict(),
            "num_tokens": int(self.num_tokens_seen),
            "seed": self._seed,
            "finite": self.finite.state_dict(),
            "followed": self.followed,
            **origin(self),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["lit_palm"] = self.header()
        resume.settle(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another kind, shape or tokeniser; restore what is carried from step to step.

        Raises:
            ValueError: naming what differs and the way out.
        """
        header = check_resumable(checkpoint.get("lit_palm"), own := self.header(), self.networks)
        if self.trainer.state.fn == "fit":
            check_same_run(checkpoint, own)
        if header["objective"]["class_path"] == own["objective"]["class_path"]:
            self.objective.load_state_dict(header["objective"]["state"])
        self.num_tokens_seen = int(header["num_tokens"])
        self._seed = header.get("seed")
        self.finite.load_state_dict(header.get("finite", {}))
        self.followed = int(header.get("followed", 0))

    # ------------------------------------------------------------------ helpers

    def add_to_means(self, metrics: dict[str, tuple[Tensor, Tensor]], prefix: str) -> None:
        """Add sums and counts of a validation batch; the means over everything are logged at the epoch's end."""
        # a process whose rows are all fillers adds them too, with no weight: all must add the same names
        for name, (value, count) in metrics.items():
            self.means.add(f"{prefix}{name}", value, count)

    def log_means(self) -> dict[str, float]:
        """Log, and return, the means of what was added."""
        means = self.means.pop(lambda sums: self.all_sum(sums.to(self.device)))
        for prefix in ("val/", "test/"):  # of an objective with several terms, the whole
            if self.loss_terms and f"{prefix}{self.loss_terms[0]}" in means:
                means[f"{prefix}loss"] = sum(means[f"{prefix}{name}"] for name in self.loss_terms)
        for name, value in means.items():
            shown = name in self.progress_metrics or name[4:] in self.progress_metrics
            self.log(name, value, prog_bar=shown, sync_dist=True)  # the same on every rank; Lightning would warn
        return means

    def on_validation_epoch_end(self) -> None:
        self.log_means()

    def on_test_epoch_end(self) -> None:
        self.log_means()

    @property
    def network_config(self) -> NetworkConfig:
        """Configuration of the network, before and after it is built."""
        if self.networks:
            return config_of(next(iter(self.networks.values())))
        if isinstance(self.network, str):
            return read_config(self.network)
        return self.network

    @property
    def vocab_size(self) -> int | None:
        """Number of token ids of the network; None: as many as the tokeniser has."""
        return self.network_config.vocab_size

    @property
    def context_length(self) -> int:
        """Longest sequence the network takes, in tokens."""
        return self.network_config.max_length


def _as_it_is(data: Any) -> Any:
    return data
