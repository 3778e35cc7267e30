"""Objectives that reject or drop samples: more rounds, shorter epochs, records as files; the engine's log-probs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_palm.callbacks import RolloutWriter
from lit_palm.rollout.engine import CachedEngine, Generation
from lit_palm.types import Experience, Loss, Output
from tests.support import (
    Selective,
    apart,
    count_a,
    everything,
    policy,
    prompt_data,
    selective_policy,
    trainer,
    weights,
)


class Steps(Callback):
    """The number of optimiser steps of each epoch, and what was logged at its first."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.current_epoch == len(self.steps):
            self.steps.append(0)
            self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.steps[trainer.current_epoch] += 1


def test_an_epoch_is_as_long_as_what_was_kept(tmp_path: Path) -> None:
    module, steps = selective_policy(reject=False), Steps()
    trainer(tmp_path, max_epochs=3, callbacks=[steps]).fit(module, datamodule=prompt_data(tmp_path))
    # of 16 completions 12, 6 and 4, in minibatches of 4, in two passes
    assert steps.steps == [6, 4, 2]


def test_validation_at_the_end_of_a_short_epoch_is_not_left_out(tmp_path: Path) -> None:
    module, seen = selective_policy(reject=False), []
    original = module.on_validation_epoch_end
    module.on_validation_epoch_end = lambda: (seen.append(module.trainer.global_step), original())[1]
    trainer(tmp_path, max_epochs=3).fit(module, datamodule=prompt_data(tmp_path))
    assert seen == [6, 10, 12]


@pytest.mark.parametrize("interval", [1.0, 0.5])
def test_validation_that_is_due_in_a_short_epoch_is_not_lost_with_the_run(interval: float, tmp_path: Path) -> None:
    def validations(resume: Path | None, *callbacks: Callback) -> list[int]:
        module, seen = selective_policy(reject=False), []
        original = module.on_validation_epoch_end
        module.on_validation_epoch_end = lambda: (seen.append(module.trainer.global_step), original())[1]
        run = trainer(tmp_path, max_epochs=3, val_check_interval=interval, callbacks=list(callbacks))
        run.fit(module, datamodule=prompt_data(tmp_path), ckpt_path=resume)
        return seen

    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = validations(None, saved)
    assert whole == ([6, 10, 12] if interval == 1.0 else [3, 6, 8, 10, 11, 12])
    for step in (3, 6, 8, 9, 10):  # saved before the validation that is due there
        assert validations(tmp_path / f"step={step}.ckpt") == [s for s in whole if s >= step], step


def test_rejected_prompts_are_replaced_by_others(tmp_path: Path) -> None:
    module, steps = selective_policy(), Steps()
    run = trainer(tmp_path, max_epochs=2, callbacks=[steps, RolloutWriter(str(tmp_path / "rollouts"))])
    run.fit(module, datamodule=prompt_data(tmp_path))
    first = steps.logged[0]
    assert 1 < first["rollout/rounds"] <= 3
    rows = [json.loads(line) for line in (tmp_path / "rollouts/collection-00000.jsonl").read_text().splitlines()]
    assert len(rows) <= 16 and first["rollout/accepted"] == pytest.approx(len(rows) / (16 * first["rollout/rounds"]))
    spread: dict[int, list[float]] = {}
    for row in rows:
        spread.setdefault(row["group"], []).append(row["score"])
    # whole prompts of four answers, whose rewards differ, from more than the first round's four prompts
    assert all(len(scores) == 4 and max(scores) - min(scores) > 1.5 for scores in spread.values())
    assert max(spread) >= 4
    kept = sorted(row["score"] for row in rows if row["kept"])
    assert len(kept) == int(0.75 * len(rows)) and kept[0] >= max(r["score"] for r in rows if not r["kept"])
    best = max(rows, key=lambda row: row["rewards"]["count_a"])
    assert best["rewards"]["count_a"] == count_a([best["completion"]])[0]


