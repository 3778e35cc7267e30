"""The reference: computed once before training, or following the policy."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule

from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.modules.policy import LitPolicy
from lit_palm.modules.reference import ReferenceUpdate
from lit_palm.rollout.sampling import Sampling
from tests.support import (
    Selective,
    apart,
    config,
    everything,
    policy,
    preference_policy,
    prompt_data,
    ranking_data,
    same,
    trainer,
    weights,
)


def fit(folder: Path, module: LitPolicy, **options: Any) -> Any:
    run = trainer(folder, **{"max_epochs": 2, **options})
    run.fit(module, datamodule=ranking_data(folder, batch_size=3))
    return run


def test_a_reference_computed_in_advance_changes_nothing(tmp_path: Path) -> None:
    plain = fit(tmp_path, preference_policy())
    module = preference_policy(precompute_reference=True)
    passes = []
    original = module.reference_logps
    module.reference_logps = lambda batch, **options: (  # type: ignore[method-assign]
        passes.append(batch.num_rows),
        original(batch, **options),
    )[1]
    run = fit(tmp_path, module)
    # rows are batched otherwise: rounding of float32
    assert apart(everything(plain)["weights"], everything(run)["weights"]) < 1e-4
    for name in ("val/loss", "val/gain", "val/accuracy", "val/loss/pairs", "val/loss/tokens"):
        assert float(run.callback_metrics[name]) == pytest.approx(float(plain.callback_metrics[name]), abs=1e-4), name
    total = run.callback_metrics["val/loss/pairs"] + run.callback_metrics["val/loss/tokens"]
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(float(total))
    # every training and validation answer once: 12 rankings of 2, 3 or 4, and 6 more
    assert sum(passes) == sum(2 + i % 3 for i in range(12)) + sum(2 + i % 3 for i in range(50, 56))


def test_a_reference_computed_in_advance_is_let_go_and_made_again_when_asked_for(tmp_path: Path) -> None:
    """While training nothing holds it; completing prompts afterwards measures the divergence from the same network."""
    module = preference_policy(precompute_reference=True, sampling=Sampling(max_new_tokens=8))
    watched: list[weakref.ref[Any]] = []
    start: dict[str, Any] = {}
    original = module.reference_logps

    def logps(batch: Any, **options: Any) -> Any:
        result = original(batch, **options)
        watched.append(weakref.ref(module.frozen["reference"]))
        start.update(weights(module.frozen["reference"]))
        return result

    module.reference_logps = logps  # type: ignore[method-assign]

    class LetGo(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            gc.collect()
            assert watched and all(found() is None for found in watched)

    run = trainer(tmp_path, max_epochs=2, callbacks=[LetGo()])
    run.fit(module, datamodule=ranking_data(tmp_path, batch_size=3))
    assert run.global_step == 8
    before = copy.deepcopy(start)
    [found] = trainer(tmp_path).validate(module, datamodule=prompt_data(tmp_path), verbose=False)
    assert abs(found["val/kl"]) > 1e-3, "it is not the policy"
    same(start, before)


def test_a_reference_that_changed_while_it_was_away_is_refused(tmp_path: Path) -> None:
    """A file that is replaced is still mapped, and the run keeps its reference; one that is written over is not."""
    path, other = tmp_path / "reference.ckpt", tmp_path / "other.ckpt"
    fit(tmp_path / "one", preference_policy(), max_steps=1).save_checkpoint(path)
    fit(tmp_path / "two", preference_policy(), max_steps=2).save_checkpoint(other)
    module = preference_policy(reference=str(path), precompute_reference=True, sampling=Sampling(max_new_tokens=8))
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=ranking_data(tmp_path, batch_size=3))
    with path.open("r+b") as file:
        file.write(other.read_bytes())
    with pytest.raises(ValueError, match=r"reference\.ckpt has changed since the run began, which needs it"):
        trainer(tmp_path).validate(module, datamodule=prompt_data(tmp_path), verbose=False)


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_how_samples_are_drawn_says_nothing_about_given_data(temperature: float, tmp_path: Path) -> None:
    plain = fit(tmp_path, preference_policy(), max_epochs=1)
    sampling = Sampling(temperature=temperature)
    run = fit(tmp_path, preference_policy(precompute_reference=True, sampling=sampling), max_epochs=1)
    assert apart(everything(plain)["weights"], everything(run)["weights"]) < 1e-4


def test_a_reference_in_advance_is_that_of_the_data_at_hand(tmp_path: Path) -> None:
    module = preference_policy(precompute_reference=True)
    fit(tmp_path, module, max_epochs=1)
    (tmp_path / "other").mkdir()
    more = ranking_data(tmp_path / "other", count=24, batch_size=3)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=more)
    batch = more._elements["train"].collate(np.arange(24))
    expected = module.reference_logps(batch).detach()
    assert module.precomputed is not None
    assert float((module.precomputed.logps("train", batch) - expected).abs().max()) < 1e-5


def test_a_run_with_a_reference_in_advance_resumes_to_the_last_bit(tmp_path: Path) -> None:
    module = preference_policy(precompute_reference=True)
    whole = fit(tmp_path, module)
    first = fit(tmp_path / "first", preference_policy(precompute_reference=True), max_steps=3)
    first.save_checkpoint(tmp_path / "third.ckpt")
    second = trainer(tmp_path / "second", max_epochs=2)
    data = ranking_data(tmp_path / "second", batch_size=3)
    second.fit(
        preference_policy(precompute_reference=True), datamodule=data, ckpt_path=tmp_path / "third.ckpt",
        weights_only=False,
    )  # fmt: skip
    same(everything(whole)["weights"], everything(second)["weights"])


def test_prompts_are_completed_whatever_is_known_in_advance(tmp_path: Path) -> None:
    def found(**options: Any) -> Any:
        module = preference_policy(sampling=Sampling(max_new_tokens=8), **options)
        return trainer(tmp_path).validate(module, datamodule=prompt_data(tmp_path), verbose=False)

    assert found(precompute_reference=True) == found()


def test_foreign_data_is_named(tmp_path: Path) -> None:
    class Foreign(LightningDataModule):
        tokenizer = ByteTokenizer()

        def train_dataloader(self) -> Any:
            return [1]

    with pytest.raises(ValueError, match=r"precompute_reference .* needs a data module of lit_palm"):
        trainer(tmp_path, max_epochs=1).fit(preference_policy(precompute_reference=True), datamodule=Foreign())


def test_the_reference_in_advance_is_the_starting_point_not_the_policy(tmp_path: Path) -> None:
    module = preference_policy(precompute_reference=True)
    run = fit(tmp_path, module, max_epochs=1)
    assert abs(float(run.callback_metrics["val/gain"])) > 1e-3


@pytest.mark.parametrize(
    "options, match",
    [
        ({"precompute_reference": True, "reference_update": ReferenceUpdate()}, "exclude each other"),
        ({"objective": Selective(), "rewards": policy().rewards, "precompute_reference": True}, "needs no reference"),
        ({"objective": policy().objective, "rewards": policy().rewards, "precompute_reference": True}, "PPO samples"),
    ],
)
def test_what_cannot_be_combined_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LitPolicy(**{"network": config(), "objective": preference_policy().objective, **options})


def test_updates_of_the_reference_are_those_of_a_loop(tmp_path: Path) -> None:
    module = preference_policy(reference_update=ReferenceUpdate(mix=0.25, every=2))
    seen: list[dict[str, Any]] = []
    original = module.training_step

    def step(batch: Any, batch_idx: int) -> Any:
        seen.append({"policy": weights(module.networks["policy"]), "reference": weights(module.networks["reference"])})
        return original(batch, batch_idx)

    module.training_step = step  # type: ignore[method-assign]
    fit(tmp_path, module)
    expected = copy.deepcopy(seen[0]["policy"])
    assert len(seen) == 8
    for number, found in enumerate(seen):
        if number and number % 2 == 0:
            expected = {k: 0.75 * v + 0.25 * found["policy"][k] for k, v in expected.items()}
        assert apart(expected, found["reference"]) < 1e-6, number


def test_a_reference_follows_under_rollouts_too(tmp_path: Path) -> None:
    module = policy(reference_update=ReferenceUpdate(mix=1.0, every=1))
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    run.fit(module, datamodule=prompt_data(tmp_path))
    assert float(run.callback_metrics["objective/kl"]) < 1e-2, "the reference is a copy of a step before"
    still = policy()
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    run.fit(still, datamodule=prompt_data(tmp_path))
    assert float(run.callback_metrics["objective/kl"]) > 1e-2


def test_a_collection_is_held_to_the_reference_as_it_is_after_the_last_step(tmp_path: Path) -> None:
    module = policy(reference_update=ReferenceUpdate(mix=1.0, every=4))
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    run.fit(module, datamodule=prompt_data(tmp_path))
    # four steps a collection, after each of which the reference is the policy that samples the next
    assert run.global_step == 8 and abs(float(run.callback_metrics["objective/kl"])) < 1e-5


def test_a_reference_of_another_shape_cannot_follow(tmp_path: Path, stages: dict[str, Path]) -> None:
    module = preference_policy(
        network=config(d_model=32, vocab_size=263),
        reference=str(stages["language_model"]),
        reference_update=ReferenceUpdate(),
    )
    with pytest.raises(ValueError, match=r"reference_update mixes .* another shape"):
        fit(tmp_path, module)


@pytest.mark.parametrize("fields", [{"mix": 0.0}, {"mix": 1.5}, {"every": 0}])
def test_wrong_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"reference_update.{next(iter(fields))}"):
        ReferenceUpdate(**fields)


def test_the_starting_reference_is_a_copy(tmp_path: Path) -> None:
    module = preference_policy(reference_update=ReferenceUpdate(mix=1.0, every=1))
    fit(tmp_path, module, max_epochs=1)
    reference = module.networks["reference"]
    owned = {p.data_ptr() for p in module.networks["policy"].parameters()}
    assert not owned & {p.data_ptr() for p in reference.parameters()}
    assert torch.is_grad_enabled() and not any(p.requires_grad for p in reference.parameters())
