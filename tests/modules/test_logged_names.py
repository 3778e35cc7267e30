"""The names that people look for are in TensorBoard's files, for every stage, with the values that the run had."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_palm.callbacks import DEFAULTS, ProgressBar
from lit_palm.rollout.sampling import Sampling
from tests.support import language_model, policy, prompt_data, ranking_data, reward_model, text_data, trainer

ALL = {"loss", "lr", "grad_norm", "num_tokens", "perf/tokens_per_s", "perf/mfu"}
ALL |= {"time/step_s", "time/data_s", "time/other_s"}
LANGUAGE_MODEL = {"nll", "val/loss", "val/perplexity", "val/bits_per_byte"}
REWARD = {"accuracy", "margin", "min_reward", "mean_reward", "max_reward"}
REWARD |= {f"val/{name}" for name in REWARD} | {"val/loss"}
POLICY = {
    "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores",
    "objective/kl_coef", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg",
    "loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "value/explained_var",
    "time/rollout_s", "time/score_s", "time/reference_s", "time/value_s", "time/old_logps_s", "time/gather_s",
    "time/prepare_s", "time/collect_s", "time/update_s", "perf/rollout_tokens_per_s", "perf/rollout_bandwidth",
    "time/validation_s", "completions/mean_length", "completions/min_length",
    "completions/max_length", "completions/clipped_ratio", "rewards/lower_case/mean", "rewards/lower_case/std",
    "rewards/count_a/mean", "val/reward", "val/kl", "val/rewards/lower_case", "startup/max_logratio",
}  # fmt: skip


def logged(folder: Path, module: Any, data: Any, **options: Any) -> EventAccumulator:
    logger = TensorBoardLogger(str(folder), name="", version="logs")
    callbacks = [kind() for kind in DEFAULTS if kind is not ProgressBar]
    run = trainer(folder, logger=logger, callbacks=callbacks, enable_checkpointing=False, **options)
    run.fit(module, datamodule=data)
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return events


@pytest.mark.parametrize(
    "stage, names", [("language_model", LANGUAGE_MODEL), ("reward_model", REWARD), ("policy", POLICY)]
)
def test_every_stage_logs_the_names_people_look_for(stage: str, names: set[str], tmp_path: Path) -> None:
    module, data = {
        "language_model": lambda: (
            language_model(sample_prompts=["the"], sampling=Sampling(max_new_tokens=4)), text_data(tmp_path)
        ),
        "reward_model": lambda: (reward_model(), ranking_data(tmp_path)),
        "policy": lambda: (policy(), prompt_data(tmp_path)),
    }[stage]()  # fmt: skip
    events = logged(tmp_path, module, data, max_epochs=2)
    scalars = set(events.Tags()["scalars"])
    assert (ALL | names) - scalars == set()
    for name in scalars:
        assert all(math.isfinite(e.value) for e in events.Scalars(name)), name
    assert [e.step for e in events.Scalars("grad_norm")] == list(range(module.trainer.global_step))
    assert events.Scalars("lr")[0].value == pytest.approx(3e-3)
    if stage != "reward_model":  # a reward model writes nothing
        assert "samples/text_summary" in events.Tags()["tensors"]


def test_values_of_a_collection_are_those_of_its_completions(tmp_path: Path) -> None:
    module = policy(rollout={"num_prompts": 8, "passes": 1, "minibatch_size": 8})
    kept: list[Any] = []
    original = module.objective.prepare

    def prepare(experience: Any) -> Any:
        tensors = {k: v.clone() for k, v in experience.items() if hasattr(v, "clone")}
        kept.append({**tensors, "rewards": experience.rewards})
        return original(experience)

    module.objective.prepare = prepare  # type: ignore[method-assign]
    events = logged(tmp_path, module, prompt_data(tmp_path, validation=None), max_epochs=3)
    assert len(kept) == 3
    for name, value in (
        ("completions/mean_length", lambda e: e["loss_mask"].sum(1).float().mean()),
        ("rewards/lower_case/mean", lambda e: e["rewards"]["lower_case"].mean()),
        ("objective/scores", lambda e: e["scores"].mean()),
        ("objective/kl", lambda e: ((e["old_logps"] - e["ref_logps"]) * e["loss_mask"]).sum(1).mean()),
        ("val/num_eos_tokens", lambda e: e["ended"].sum()),
    ):
        expected = [float(value(e)) for e in kept]
        # float32 means, written as float32
        assert [e.value for e in events.Scalars(name)] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    # tokens are counted over prompts and completions
    assert events.Scalars("num_tokens")[-1].value == sum(int(e["mask"].sum()) for e in kept)
    ratios = [e.value for e in events.Scalars("val/ratio")]
    assert ratios == pytest.approx([1.0] * 3, abs=1e-4), "one update a collection, each from its own policy"
