"""Rewards learned from pairs, rankings and ratings, against loops over pairs in float64 and torch's losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_rlhf import ranking_loss
from torch import Tensor

from lit_palm.objectives import RewardRanking, RewardRegression
from lit_palm.types import Experience, Loss, Output

# float64: the same sums in another order, and log1p(exp(-x)) against a stabler form of it
EXACT = {"rel": 1e-10, "abs": 1e-10}


def batch(group: list[int], rank: list[int] | None = None, **fields: list[float]) -> Experience:
    rows = len(group)
    mask = torch.ones(rows, 2, dtype=torch.bool)
    experience = Experience(tokens=torch.ones(rows, 2, dtype=torch.long), mask=mask, loss_mask=mask)
    experience["group"] = torch.tensor(group)
    if rank is not None:
        experience["rank"] = torch.tensor(rank)
    for name, values in fields.items():
        experience[name] = torch.tensor(values, dtype=torch.float64)
    return experience


def scored(*scores: float) -> Output:
    return Output(scores=torch.tensor(scores, dtype=torch.float64, requires_grad=True))


def mean_of(loss: Loss, name: str) -> float:
    value, count = loss.metrics[name]
    return (value / count).item()


answers = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 3), st.floats(-5, 5), st.floats(0, 2)), min_size=1, max_size=14
)


@settings(max_examples=100, deadline=None)
@given(rows=answers, margin=st.booleans(), centering=st.sampled_from([0.0, 0.01, 0.5]))
def test_rankings_match_a_loop_over_their_pairs(rows: list[tuple], margin: bool, centering: float) -> None:
    group, rank, scores, margins = (list(column) for column in zip(*rows, strict=True))
    objective = RewardRanking(margin, centering)
    experience = batch(group, rank, margin=margins)
    elements = []
    for name in set(group):
        own = [i for i, g in enumerate(group) if g == name]
        loss = ranking_loss(
            [scores[i] for i in own], [rank[i] for i in own], [margins[i] for i in own] if margin else None, centering
        )
        if loss is not None:  # a prompt whose answers are all tied, or that has one, says nothing
            elements.append(loss)
    assert objective.weight(experience).item() == len(elements)
    total = objective.loss(scored(*scores), experience).total
    assert total.item() == pytest.approx(math.fsum(elements), **EXACT)


def test_a_pair_is_a_ranking_of_two() -> None:
    experience = batch([4, 4, 9, 9], [0, 1, 1, 0])
    objective = RewardRanking()
    output = scored(1.0, 0.5, 2.0, -1.0)
    gaps = torch.tensor([1.0 - 0.5, -1.0 - 2.0], dtype=torch.float64)
    torch.testing.assert_close(objective.loss(output, experience).total, -F.logsigmoid(gaps).sum(), rtol=1e-12, atol=0)
    assert objective.weight(experience).item() == 2


def test_every_ranking_weighs_as_much_as_a_pair_whatever_its_length() -> None:
    # equal scores: each pair costs log 2, so each element must, too, though one has 1 pair and one has 6
    experience = batch([0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 2, 3])
    objective = RewardRanking()
    loss = objective.loss(scored(*[0.0] * 6), experience)
    assert loss.total.item() == pytest.approx(2 * math.log(2), rel=1e-12)
    assert objective.weight(experience).item() == 2
    assert loss.metrics["accuracy"][1].item() == 7, "the metrics are per pair"


def test_the_gradient_raises_the_better_and_lowers_the_worse() -> None:
    output = scored(0.0, 0.0, 0.0)
    RewardRanking().loss(output, batch([0, 0, 0], [2, 0, 1])).total.backward()
    # by hand: each of 3 pairs gives -+ sigmoid(0) / 3, and the middle answer wins once and loses once
    torch.testing.assert_close(output.scores.grad, torch.tensor([1 / 3, -1 / 3, 0.0], dtype=torch.float64))


def test_ties_form_no_pair_and_a_batch_of_ties_still_has_a_gradient() -> None:
    output = scored(1.0, 2.0, 3.0)
    objective, experience = RewardRanking(), batch([0, 0, 1], [0, 0, 0])
    loss = objective.loss(output, experience)
    loss.total.backward()
    assert loss.total.item() == 0 and objective.weight(experience).item() == 0
    assert output.scores.grad.tolist() == [0, 0, 0]
    assert all(value.isfinite() for value, _ in loss.metrics.values())


def test_margin_moves_the_pair_along_the_sigmoid_and_needs_its_column() -> None:
    experience = batch([0, 0], [0, 1], margin=[0.75, 0.75])
    plain = RewardRanking().loss(scored(1.0, 0.0), experience).total
    wide = RewardRanking(margin=True).loss(scored(1.75, 0.0), experience).total
    torch.testing.assert_close(wide, plain, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="margin"):
        RewardRanking(margin=True).loss(scored(1.0, 0.0), batch([0, 0], [0, 1]))


def test_centering_alone_depends_on_where_scores_sit() -> None:
    experience = batch([0, 0], [0, 1])
    for centering, moves in ((0.0, False), (0.1, True)):
        objective = RewardRanking(centering=centering)
        low, high = (objective.loss(scored(1.0 + c, c), experience).total.item() for c in (0.0, 5.0))
        assert (abs(low - high) > 1) == moves
    with pytest.raises(ValueError, match="centering"):
        RewardRanking(centering=-1)


def test_ranking_metrics_are_what_people_read_them_as() -> None:
    loss = RewardRanking().loss(scored(1.0, 0.0, 0.5, 2.0), batch([0, 0, 1, 1], [0, 1, 0, 1]))
    assert mean_of(loss, "accuracy") == 0.5
    assert mean_of(loss, "margin") == pytest.approx((1.0 - 1.5) / 2)
    assert [mean_of(loss, f"{m}_reward") for m in ("min", "mean", "max")] == [0.0, 0.875, 2.0]
    assert not any(value.requires_grad for value, _ in loss.metrics.values())


def test_an_answer_scored_like_its_rival_is_no_success() -> None:
    assert mean_of(RewardRanking().loss(scored(1.0, 1.0), batch([0, 0], [0, 1])), "accuracy") == 0.0


# ---------------------------------------------------------------------- ratings


@pytest.mark.parametrize("huber", [None, 0.5, 2.0])
def test_regression_matches_torch(huber: float | None) -> None:
    scores = torch.linspace(-3, 3, 8, dtype=torch.float64)
    ratings = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    experience = batch(list(range(8)), rating=ratings.tolist())
    objective, output = RewardRegression(huber), scored(*scores.tolist())
    torch_loss = F.mse_loss if huber is None else lambda a, b: F.huber_loss(a, b, delta=huber)
    loss = objective.loss(output, experience)
    mean = loss.total / objective.weight(experience)
    torch.testing.assert_close(mean, torch_loss(scores, ratings), rtol=1e-12, atol=0)
    assert mean_of(loss, "mae") == pytest.approx((scores - ratings).abs().mean().item(), rel=1e-12)
    assert mean_of(loss, "mean_reward") == pytest.approx(scores.mean().item(), abs=1e-12)
    assert [mean_of(loss, m) for m in ("min_reward", "max_reward")] == [-3.0, 3.0]


def test_huber_must_be_positive() -> None:
    with pytest.raises(ValueError, match="huber"):
        RewardRegression(huber=0.0)


# ---------------------------------------------------------------------- rows that fill up


def fill_up(experience: Experience) -> Experience:
    """The batch with a copy of its first row that has no weight, as the data serves to a process without data."""
    rows = torch.tensor([*range(experience.num_rows), 0])
    filled = Experience({name: value[rows].clone() for name, value in experience.items()})
    filled["loss_mask"][-1] = False
    if "group" in filled:
        filled["group"][-1] = 99
    return filled


@pytest.mark.parametrize("objective", [RewardRanking(), RewardRegression(), RewardRegression(huber=0.5)])
def test_a_row_that_only_fills_a_batch_up_counts_for_nothing(objective: RewardRanking | RewardRegression) -> None:
    experience = batch([0, 0, 1, 1], [0, 1, 1, 0], rating=[1.0, -1.0, 0.0, 2.0])
    filled = fill_up(experience)
    scores = [0.3, -0.4, 0.5, 1.1]
    loss, padded = objective.loss(scored(*scores), experience), scored(*scores, 50.0)
    with_row = objective.loss(padded, filled)
    assert with_row.total.item() == pytest.approx(loss.total.item(), rel=1e-12)
    assert objective.weight(filled).item() == objective.weight(experience).item()
    for name in loss.metrics:
        assert mean_of(with_row, name) == pytest.approx(mean_of(loss, name), rel=1e-12), name
    with_row.total.backward()
    assert padded.scores.grad[-1] == 0


@pytest.mark.parametrize("objective", [RewardRanking(), RewardRegression()])
def test_a_batch_of_nothing_else_has_weight_0_and_finite_metrics(objective: RewardRanking | RewardRegression) -> None:
    experience = fill_up(batch([0, 0], [0, 1], rating=[1.0, -1.0])).select([2])
    output = scored(3.0)
    loss = objective.loss(output, experience)
    loss.total.backward()
    assert loss.total.item() == 0 and objective.weight(experience).item() == 0
    assert output.scores.grad.item() == 0
    for name, (value, count) in loss.metrics.items():
        assert value.isfinite() and count.item() == 0, name


@pytest.mark.parametrize("objective", [RewardRanking(), RewardRegression()])
def test_weights_and_metrics_are_scalars(objective: RewardRanking | RewardRegression) -> None:
    experience = batch([0, 0], [0, 1], rating=[1.0, -1.0])
    loss = objective.loss(scored(0.1, 0.2), experience)
    scalars = [loss.total, objective.weight(experience), *(x for pair in loss.metrics.values() for x in pair)]
    assert all(isinstance(x, Tensor) and x.dim() == 0 for x in scalars)
