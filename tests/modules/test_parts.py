"""Minibatches without their padding, side by side or in parts: the same update for fewer tokens computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm.models.palm import PaLM
from lit_palm.modules import LitPolicy
from lit_palm.modules.parts import in_parts
from lit_palm.rollout import lengths
from lit_palm.rollout.sampling import Sampling
from lit_palm.types import Experience, Output
from tests.support import apart, policy, preference_policy, prompt_data, ranking_data, trainer, weights

ALWAYS, NEVER = 0, 10**9
ROLLOUT = {"num_prompts": 16, "minibatch_size": 8, "passes": 2}
WAYS = {"side by side": (True, NEVER), "in parts": (False, ALWAYS), "padded": (False, NEVER)}


def take(way: str, patch: pytest.MonkeyPatch) -> None:
    """Whether a PaLM runs rows side by side, and what a further pass costs."""
    patch.setattr(PaLM, "takes_sequences", WAYS[way][0])
    patch.setattr(lengths, "ON_THE_HOST", WAYS[way][1])


def trained(
    module: LitPolicy, data: Any, folder: Path, precision: str, **options: Any
) -> tuple[dict[str, Tensor], list[tuple[int, ...]], dict[str, float]]:
    """Weights, shapes of all training passes, and metrics, after a run."""
    run = trainer(folder, precision=precision, gradient_clip_val=0.5, **options)
    shapes: list[tuple[int, ...]] = []
    start = module.on_train_start

    def watched() -> None:
        start()
        for network in module.networks.values():
            network.register_forward_pre_hook(
                lambda _, args: shapes.append(tuple(args[0].shape)) if torch.is_grad_enabled() else None
            )

    module.on_train_start = watched  # type: ignore[method-assign]
    run.fit(module, datamodule=data)
    values = {k: float(v) for k, v in run.callback_metrics.items() if not k.startswith(("time/", "perf/"))}
    return weights(module), shapes, values


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("precision, tolerance", [("64-true", 1e-11), ("32-true", 2e-5)])
@pytest.mark.parametrize("way", ["side by side", "in parts"])
def test_ppo_takes_the_same_steps(
    way: str, precision: str, tolerance: float, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight steps of AdamW, whose direction where gradients are near zero is rounding's: that bounds float32."""
    results = []
    for how in (way, "padded"):
        take(how, monkeypatch)
        module = policy(rollout=ROLLOUT, sampling=Sampling(max_new_tokens=12))
        build = module.build_networks

        def pooled(build: Any = build) -> Any:
            networks = build()
            networks["value"].pooling = pooling
            return networks

        module.build_networks = pooled  # type: ignore[method-assign]
        results.append(trained(module, prompt_data(tmp_path), tmp_path, precision, max_epochs=2))
    (quick, shapes, metrics), (slow, padded, expected) = results
    assert len(padded) == 2 * 8 and all(b == 8 for b, _ in padded)
    assert (len(shapes) == 16 and all(b == 1 for b, _ in shapes)) if way == "side by side" else len(shapes) > 16
    assert sum(b * t for b, t in shapes) < 0.9 * sum(b * t for b, t in padded)
    assert apart(quick, slow) < tolerance
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        near = 0.03 if "clipfrac" in name else 1e-4  # one of some ninety tokens may fall to the other side of a clip
        assert metrics[name] == pytest.approx(value, rel=1e-3, abs=near), name


def test_pairs_stay_together_and_take_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for how in WAYS:
        take(how, monkeypatch)
        data = ranking_data(tmp_path, batch_size=6)
        results.append(trained(preference_policy(), data, tmp_path, "64-true", max_epochs=1))
    *quick, (whole, padded, expected) = results
    for found, shapes, metrics in quick:
        assert sum(b * t for b, t in shapes) < sum(b * t for b, t in padded)
        assert apart(found, whole) < 1e-11
        assert metrics["val/loss"] == pytest.approx(expected["val/loss"], rel=1e-6)


def test_what_a_part_gives_is_put_in_its_rows_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "ON_THE_HOST", ALWAYS)
    length = torch.tensor([2, 7, 3, 7, 1])
    mask = torch.arange(7) < length[:, None]
    batch = Experience(tokens=torch.arange(35).view(5, 7), mask=mask, row=torch.arange(5), group=torch.arange(5))
    seen = []

    def compute(rows: Experience) -> Output:
        seen.append(tuple(rows["tokens"].shape))
        values = torch.where(rows["mask"], rows["tokens"].double(), 0)
        return Output(logps=values.requires_grad_(), scores=rows["row"].double(), extra={"twice": 2 * values})

    output = in_parts(batch, compute, [torch.nn.Identity()])
    expected = torch.where(mask, batch["tokens"].double(), 0)
    assert output.logps is not None and torch.equal(output.logps, expected) and output.logps.requires_grad
    assert output.scores is not None and output.scores.tolist() == [0, 1, 2, 3, 4]
    assert output.extra is not None and torch.equal(output.extra["twice"], 2 * expected)
    assert output.values is None and len(seen) == 4 and seen[0] == (2, 7)
    for options in ({"together": True}, {}):
        seen.clear()
        packed = batch if options else Experience(batch, documents=torch.zeros_like(batch["tokens"]))
        in_parts(packed, compute, [torch.nn.Identity()], **options)
        assert seen == [(5, 7)], "one pass where all processes take part in it, and of packed rows"