def test_where_everything_is_rejected_it_says_so_and_moves_nothing(tmp_path: Path) -> None:
    module = selective_policy()
    module.objective.accept = lambda experience: torch.zeros(experience.num_rows, dtype=torch.bool)  # type: ignore[method-assign]
    before: dict[str, Any] = {}
    module.on_train_start = lambda: (before.update(weights(module)), type(module).on_train_start(module))[1]  # type: ignore[method-assign]
    run = trainer(tmp_path, max_epochs=1, callbacks=[RolloutWriter(str(tmp_path / "rollouts"))])
    with pytest.warns(UserWarning, match="all completions of collection 0 were rejected by Selective"):
        run.fit(module, datamodule=prompt_data(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "rollouts/collection-00000.jsonl").read_text().splitlines()]
    assert len(rows) == 16 and not any(row["kept"] for row in rows)
    assert module.trainer.global_step == 6 and apart(before, weights(module)) == 0.0


class InTerms(Selective):
    """The same with a loss of two terms, each with a weight of its own."""

    def weight(self, experience: Experience) -> Any:
        return {"tokens": super().weight(experience), "rows": experience["loss_mask"].any(1).sum()}

    def loss(self, output: Output, experience: Experience) -> Loss:
        assert output.logps is not None
        return Loss({"tokens": super().loss(output, experience).total, "rows": -0.1 * output.logps.sum()})


@pytest.mark.parametrize("objective", [Selective, InTerms])
def test_a_collection_of_which_nothing_is_kept_moves_nothing(objective: type[Selective], tmp_path: Path) -> None:
    module = selective_policy()
    module.objective = objective(share=0.0, reject=False)
    run = trainer(tmp_path, max_epochs=1)
    before: dict[str, Any] = {}
    module.on_train_start = lambda: (before.update(weights(module)), type(module).on_train_start(module))[1]  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="kept no completion"):
        run.fit(module, datamodule=prompt_data(tmp_path))
    # AdamW would decay the weights
    assert run.global_step == 2 and apart(before, weights(module)) == 0.0


def test_the_writer_needs_samples(tmp_path: Path) -> None:
    from tests.support import language_model, text_data

    run = trainer(tmp_path, max_epochs=1, callbacks=[RolloutWriter(str(tmp_path))])
    with pytest.raises(ValueError, match=r"RolloutWriter .* does not sample"):
        run.fit(language_model(), datamodule=text_data(tmp_path))


# ------------------------------------------------------------------------------------------ whose log-probabilities


def trained(folder: Path, choice: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    module = policy(rollout={"old_logps": choice}, **options)
    run = trainer(folder, max_epochs=2)
    run.fit(module, datamodule=prompt_data(folder))
    return module, everything(run)


def test_the_engines_log_probabilities_stand_in_when_they_agree(tmp_path: Path) -> None:
    module, state = trained(tmp_path, "auto")
    assert module.engine_agrees is True
    _, expected = trained(tmp_path, "trainer")
    # float32, two collections: the two ways differ by rounding, 1e-6 a token
    assert 0 < apart(expected["weights"], state["weights"]) < 1e-3


class Rounded(CachedEngine):
    """An engine that computes in less precision."""

    def generate(self, *args: Any, **kwargs: Any) -> Generation:
        found = super().generate(*args, **kwargs)
        found.logps = [values + 5e-5 for values in found.logps]
        return found


def test_an_engine_that_is_off_is_not_trusted_unless_told(tmp_path: Path) -> None:
    module, state = trained(tmp_path, "auto", engine=Rounded())
    assert module.engine_agrees is False
    _, expected = trained(tmp_path, "trainer", engine=Rounded())
    assert apart(expected["weights"], state["weights"]) == 0.0
    _, other = trained(tmp_path, "engine", engine=Rounded())
    assert apart(expected["weights"], other["weights"]) > 0.0


def test_forward_passes_that_nobody_needs_are_left_out(tmp_path: Path) -> None:
    calls = []
    module = selective_policy(reject=False)
    original = module.policy_logps
    module.policy_logps = lambda batch: (calls.append(module.rollouts.loader.collection), original(batch))[1]  # type: ignore[method-assign]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(module, datamodule=prompt_data(tmp_path))
    assert calls and set(calls) == {0}, "after the check at the start, the engine's are taken"


def test_a_wrong_choice_is_named() -> None:
    with pytest.raises(ValueError, match=r"rollout\.old_logps is 'both': choose auto, trainer, engine"):
        policy(rollout={"old_logps": "both"})
