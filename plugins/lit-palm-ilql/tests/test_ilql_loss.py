"""The loss equals a slow computation from trlX's formulas, through the network's heads; and where rewards come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lit_palm_ilql import ILQL, ILQLConfig, ILQLNetwork
from slow_ilql import slow_ilql
from torch import Tensor

from lit_palm import Experience, Output, PaLMConfig
from lit_palm.modules.language_model import language_model_output

METHODS: list[dict[str, Any]] = [
    {},
    {"tau": 0.9, "gamma": 1.0, "cql_scale": 0.5, "awac_scale": 0.3, "beta": 2.0},
    {"two_qs": False, "cql_scale": 0.0},
]


def network(two_qs: bool = True) -> ILQLNetwork:
    torch.manual_seed(0)
    base = PaLMConfig(vocab_size=30, d_model=16, num_layers=1, num_heads=2, head_dim=8, max_length=32)
    made = ILQLConfig(base=base, two_qs=two_qs).build().double()
    with torch.no_grad():  # targets that have gone their own way, and biases that show
        for name, weight in made.named_parameters():
            if not name.startswith("base."):
                weight.add_(0.3 * torch.randn_like(weight))
    return made


def batch(turns: bool = False, group: bool = False) -> Experience:
    """Four ragged rows, the last without anything to learn from; with `turns` outputs are interrupted by prompts."""
    torch.manual_seed(1)
    tokens = torch.randint(1, 30, (4, 12))
    lengths, starts = torch.tensor([12, 7, 9, 5]), torch.tensor([5, 2, 1, 2])
    place = torch.arange(12)
    mask = place < lengths[:, None]
    targets = mask & (place >= starts[:, None])
    targets[3] = False
    if turns:
        targets[0, 7:9] = targets[2, 4] = False
    found = Experience(tokens=torch.where(mask, tokens, 0), mask=mask, loss_mask=targets)
    found["group"] = torch.tensor([0, 1, 2, 3])
    if group:
        found["tokens"][1, :2] = found["tokens"][0, :2] = torch.tensor([7, 9])
    found["rating"] = torch.tensor([1.5, -0.5, 2.0, 9.0], dtype=torch.float64)
    return found


def logits_of(made: ILQLNetwork, tokens: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Everything the heads say, by torch's own modules."""
    with torch.no_grad():
        hidden = made.base(tokens, head=lambda hidden, weight, scale: hidden)

        def mlp(head: Any) -> Tensor:
            value: Tensor = head.out(torch.relu(head.up(hidden)))
            return value

        return (
            made.base(tokens),
            [mlp(head) for head in made.q_heads],
            [mlp(head) for head in made.target_q_heads],
            mlp(made.v_head).squeeze(-1),
        )


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=["trlx", "options", "one_q"])
def test_equals_the_formulas(method: dict[str, Any], turns: bool) -> None:
    """Float64 throughout; 1e-9 leaves room for the order of sums over the vocabulary."""
    objective, rows = ILQL(**method), batch(turns)
    made = network(objective.two_qs)
    found = objective.loss(Output(**language_model_output(made, rows, extras=objective.extras)), rows)
    rest = {name: getattr(objective, name) for name in ("tau", "gamma", "cql_scale", "awac_scale", "beta")}
    slow = slow_ilql(*logits_of(made, rows["tokens"]), rows["tokens"], rows["loss_mask"], rows["rating"], **rest)
    assert isinstance(found.total, Tensor)
    assert found.total.item() == pytest.approx(slow["total"], rel=1e-9)
    assert objective.weight(rows).item() == slow["count"] > 10
    for name in ("q", "v", "cql", "awac"):
        assert found.metrics[f"losses/{name}"][0].item() == pytest.approx(slow[name], rel=1e-9), name


def test_gradients_go_where_they_should() -> None:
    """No target learns, and neither V nor the language model by the other terms' constants: by finite differences."""
    objective, rows, made = ILQL(beta=1.0), batch(), network()

    def terms() -> dict[str, Tensor]:
        output = Output(**language_model_output(made, rows, extras=objective.extras))
        return {name: value for name, (value, _) in objective.loss(output, rows).metrics.items()}

    output = Output(**language_model_output(made, rows, extras=objective.extras))
    total = objective.loss(output, rows).total
    assert isinstance(total, Tensor)
    total.backward()
    assert all(p.grad is None for p in made.target_q_heads.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for n, p in made.named_parameters() if "target" not in n)
    # V learns from its own term alone, a Q head from its square and CQL
    for weight, parts in (
        (made.v_head.out.bias, {"losses/v": 1.0}),
        (made.q_heads[0].out.bias, {"losses/q": 1.0, "losses/cql": objective.cql_scale}),
    ):
        with torch.no_grad():
            weight[0] += 1e-6
            up = terms()
            weight[0] -= 2e-6
            down = terms()
            weight[0] += 1e-6
        slope = sum(factor * (up[name] - down[name]).item() / 2e-6 for name, factor in parts.items())
        assert weight.grad[0].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_a_shared_prompt_is_read_once_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share a prompt are packed; every extra stays what it is for separate rows."""
    made, objective = network(), ILQL()
    tokens = torch.randint(1, 30, (4, 14), generator=torch.Generator().manual_seed(3))
    tokens[:, :8] = tokens[0, :8]
    mask = torch.arange(14) < torch.tensor([14, 11, 12, 9])[:, None]
    rows = Experience(tokens=torch.where(mask, tokens, 0), mask=mask, loss_mask=mask & (torch.arange(14) >= 8))
    alone = language_model_output(made, rows, extras=objective.extras)
    rows["group"] = torch.zeros(4, dtype=torch.long)
    seen = []
    original = made.base.forward
    monkeypatch.setattr(made.base, "forward", lambda t, **o: (seen.append(len(t)), original(t, **o))[1])
    packed = language_model_output(made, rows, extras=objective.extras)
    assert seen == [1], "four rows in one"
    for name, value in alone["extra"].items():
        torch.testing.assert_close(packed["extra"][name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_a_large_vocabulary_is_read_in_chunks() -> None:
    from lit_palm.models import TokenLogProbs

    made, objective, rows = network(), ILQL(), batch()
    whole = made(rows["tokens"], head=TokenLogProbs(rows["tokens"], rows["loss_mask"], extras=objective.extras))
    head = TokenLogProbs(rows["tokens"], rows["loss_mask"], extras=objective.extras, max_elements=60)
    for name, value in made(rows["tokens"], head=head).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-12)


def test_where_rewards_come_from() -> None:
    rows = batch()
    rows["rating"] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert ILQL(reward_mean=2.0, reward_std=0.5).rewards(rows).tolist() == [-2, 0, 2, 4]
    del rows["rating"]
    rows["rank"], rows["group"] = torch.tensor([0, 1, 2, 0]), torch.tensor([5, 5, 5, 8])
    assert ILQL().rewards(rows).tolist() == [1, 0, -1, 0], "alone, an answer is neither better nor worse"
    rows["label"] = torch.tensor([True, False, False, True])
    assert ILQL().rewards(rows).tolist() == [1, -1, -1, 1]
    with pytest.raises(ValueError, match="a rating, a label or a rank"):
        ILQL().rewards(Experience(tokens=rows["tokens"]))


@pytest.mark.parametrize(
    "argument, value",
    [("tau", 1.0), ("gamma", 1.1), ("cql_scale", -1.0), ("awac_scale", float("inf")), ("beta", -0.1),
     ("reward_mean", float("nan")), ("reward_std", 0.0)],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(argument: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{argument} must"):
        ILQL(**{argument: value})
