"""Losses are sums: cutting a batch into micro-batches, padding it or reordering its rows changes nothing.

This is what lets the host divide once, by the weight of the whole optimiser step, so that accumulation, data
parallelism and one large batch take the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_batches import policy_output, rollouts
from torch import Tensor

from lit_palm.objectives import PPO, LanguageModeling, Objective, RewardRanking, RewardRegression
from lit_palm.types import Experience, Output

# float64: the same terms added in another order
EXACT = {"rtol": 1e-10, "atol": 1e-10}

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "language modelling": lambda: LanguageModeling(z_loss=0.1),
    "ranking": lambda: RewardRanking(margin=True, centering=0.1),
    "regression": RewardRegression,
    "huber": lambda: RewardRegression(huber=0.5),
    "ppo": lambda: PPO(dual_clip=1.5, entropy_coef=0.1),
    "ppo, kl in the loss": lambda: PPO(kl_in="loss", kl_estimator="k3"),
}


@pytest.fixture(params=list(OBJECTIVES))
def case(request: pytest.FixtureRequest) -> tuple:
    """An objective, a batch of six rows in three groups with every field it may want, and the networks' output."""
    torch.manual_seed(0)
    objective = OBJECTIVES[request.param]()
    experience = rollouts()
    experience["group"] = torch.tensor([0, 0, 0, 1, 1, 2])  # the last has one answer, which forms no pair
    experience["rank"] = torch.tensor([1, 0, 1, 0, 1, 0])
    experience["margin"] = torch.rand(6, dtype=torch.float64)
    experience["rating"] = torch.randn(6, dtype=torch.float64)
    experience = objective.prepare(experience)
    output = policy_output(experience)
    output.scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    output.log_z = torch.randn(experience["tokens"].shape, dtype=torch.float64, requires_grad=True)
    return objective, experience, output


def cut(output: Output, rows: Tensor, width: int) -> Output:
    """The output's part for some rows, cut to a width; the graph stays."""
    picked = {}
    for field in fields(output):
        value = getattr(output, field.name)
        if value is not None:
            picked[field.name] = value[rows][:, :width] if value.dim() == 2 else value[rows]
    return Output(**picked)


def run(
    objective: Objective, experience: Experience, output: Output, parts: list[Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed loss, weight and metrics of the rows, handed over in parts."""
    total, weight = torch.zeros((), dtype=torch.float64), torch.zeros(())
    metrics: dict[str, Tensor] = {}
    for rows in parts:
        part = experience.select(rows)
        loss = objective.loss(cut(output, rows, part["tokens"].shape[1]), part)
        own = objective.weight(part)
        assert isinstance(loss.total, Tensor) and isinstance(own, Tensor)
        total, weight = total + loss.total, weight + own
        for name, (value, count) in loss.metrics.items():
            pair = torch.stack([value.double(), count.double()])
            metrics[name] = metrics.get(name, torch.zeros(2, dtype=torch.float64)) + pair
    return total, weight, metrics


# extremes are not sums, and the variance of a micro-batch is around its own mean
NOT_ADDITIVE = {"min_reward", "max_reward", "val/ratio_var"}


def test_defect_minibatch_count_ignored_under_accumulation(case: tuple) -> None:
    """Sum and weight, and so the update, are those of one batch: cut by prompt where rows are grouped, else by row."""
    objective, experience, output = case
    whole = torch.arange(6)
    partitions = [[whole[:3], whole[3:5], whole[5:]], [whole[3:], whole[:3]]]
    if not objective.grouped:
        partitions.append(list(whole.split(1)))
    leaves = [v for f in fields(output) if (v := getattr(output, f.name)) is not None]
    total, weight, metrics = run(objective, experience, output, [whole])
    gradients = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
    for parts in partitions:
        parts_total, parts_weight, parts_metrics = run(objective, experience, output, parts)
        torch.testing.assert_close(parts_total, total, **EXACT)
        assert parts_weight == weight
        for own, want in zip(
            torch.autograd.grad(parts_total, leaves, retain_graph=True, allow_unused=True), gradients, strict=True
        ):
            assert (own is None) == (want is None)
            if own is not None and want is not None:
                torch.testing.assert_close(own, want, **EXACT)
        for name in metrics.keys() - NOT_ADDITIVE:
            torch.testing.assert_close(parts_metrics[name], metrics[name], **EXACT, msg=name)


def test_defect_loss_averaged_over_padding(case: tuple) -> None:
    """More columns of padding, full of garbage, change neither the sum nor the weight."""
    objective, experience, output = case
    width = experience["tokens"].shape[1]
    wide = Experience(experience)
    for name, value in experience.items():
        if isinstance(value, Tensor) and value.dim() == 2:
            wide[name] = F.pad(value, (0, 5), value=False if value.dtype == torch.bool else 12345)
    padded = Output(
        **{
            f.name: F.pad(v, (0, 5), value=12345) if v.dim() == 2 else v
            for f in fields(output)
            if (v := getattr(output, f.name)) is not None
        }
    )
    assert wide["tokens"].shape[1] == width + 5
    want, got = objective.loss(output, experience), objective.loss(padded, wide)
    torch.testing.assert_close(got.total, want.total, **EXACT)
    assert objective.weight(wide) == objective.weight(experience)
    for name, (value, count) in want.metrics.items():
        torch.testing.assert_close(got.metrics[name][0], value, **EXACT, msg=name)
        assert got.metrics[name][1] == count, name


def test_the_order_of_rows_changes_nothing(case: tuple) -> None:
    objective, experience, output = case
    total, weight, _ = run(objective, experience, output, [torch.arange(6)])
    other, same, _ = run(objective, experience, output, [torch.tensor([4, 2, 5, 0, 3, 1])])
    torch.testing.assert_close(other, total, **EXACT)
    assert same == weight


def test_the_loss_is_a_sum_and_not_a_mean(case: tuple) -> None:
    """Twice the rows, twice the loss and the weight."""
    objective, experience, output = case
    twice = torch.arange(6).repeat(2)
    doubled = experience.select(twice)
    doubled["group"] = doubled["group"] + 10 * (torch.arange(12) // 6)  # the same answers to another prompt
    loss = objective.loss(cut(output, twice, doubled["tokens"].shape[1]), doubled)
    torch.testing.assert_close(loss.total, 2 * objective.loss(output, experience).total, **EXACT)
    assert objective.weight(doubled) == 2 * objective.weight(experience)


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, 5)), order=st.permutations(range(6)), garbage=st.sampled_from([0.0, -1e30, 1e30]))
def test_ppo_is_invariant_to_every_partition(cuts: set[int], order: list[int], garbage: float) -> None:
    objective = PPO(kl_in="loss", kl_estimator="k2", dual_clip=2.0)
    experience = objective.prepare(rollouts(garbage=garbage))
    output = policy_output(experience, garbage=garbage)
    parts = list(torch.tensor(order).tensor_split(sorted(cuts)))
    total, weight, _ = run(objective, experience, output, [torch.arange(6)])
    parts_total, parts_weight, _ = run(objective, experience, output, parts)
    torch.testing.assert_close(parts_total, total, **EXACT)
    assert parts_weight == weight


def test_what_an_objective_needs_of_the_host() -> None:
    needs: dict[str, Any] = {name: make().needs for name, make in OBJECTIVES.items()}
    assert needs["language modelling"] == {"log_z"}
    assert needs["ranking"] == needs["regression"] == frozenset()
    assert needs["ppo"] == {"rollouts", "old_logps", "reference", "value", "reward", "entropy"}
    assert {name for name, make in OBJECTIVES.items() if make().grouped} == {"ranking"}
