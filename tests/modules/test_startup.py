"""The check of the first ratio: quiet for sound networks in every precision, loud for planted defects."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm.models.palm import PaLM, PaLMConfig
from lit_palm.modules import LitPolicy
from lit_palm.modules.startup import TOLERANCE
from lit_palm.rollout.engine import CachedEngine, Generation
from lit_palm.rollout.sampling import Sampling
from tests.support import policy, prompt_data, trainer

SHAPE: dict[str, Any] = {"d_model": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16, "max_length": 64}


@dataclass
class BlindConfig(PaLMConfig):
    """A network that forgets about padding."""

    def build(self) -> PaLM:
        return Blind(self)


class Blind(PaLM):
    takes_sequences = False

    def forward(self, tokens: Tensor, **options: Any) -> Any:
        return super().forward(tokens, **{**options, "mask": None, "positions": None})


@dataclass
class CrowdConfig(PaLMConfig):
    """A network whose rows see each other."""

    def build(self) -> PaLM:
        return Crowd(self)


class Crowd(PaLM):
    takes_sequences = False

    def forward(self, tokens: Tensor, *, head: Any = None, **options: Any) -> Any:
        def crowded(hidden: Tensor, weight: Tensor, scale: float) -> Any:
            return head(hidden - 0.1 * hidden.mean(0, keepdim=True), weight, scale)

        return super().forward(tokens, head=crowded, **options)


class Lukewarm(CachedEngine):
    """An engine that ignores the temperature."""

    def generate(self, network: Any, prompts: Any, sampling: Sampling, *args: Any, **options: Any) -> Generation:
        return super().generate(network, prompts, replace(sampling, temperature=1.0), *args, **options)


class Unfaithful(LitPolicy):
    """A policy whose reference is not its copy."""

    def build_networks(self) -> dict[str, Any]:
        networks = super().build_networks()
        with torch.no_grad():
            self.frozen["reference"].layers[0].attn_out.weight.mul_(1.5)
        return networks


def start(folder: Path, precision: Any = "32-true", kind: Any = None, **options: Any) -> tuple[LitPolicy, float]:
    """Run one step; the module, and the largest log-ratio of the first minibatch in training_step itself."""
    fields: dict[str, Any] = {
        "network": PaLMConfig(**SHAPE),
        "rollout": {"num_prompts": 16, "minibatch_size": 16},
        "sampling": Sampling(max_new_tokens=24, temperature=0.8),
    }
    module = policy(**{**fields, **options})
    if kind is not None:
        module.__class__ = kind
    found: list[float] = []
    original = module._output

    def output(batch: Any) -> Any:
        # whatever the weights' precision, what was measured while collecting stays as it was
        assert {batch[name].dtype for name in ("old_logps", "advantages", "returns", "values")} == {torch.float32}
        result = original(batch)
        found.append((result.logps - batch["old_logps"])[batch["loss_mask"]].abs().max().item())
        return result

    module._output = output
    run = trainer(folder, precision=precision, max_steps=1)
    run.fit(module, datamodule=prompt_data(folder, validation=None))
    return module, max(found[0], float(run.callback_metrics["startup/max_logratio"]))


# float32 is the issue's own bound, ten times what rounding makes here; the others are stated in startup.py
@pytest.mark.parametrize(
    "precision, bound",
    [("32-true", 1e-4), ("64-true", 1e-5), ("bf16-mixed", TOLERANCE[torch.bfloat16][0]), ("bf16-true", 0.5)],
)
def test_the_first_ratio_is_one_in_every_precision(precision: str, bound: float, tmp_path: Path) -> None:
    module, log_ratio = start(tmp_path, precision)
    assert log_ratio <= bound
    # the engine's log-probabilities against training's, each token's rounded to 2e-7, summed over a completion
    assert module.trainer.callback_metrics["objective/kl"].abs().item() < 5e-6, "the policy is its reference at first"
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert next(module.networks.parameters()).dtype == dtype


def test_float32_rounds_far_below_its_bound(tmp_path: Path) -> None:
    assert start(tmp_path)[1] < 1e-5


def test_dropout_is_off_while_collecting_and_scoring(tmp_path: Path) -> None:
    module, _ = start(tmp_path, network=PaLMConfig(**SHAPE, dropout=0.3))
    assert float(module.trainer.callback_metrics["startup/max_logratio"]) < 1e-5
    assert module.networks.training, "and on again in training"


def test_a_network_that_forgets_about_padding_is_found(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"between sampling and training.*cache"):
        start(tmp_path, network=BlindConfig(**SHAPE))


def test_a_network_whose_result_depends_on_the_batch_is_found(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"between collecting and training.*how rows are batched"):
        start(tmp_path, network=CrowdConfig(**SHAPE))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_engine_of_another_temperature_is_found(precision: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="between sampling and training"):
        start(tmp_path, precision, engine=Lukewarm())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_reference_that_is_no_copy_is_found(precision: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the reference is not a faithful copy"):
        start(tmp_path, precision, kind=Unfaithful)
