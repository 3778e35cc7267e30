"""Pre-training and fine-tuning a language model."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lit_palm.models.adapted import sampling_from
from lit_palm.models.base import Network, NetworkConfig
from lit_palm.models.logprobs import TokenLogProbs
from lit_palm.models.lora import LoRA
from lit_palm.modules.host import LitModule, default_optimizer
from lit_palm.modules.lora_stages import one_role
from lit_palm.modules.parts import laid
from lit_palm.modules.sharding import Sharding
from lit_palm.modules.spread import Networks
from lit_palm.objectives.base import Kind, Objective
from lit_palm.objectives.language_modeling import LanguageModeling
from lit_palm.rollout.engine import CachedEngine, Engine
from lit_palm.rollout.sampling import Sampling, row_seeds
from lit_palm.types import Experience, Output

__all__ = ["LitLanguageModel", "language_model_output"]


def language_model_output(
    network: nn.Module,
    batch: Experience,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    log_z: bool = False,
    extras: Collection[str] = (),
) -> dict[str, Any]:
    """Log-probabilities (and more) of the tokens in `loss_mask`, chunked over the vocabulary; [B, T] each.

    What only this network gives, of which `extras` says the names, is in a dictionary `extra`. Padding of rows
    with a `group` is not computed, and a prompt that several of them share once, where that saves work.
    """
    tokens, targets = batch["tokens"], batch.host["loss_mask"]
    options: dict[str, Any] = {"temperature": temperature, "entropy": entropy, "log_z": log_z, "extras": extras}
    packed = laid(network, batch)
    result: dict[str, Any]
    if packed is None:
        head = TokenLogProbs(tokens, targets, **options)
        result = network(tokens, positions=batch.get("positions"), documents=batch.get("documents"), head=head)
    else:
        result = network(
            packed.tokens,
            positions=packed.positions,
            sequences=packed.sequences,
            head=TokenLogProbs(tokens, targets, source=packed.source, **options),
        )
    if extras:
        result["extra"] = {name: result.pop(name) for name in extras}
    return result


class LitLanguageModel(LitModule):
    """Next-token prediction on text or demonstrations; which tokens count is the data module's business.

    Validation logs `val/loss` (the objective a token), `val/perplexity` and `val/bits_per_byte`, the figure that
    compares models of different tokenisers; monitor `val/loss` or `val/bits_per_byte`.

    Args:
        network: a configuration to pre-train from nothing, or the path of a checkpoint to go on from.
        objective: default LanguageModeling.
        optimizer: takes parameter groups, returns the optimiser.
        scheduler: takes the optimiser, returns a learning-rate schedule, advanced by optimiser step.
        clip_per_network: clip each network's gradient by its own norm rather than all together.
        overrides: fields to change in the configuration of the checkpoint's network, such as `dropout`.
        sample_prompts: prompts continued after every validation, for TensorBoard.
        sampling: how they are continued.
        sample_seed: seed of those samples; the same at every validation, so that samples compare.
        sharding: how networks are spread where the Trainer's strategy spreads them.
        lora: train an adapter beside frozen weights, which checkpoints then name instead of holding; None: train all
            weights.
        unfrozen_layers: train so many of the topmost blocks and what is above them; None: everything.
        compile: run the network's blocks through `torch.compile`: for GPUs; the first steps take minutes. A PaLM only.
    """

    kind: ClassVar[Kind] = "language_model"

    def __init__(
        self,
        network: str | NetworkConfig,
        objective: Objective | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        scheduler: LRSchedulerCallable | None = None,
        clip_per_network: bool = False,
        overrides: dict[str, Any] | None = None,
        sample_prompts: list[str] | None = None,
        sampling: Sampling | None = None,
        sample_seed: int = 0,
        sharding: Sharding | None = None,
        lora: LoRA | None = None,
        unfrozen_layers: int | None = None,
        compile: bool = False,
    ) -> None:
        objective = objective or LanguageModeling()
        options = clip_per_network, overrides, sharding, lora, unfrozen_layers, compile
        super().__init__(network, objective, optimizer, scheduler, *options)
        self.sample_prompts = sample_prompts or []
        self.sampling = sampling or Sampling()
        self.sample_seed = sample_seed
        self.engine: Engine = CachedEngine()
        self._num_bytes: Tensor | None = None

    @property
    def stage_name(self) -> str:
        """What the progress bar calls this stage."""
        return "fine-tuning" if isinstance(self.network, str) else "pre-training"

    def build_networks(self) -> dict[str, nn.Module] | Networks:
        if self.lora is not None:
            return one_role(self, "policy", self.blueprint())
        return {"policy": self.make("policy", self.blueprint())}

    def _output(self, batch: Experience) -> Output:
        needs, extras = self.objective.needs, self.objective.extras
        return Output(**language_model_output(self.networks["policy"], batch, log_z="log_z" in needs, extras=extras))

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        return self.account(self.loss_of(self._output(batch), batch), batch)

    def _evaluate(self, batch: Experience, prefix: str) -> None:
        output = self._output(batch)
        loss = self.loss_of(output, batch)
        weight = self.objective.weight(batch)
        assert isinstance(loss.total, Tensor) and isinstance(weight, Tensor) and output.logps is not None
        if self._num_bytes is None or self._num_bytes.device != self.device:
            assert self.tokenizer is not None
            self._num_bytes = self.tokenizer.num_bytes().to(self.device)
        num_bytes = self._num_bytes[batch["tokens"]][batch["loss_mask"]].sum()
        nll = -output.logps.sum()
        metrics = {"loss": (loss.total, weight), "nll": (nll, weight), "bits_per_byte": (nll / math.log(2), num_bytes)}
        self.add_to_means(metrics, prefix)

    def validation_step(self, batch: Experience, batch_idx: int) -> None:
        self._evaluate(batch, "val/")

    def test_step(self, batch: Experience, batch_idx: int) -> None:
        self._evaluate(batch, "test/")

    def on_validation_epoch_end(self) -> None:
        means = self.log_means()
        if "val/nll" in means:
            self.log("val/perplexity", math.exp(min(means["val/nll"], 80.0)), sync_dist=True)
        if self.sample_prompts and not self.trainer.sanity_checking:
            self.samples = [
                {"prompt": prompt, "completion": text, "rewards": {}}
                for prompt, text in zip(self.sample_prompts, self.complete(self.sample_prompts), strict=True)
            ]

    def complete(self, prompts: list[str]) -> list[str]:
        """Continue texts with the module's sampling settings; the same seed gives the same continuations."""
        assert self.tokenizer is not None
        ids = [self.tokenizer.prefix + self.tokenizer.encode(p) for p in prompts]
        seeds = row_seeds(self.sample_seed, 0, torch.arange(len(ids)))
        with self.uneven_passes(), sampling_from(self.network_of("policy")):
            generation = self.engine.generate(
                cast(Network, self.network_of("policy")),
                [torch.tensor(i) for i in ids],
                self.sampling,
                seeds,
                pad_id=self.tokenizer.pad_id,
                eos_id=self.tokenizer.eos_id,
                decode=self.tokenizer.decode,
            )
        return [self.tokenizer.decode(c.tolist()) for c in generation.completions]

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, str]]:
        """Continue a batch of prompts (`PromptData`)."""
        return [
            {"prompt": p, "completion": c}
            for p, c in zip(batch["prompts"], self.complete(batch["prompts"]), strict=True)
        ]
