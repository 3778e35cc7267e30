"""Optimising a policy: PPO by default, any policy objective, with rollouts or from offline data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_palm.models.adapted import is_view
from lit_palm.models.base import Network, NetworkConfig
from lit_palm.models.lora import LoRA
from lit_palm.modules.checkpoint import Role
from lit_palm.modules.compatibility import check_reference, check_rewards, check_sampling, samples_elsewhere
from lit_palm.modules.evaluation import evaluate_prompts, means_of_rows
from lit_palm.modules.frozen import move_frozen, place_frozen, reference_of, stays_away
from lit_palm.modules.handover import Handover
from lit_palm.modules.host import LitModule, default_optimizer
from lit_palm.modules.language_model import language_model_output
from lit_palm.modules.lora_stages import policy_roles
from lit_palm.modules.parts import in_parts, scalars
from lit_palm.modules.reference import PrecomputedReference, ReferenceUpdate
from lit_palm.modules.rollouts import Rollouts
from lit_palm.modules.sharding import Sharding
from lit_palm.modules.spread import Networks
from lit_palm.modules.weights import Blueprint, blueprint, fingerprint, over
from lit_palm.objectives.base import Kind, Objective
from lit_palm.objectives.ppo import PPO
from lit_palm.parallel.sharded import roots
from lit_palm.rollout.collector import RolloutConfig
from lit_palm.rollout.engine import CachedEngine, Engine
from lit_palm.rollout.loader import RolloutLoader
from lit_palm.rollout.rewards import Reward, RewardModel, every_reward
from lit_palm.rollout.rewards.base import NetworkLoader
from lit_palm.rollout.sampling import Sampling
from lit_palm.types import Experience, Output

__all__ = ["LitPolicy"]


class LitPolicy(LitModule):
    """A policy with whatever its objective needs beside it: a frozen reference, a value network, rewards.

    Training with an objective that samples takes prompts (`PromptData`); one Lightning epoch is one collection.
    Offline objectives take the data they were written for. Validation continues fixed prompts with fixed seeds and
    logs `val/reward`, `val/rewards/NAME`, `val/kl` (nats a completion), `val/length` and `val/ended`; monitor
    `val/reward` (mode max).

    Args:
        network: the path of a fine-tuned checkpoint to start from, or a configuration to start from nothing.
        objective: default PPO.
        rewards: what completions are worth, a weighted sum; each is logged under its name.
        reference: checkpoint of the frozen reference; None: the policy as it starts.
        precompute_reference: compute the reference's log-probabilities of all data once, before training, and let the
            network go; for given data, not for rollouts.
        reference_update: let the reference follow the policy (an EMA, or TR-DPO's updates); None: it stays frozen.
        value: checkpoint whose weights the value network starts from; None: the first reward model's, else the
            policy's with a fresh head.
        rollout: sizes of a collection and of its minibatches.
        sampling: how completions are drawn, in training and validation; log-probabilities are taken at its temperature.
        engine: what samples.
        optimizer: takes parameter groups, returns the optimiser.
        scheduler: takes the optimiser, returns a learning-rate schedule, advanced by optimiser step.
        value_lr: learning rate of the value network; None: the optimiser's.
        clip_per_network: clip each network's gradient by its own norm rather than all together.
        overrides: fields to change in the configuration of the checkpoint's network, such as `dropout`.
        sharding: how networks are spread where the Trainer's strategy spreads them, and what is kept off the device.
        lora: train adapters of policy and value on one frozen network, which is the reference too; None: all weights.
        unfrozen_layers: train so many of the policy's topmost blocks and what is above them (of a value network that
            starts as the policy too); None: everything.
        compile: run the network's blocks through `torch.compile`: for GPUs; the first steps take minutes. A PaLM only.
    """

    kind: ClassVar[Kind] = "policy"
    progress_metrics: ClassVar[tuple[str, ...]] = ("reward", "objective/scores", "objective/kl", "val/reward", "val/kl")

    def __init__(
        self,
        network: str | NetworkConfig,
        objective: Objective | None = None,
        rewards: list[Reward] | None = None,
        reference: str | None = None,
        value: str | None = None,
        rollout: RolloutConfig | None = None,
        sampling: Sampling | None = None,
        engine: Engine | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        scheduler: LRSchedulerCallable | None = None,
        value_lr: float | None = None,
        clip_per_network: bool = False,
        overrides: dict[str, Any] | None = None,
        precompute_reference: bool = False,
        reference_update: ReferenceUpdate | None = None,
        sharding: Sharding | None = None,
        lora: LoRA | None = None,
        unfrozen_layers: int | None = None,
        compile: bool = False,
    ) -> None:
        objective = objective or PPO()
        options = clip_per_network, overrides, sharding, lora, unfrozen_layers, compile
        super().__init__(network, objective, optimizer, scheduler, *options)
        self.rewards: list[Reward] = list(rewards or [])
        check_rewards(self.objective, [reward.name for reward in self.rewards])
        check_reference(self.objective, precompute_reference, reference_update is not None, lora is not None)
        self.reference, self.value, self.value_lr = reference, value, value_lr
        self.reference_update = reference_update
        self.precomputed = PrecomputedReference() if precompute_reference else None
        self.rollout = rollout or RolloutConfig()
        self.sampling = sampling or Sampling()
        self.engine: Engine = engine or CachedEngine()
        self.handover = Handover(self)
        check_sampling(self.engine, self.sampling, self.objective)
        self.samples_elsewhere = samples_elsewhere(self.engine, self.rollout, self.objective)
        """Completions come from other kernels or older weights than those trained."""
        if self.samples_elsewhere:
            self.objective.sampled_elsewhere()
        # frozen networks stay out of the module tree: neither trained, synchronised, nor written into checkpoints
        self.frozen: dict[str, nn.Module] = {}
        self.rollouts: Rollouts | None = None
        self.reference_blueprint: Blueprint | None = None
        self._reference_id = ""
        self._validation_started = 0.0
        self.engine_agrees: bool | None = None
        """The engine's log-probabilities equalled those of training in the first collection; None: not known yet."""
        self.starts_as_reference = False
        """True until the first step of a policy whose reference is itself as it started."""

    # ------------------------------------------------------------------ networks

    @property
    def stage_name(self) -> str:
        """What the progress bar calls this stage."""
        return type(self.objective).__name__

    def build_networks(self) -> dict[str, nn.Module] | Networks:
        start = self.blueprint()
        self.starts_as_reference = self.reference is None
        # validation and prediction report the divergence, so there is a reference whatever the objective needs
        if self.lora is not None:
            return policy_roles(self, start)
        networks: dict[str, nn.Module] = {"policy": self.make("policy", start)}
        if "value" in self.objective.needs:
            networks["value"] = self.make("value", self.value_blueprint(start))
        there = blueprint(self.reference, overrides=self.overrides) if self.reference else start
        self.reference_blueprint = there
        reference = self.layout.make(there, frozen=True)
        self._check_vocabulary(reference, "the reference")
        self._reference_id = fingerprint(reference, there)
        if self.reference_update is None:
            self.frozen = {"reference": reference}
        else:  # one that moves is a part of the run's state
            if [p.shape for p in start.empty.parameters()] != [p.shape for p in there.empty.parameters()]:
                raise ValueError(
                    f"model.reference_update mixes the policy's weights into those of {self.reference}, a network of "
                    "another shape: leave model.reference out, or name a checkpoint of the same network"
                )
            networks["reference"] = reference
        self.build_rewards(self.load_frozen)
        return networks

    def build_rewards(self, load: NetworkLoader) -> None:
        """The networks of rewards, among the frozen ones."""
        for reward in self.rewards:
            network = reward.build(load)
            if network is not None:
                self._check_vocabulary(network, reward.name)
                self.frozen[f"reward/{reward.name}"] = network.requires_grad_(False).eval()

    def load_frozen(self, checkpoint: str, role: str) -> nn.Module:
        """What a reward builds its network with."""
        return self.layout.make(blueprint(checkpoint, cast(Role, role)), frozen=True)

    def value_blueprint(self, policy: Blueprint) -> Blueprint:
        """What the value network starts as."""
        models = [r for r in every_reward(self.rewards) if isinstance(r, RewardModel)]
        source = self.value or (models[0].checkpoint if models else None)
        if source is None:
            return over(policy)
        found = blueprint(source, "value", self.overrides)
        self._check_vocabulary(found.empty, f"the value network of {source}")
        return found

    def _check_vocabulary(self, network: nn.Module, what: str) -> None:
        assert self.tokenizer is not None
        # a reward may bring several networks (an ensemble's members), or one of its own kind that only it can judge
        for trunk in (module for module in network.modules() if isinstance(module, Network)):
            if (trunk.config.vocab_size or 0) < self.tokenizer.vocab_size:
                raise ValueError(
                    f"{what} knows {trunk.config.vocab_size} token ids, the tokeniser has {self.tokenizer.vocab_size}: "
                    "both must come from the same tokeniser"
                )

    def group_options(self, role: str) -> dict[str, Any]:
        return {"lr": self.value_lr} if role == "value" and self.value_lr is not None else {}

    @contextmanager
    def uneven_passes(self) -> Iterator[None]:
        away = stays_away(self)
        if away:
            move_frozen(self, True)
        with super().uneven_passes():
            yield
        if away:
            move_frozen(self, False)

    def run_beside(self) -> list[nn.Module]:
        frozen = [root for network in self.frozen.values() if not is_view(network) for root in roots(network)]
        return [*super().run_beside(), *frozen]

    def on_fit_start(self) -> None:
        self._begin("fit")

    def on_validation_start(self) -> None:
        self._validation_started = time.perf_counter()
        if self.trainer.state.fn == "validate":  # within fit they are in their place already
            self._begin("validation")

    def on_validation_end(self) -> None:
        if self.rollouts is not None:  # is no part of the update
            self.rollouts.update_started += time.perf_counter() - self._validation_started

    def on_test_start(self) -> None:
        self._begin("test")

    def on_predict_start(self) -> None:
        self._begin("predict")

    def _begin(self, stage: str) -> None:
        self.handover.forget()
        place_frozen(self, stage)

    def follow(self) -> None:
        """Let the reference follow the policy too, where an update is due, before the next batch or collection."""
        update = self.reference_update
        if update is not None and update.due(self.followed, self.trainer.global_step):
            update.apply(self.networks["reference"], self.networks["policy"])
        super().follow()

    # ------------------------------------------------------------------ rollouts

    def rollout_loader(self, prompts: Sequence[dict[str, Any]]) -> RolloutLoader:
        """The training dataloader: collections sampled from prompts (rows with `prompt_ids`, `prompt`, `columns`).

        Raises:
            ValueError: the objective does not sample, there are no prompts, or sizes do not divide.
        """
        if "rollouts" not in self.objective.needs:
            raise ValueError(
                f"{type(self.objective).__name__} learns from given completions, not from prompts: use the data module "
                "it was written for (PreferenceData or DemonstrationData)"
            )
        if not prompts:
            raise ValueError("there are no prompts to sample from: is data.train empty?")
        self.rollouts = Rollouts(self, prompts)
        return self.rollouts.loader

    def numerics(self) -> AbstractContextManager[Any]:
        """The precision that training_step runs in; without it the first ratio would be off under autocast."""
        return self.trainer.precision_plugin.train_step_context()

    def policy_logps(self, batch: Experience) -> Tensor:
        """Log-probabilities [B, T] of the completion tokens under the policy, at the sampling temperature.

        Of greedy samples those at 1, as an engine reports them.
        """
        temperature = self.sampling.temperature or 1.0
        return language_model_output(self.network_of("policy"), batch, temperature=temperature)["logps"]

    def reference_logps(self, batch: Experience, temperature: float | None = None) -> Tensor:
        """The same under the frozen reference; of given data at a temperature of 1."""
        temperature = temperature or self.sampling.temperature or 1.0
        network = self.networks["reference"] if self.reference_update is not None else reference_of(self)
        network.eval()  # one that moves is among the trained networks
        return language_model_output(network, batch, temperature=temperature)["logps"]

    def state_values(self, batch: Experience) -> Tensor:
        """Value of the state in which each token was chosen: [B, T], what the network says one token earlier."""
        return torch.where(batch["loss_mask"], scalars(self.networks["value"], batch).roll(1, dims=1), 0)

    # ------------------------------------------------------------------ the step

    def on_train_start(self) -> None:
        super().on_train_start()
        if "rollouts" in self.objective.needs and self.rollouts is None:
            raise ValueError(
                f"{type(self.objective).__name__} samples its own completions and learns from prompts: use PromptData "
                f"instead of {type(getattr(self.trainer, 'datamodule', None)).__name__}"
            )
        if self.rollouts is not None:  # when resuming, Lightning asks what is due before it asks for a batch
            self.rollouts.fit_epoch()

    def on_train_epoch_start(self) -> None:
        if self.rollouts is not None:
            self.rollouts.loader.finish()

    def on_train_batch_start(self, batch: Experience, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.rollouts is not None:  # its loader cannot log: what it found out is logged with its first minibatch
            self.rollouts.fit_epoch()
            self.rollouts.check_step()
            for name, found in self.rollouts.pop_metrics().items():
                self.log(name, found, batch_size=1, prog_bar=name in self.progress_metrics)

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        self.starts_as_reference = False
        return self.account(self.loss_of(self._output(batch), batch), batch)

    def _output(self, batch: Experience) -> Output:
        return in_parts(batch, self._of_part, self.networks.values(), bool(self._layout and self._layout.shards))

    def _of_part(self, batch: Experience) -> Output:
        needs = self.objective.needs
        output = Output(
            **language_model_output(
                self.networks["policy"],
                batch,
                temperature=self.sampling.temperature if "rollouts" in needs else 1.0,
                entropy="entropy" in needs,
                log_z="log_z" in needs,
                extras=self.objective.extras,
            )
        )
        if "value" in needs:
            output.values = self.state_values(batch)
        if "reference" in needs and "rollouts" not in needs:
            output.ref_logps = self._reference_of_data(batch)
        return output

    @torch.no_grad()
    def _reference_of_data(self, batch: Experience) -> Tensor:
        if self.precomputed is None:
            return self.reference_logps(batch, temperature=1.0)
        stage = "train" if self.trainer.training else "test" if self.trainer.testing else "validation"
        return self.precomputed.logps(stage, batch)

    def stop_update(self) -> None:
        if self.rollouts is not None:
            self.rollouts.loader.stop()
            # Lightning ends the epoch with this batch instead of asking the loader for another one
            self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch = True

    def on_train_epoch_end(self) -> None:
        if self.rollouts is not None:
            self.log("time/update_s", time.perf_counter() - self.rollouts.update_started)

    # ------------------------------------------------------------------ validation and prediction

    def evaluate_prompts(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Continue a batch of prompts with seeds of their own; rows of text, length, divergence and rewards."""
        return evaluate_prompts(self, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._validate(batch, batch_idx, "val/")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._validate(batch, batch_idx, "test/")

    def _validate(self, batch: Any, batch_idx: int, prefix: str) -> None:
        if isinstance(batch, Experience):  # offline data
            loss, weight = self.loss_of(self._output(batch), batch), self.objective.weight(batch)
            if isinstance(loss.total, Tensor):
                assert isinstance(weight, Tensor)
                terms = {"loss": (loss.total, weight)}
            else:
                assert isinstance(weight, dict)
                terms = {f"loss/{name}": (total, weight[name]) for name, total in loss.total.items()}
                self.loss_terms = tuple(terms)
            self.add_to_means({**terms, **loss.metrics}, prefix)
            return
        rows = self.evaluate_prompts(batch)
        if batch_idx == 0:
            self.samples = rows[:8]
        self.add_to_means(means_of_rows(self, rows), prefix)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Completions of a batch of prompts with their rewards and divergence."""
        return self.evaluate_prompts(batch)

    # ------------------------------------------------------------------ checkpoints

    def header(self) -> dict[str, Any]:
        return super().header() | {"reference": self._reference_id, "engine_agrees": self.engine_agrees}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.starts_as_reference = False
        self.engine_agrees = checkpoint["lit_palm"].get("engine_agrees")
        if checkpoint["lit_palm"].get("reference") != self._reference_id:
            raise ValueError(
                "the frozen reference is not the one this run started with: name the same checkpoint as model.network "
                "(or model.reference), and do not change that file while a run depends on it"
            )
        self.followed = int(checkpoint.get("reference_step", self.followed))  # of earlier versions
