"""The loss: by hand from the paper, against palm-rlhf-pytorch's ImplicitPRM on the same networks, and its data."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from lit_palm_implicit_reward import ImplicitPRM
from torch import Tensor, nn

from lit_palm import Experience, Network, Output
from lit_palm.modules.language_model import language_model_output
from lit_palm.testing import ObjectiveChecks, ObjectiveConformance, tiny_network


def batch() -> tuple[Experience, Output]:
    """Three completions of two, one and three tokens, and a row that counts for nothing; log-ratios in nats."""
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    ratios = torch.tensor([[9.0, 2, -1, 9], [9, -4, 9, 9], [9, 1, 2, 0.5], [9, 9, 9, 9]], dtype=torch.float64)
    rows = Experience(tokens=torch.ones(4, 4, dtype=torch.long), mask=torch.ones_like(mask), loss_mask=mask)
    rows.update(group=torch.tensor([0, 0, 1, 2]), label=torch.tensor([True, False, False, True]))
    return rows, Output(logps=ratios - 5, ref_logps=torch.full_like(ratios, -5.0))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_cross_entropy_by_hand() -> None:
    rows, output = batch()
    objective = ImplicitPRM(beta=0.5)
    found = objective.loss(output, rows)
    rewards, labels = [0.5 * 1.0, 0.5 * -4.0, 0.5 * 3.5], [1, 0, 0]
    want = -sum(math.log(sigmoid(r) if y else 1 - sigmoid(r)) for r, y in zip(rewards, labels, strict=True))
    assert isinstance(found.total, Tensor) and found.total.item() == pytest.approx(want, rel=1e-12)
    assert objective.weight(rows) == 3
    pairs = {name: (value.item(), int(n)) for name, (value, n) in found.metrics.items()}
    assert pairs == {"accuracy": (2, 3), "rewards/right": (0.5, 1), "rewards/wrong": (-0.25, 2)}


def test_pairs_by_hand() -> None:
    rows, output = batch()
    del rows["label"]
    rows["rank"] = torch.tensor([0, 1, 0, 0])
    objective = ImplicitPRM("dpo", beta=0.5)
    found = objective.loss(output, rows)
    assert isinstance(found.total, Tensor)
    assert found.total.item() == pytest.approx(-math.log(sigmoid(0.5 * (1 + 4))), rel=1e-12)
    assert objective.weight(rows) == 1
    with pytest.raises(ValueError, match="loss: dpo learns from pairs and rankings"):
        ImplicitPRM("dpo").loss(*reversed(batch()))


def test_outcomes_of_each_kind_of_data() -> None:
    rows, _ = batch()
    rows["mismatched"] = torch.tensor([False, True, False, False])
    assert ImplicitPRM().rows(rows).tolist() == [True, False, True, False]
    del rows["label"], rows["mismatched"]
    rows["rating"] = torch.tensor([0.2, 0.8, 0.7, 0.9])
    assert ImplicitPRM(threshold=0.75).outcomes(rows).tolist() == [False, True, False, True]
    del rows["rating"]
    rows["rank"], rows["group"] = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 1, 2])
    assert ImplicitPRM().outcomes(rows)[:2].tolist() == [True, False]
    assert ImplicitPRM().rows(rows).tolist() == [True, True, False, False], "alone, it is neither right nor wrong"
    with pytest.raises(ValueError, match="a label, a rating or a rank"):
        ImplicitPRM().outcomes(Experience(tokens=rows["tokens"]))


class Theirs(nn.Module):
    """A network as palm-rlhf-pytorch calls one; negative ids mark its padding, which no embedding takes."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.network(tokens.clamp(min=0))
        return logits


def test_equals_palm_rlhf_pytorch() -> None:
    """Its loss of every token and its rewards, on the same weights and rows; float32, hence 1e-5.

    What its `forward` returns is the mean log-likelihood, which is to be as large as possible: the minus is ours.
    """
    theirs = pytest.importorskip("palm_rlhf_pytorch").ImplicitPRM
    torch.manual_seed(0)
    model, reference = tiny_network(), tiny_network()
    tokens = torch.randint(1, 256, (5, 12))
    mask = torch.arange(12) < torch.tensor([12, 9, 7, 12, 4])[:, None]
    labels = torch.tensor([True, False, True, True, False])
    rows = Experience(tokens=torch.where(mask, tokens, 0), mask=mask, loss_mask=mask & (torch.arange(12) > 0))
    rows.update(label=labels, group=torch.arange(5))
    output = Output(**language_model_output(model, rows))
    output.ref_logps = language_model_output(reference, rows)["logps"].detach()
    objective = ImplicitPRM(beta=0.1, level="token")
    total = objective.loss(output, rows).total
    assert isinstance(total, Tensor)
    ours = total / objective.weight(rows)

    prm = theirs(Theirs(model), Theirs(reference), beta=0.1)
    marked = torch.where(mask, tokens, -1)
    # their gather takes no negative id either, so the ids are clamped in a patched helper while the mask is theirs
    import palm_rlhf_pytorch.implicit_process_reward as room

    original = room.get_logprob_at
    room.get_logprob_at = lambda logits, seq: original(logits, seq.clamp(min=0))
    try:
        found = prm(marked, labels.float())
        rewards = prm(marked)
    finally:
        room.get_logprob_at = original
    assert ours.item() == pytest.approx(-found.item(), abs=1e-5)
    assert output.logps is not None
    own = 0.1 * torch.where(rows["loss_mask"], output.logps - output.ref_logps, 0)[:, 1:]
    torch.testing.assert_close(own, rewards, rtol=1e-5, atol=1e-5)
    ours.backward()
    mine = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    room.get_logprob_at = lambda logits, seq: original(logits, seq.clamp(min=0))
    try:
        (-prm(marked, labels.float())).backward()
    finally:
        room.get_logprob_at = original
    for one, other in zip(mine, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"beta": 0.0}, "beta must be"),
        ({"loss": "mse"}, "loss is 'mse'"),
        ({"level": "word"}, "level is 'word'"),
        ({"threshold": math.nan}, "threshold must be"),
        ({"loss": "dpo", "level": "token"}, "level: token is for loss: ce"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ImplicitPRM(**options)


class TestImplicitPRM(ObjectiveConformance):
    data = "unpaired"

    @pytest.fixture
    def objective(self) -> Any:
        return ImplicitPRM


class TestPairs(ObjectiveChecks):
    @pytest.fixture(params=[{"loss": "dpo"}, {"loss": "ce", "beta": 0.2}, {"level": "token"}], ids=str)
    def objective(self, request: pytest.FixtureRequest) -> Any:
        return functools.partial(ImplicitPRM, **request.param)


class TestRatings(ObjectiveChecks):
    data = "ratings"

    @pytest.fixture(params=["completion", "token"])
    def objective(self, request: pytest.FixtureRequest) -> Any:
        return functools.partial(ImplicitPRM, level=request.param, threshold=0.0)
