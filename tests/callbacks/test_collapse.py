"""A policy outside its bounds for several collections is stopped with the reason, and one that recovers is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_palm.callbacks import CollapseGuard, LastCheckpoint
from lit_palm.callbacks.collapse import STATUS
from tests.support import everything, language_model, policy, prompt_data, same, text_data, trainer


class Script(LastCheckpoint):
    """Puts values of our own in the place of a collection's, before they are logged."""

    def __init__(self, folder: Path, **values: list[float]) -> None:
        super().__init__(str(folder))
        self.values = {name.replace("__", "/"): found for name, found in values.items()}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        metrics, number = pl_module.rollouts.metrics, pl_module.rollouts.loader.collection
        if metrics:  # of a collection that was just made
            metrics |= {name: found[number] for name, found in self.values.items()}


def fit(folder: Path, guard: CollapseGuard, path: Any = None, flags: Any = None, **values: list[float]) -> Any:
    run = trainer(folder, callbacks=[guard, Script(folder / "kept", **values)], **{"max_epochs": 6, **(flags or {})})
    run.fit(policy(), datamodule=prompt_data(folder), ckpt_path=path)
    return run


REWARDS = {"objective__scores": [1.0, 4.0, 1.9, 2.5, 1.9, 1.8]}


@pytest.mark.parametrize(
    "bounds, values, stop, reason",
    [
        ({"max_kl": 5}, {"objective__kl": [6, 1, 6, 7, 1, 1]}, 4, "objective/kl was 7 in collection 3, above 5 (max"),
        ({"min_reward": 2}, REWARDS, 6, "objective/scores was 1.8 in collection 5, below 2 (min_reward"),
        ({"max_reward_drop": 0.5}, REWARDS, 6, "objective/scores was 1.8 in collection 5, below 2 (max_reward_drop"),
        ({"max_clipped": 0.5}, {"completions__clipped_ratio": [0, 0.6, 0.6, 0, 0, 0]}, 3, "completions/clipped_ratio"),
        ({"max_length": 9}, {"completions__mean_length": [10, 10, 1, 1, 1, 1]}, 2, "above 9 (max_length"),
        ({"min_length": 2}, {"completions__mean_length": [1, 1, 1, 1, 1, 1]}, 2, "below 2 (min_length"),
        ({"min_entropy": 50}, {}, 2, "policy/entropy_avg was"),
        ({"max_kl": 5}, {"objective__kl": [float("nan")] * 6}, 2, "no number against 5"),
        ({"max_kl": 5}, {"objective__kl": [6, 1, 6, 1, 6, 1]}, None, ""),
        ({"min_reward": 0, "reward": "rewards/count_a/mean"}, {"rewards__count_a__mean": [-1] * 6}, 2, "rewards/"),
    ],
)
def test_it_stops_for_the_reason_it_names(
    bounds: dict, values: dict, stop: int | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(tmp_path, CollapseGuard(**bounds, patience=2), **values)
    err = capsys.readouterr().err
    if stop is None:
        assert run.current_epoch == 6 and "CollapseGuard" not in err and not hasattr(run, "exit_status")
        return
    assert run.global_step == 4 * (stop - 1) + 1, "after the first step of the collection that was too much"
    assert run.exit_status == STATUS
    line = next(line for line in err.splitlines() if "CollapseGuard" in line)
    assert reason in line and line.endswith("for 2 collections in a row")
    assert (tmp_path / "kept" / "last.ckpt").exists()


def test_it_goes_on_counting_after_a_restart(tmp_path: Path) -> None:
    def run(path: Any = None, **flags: Any) -> Any:
        guard = CollapseGuard(max_reward_drop=0.5, patience=2)
        return guard, fit(tmp_path, guard, path, flags, **REWARDS)

    guard, straight = run()
    assert straight.global_step == 21
    for step in (3, 5, 9, 12):
        run(max_steps=step)
        resumed_guard, resumed = run(tmp_path / "kept" / "last.ckpt")
        assert resumed_guard.state_dict() == guard.state_dict() and resumed_guard.reason == guard.reason != "", step
        same(everything(straight), everything(resumed), f"resumed after step {step}: ")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "watches nothing: set at least one of max_kl"),
        ({"max_kl": -1}, "max_kl is -1.0; it must be at least 0"),
        ({"max_clipped": 2}, r"max_clipped is 2.0; it must be in \[0, 1\]"),
        ({"min_reward": float("nan")}, "min_reward is nan; it must be finite"),
        ({"max_kl": 1, "patience": 0}, "patience is 0"),
        ({"min_length": 3, "max_length": 2}, "min_length 3 is above max_length 2"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CollapseGuard(**arguments)


def test_without_rollouts_it_is_refused_before_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[CollapseGuard(max_kl=1)], max_steps=1)
    with pytest.raises(ValueError, match="this run does not sample: leave it out"):
        run.fit(language_model(), datamodule=text_data(tmp_path))


def test_a_metric_that_is_not_logged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="min_reward reads rewards/other/mean, which this policy does not log"):
        fit(tmp_path, CollapseGuard(min_reward=1, reward="rewards/other/mean"))
