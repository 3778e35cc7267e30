"""Token log-probabilities against a float64 reference written with log_softmax, by numerical gradients, and by watching
every tensor that is made.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_palm.models.logprobs import TokenLogProbs

B, T, D, V, SCALE = 3, 7, 5, 11, 0.7


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets, select."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (B, T), generator=generator)
    return hidden, weight, targets, torch.rand(B, T, generator=generator) < 0.6


def reference(hidden: Tensor, weight: Tensor, targets: Tensor, select: Tensor, temperature: float) -> dict[str, Tensor]:
    """The same in float64, all at once."""
    logits = hidden[:, :-1].double() @ weight.double().T * SCALE / temperature
    log_p = logits.log_softmax(-1)
    values = {
        "logps": log_p.gather(2, targets[:, 1:, None]).squeeze(2),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_z": logits.logsumexp(-1),
    }
    return {k: torch.nn.functional.pad(v * select[:, 1:], (1, 0)) for k, v in values.items()}


@pytest.mark.parametrize("max_elements", [2**24, 5 * V, V, 1])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("everything", [True, False])
def test_values_and_gradients_match_the_reference(max_elements: int, temperature: float, everything: bool) -> None:
    hidden, weight, targets, select = inputs()
    if everything:
        select = torch.ones_like(select)
    head = TokenLogProbs(
        targets, None if everything else select, temperature, entropy=True, log_z=True, max_elements=max_elements
    )
    got, expected = head(hidden, weight, SCALE), reference(hidden, weight, targets, select, temperature)
    factors = [torch.randn(B, T, dtype=torch.float64, generator=torch.Generator().manual_seed(3 + i)) for i in range(3)]
    grads = []
    for out in (got, expected):
        loss = sum((out[k] * f).sum() for k, f in zip(expected, factors, strict=True))
        grads.append(torch.autograd.grad(loss, (hidden, weight)))
    # float64 on both sides: rounding only
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("max_elements", [2**24, 4 * V])
@pytest.mark.parametrize(("entropy", "log_z"), [(False, False), (True, False), (False, True), (True, True)])
def test_gradcheck(max_elements: int, entropy: bool, log_z: bool) -> None:
    hidden, weight, targets, select = inputs()
    head = TokenLogProbs(targets, select, 0.8, entropy, log_z, max_elements)
    assert torch.autograd.gradcheck(lambda h, w: tuple(head(h, w, SCALE).values()), (hidden, weight))


def test_only_what_is_asked_for_and_zero_elsewhere() -> None:
    hidden, weight, targets, select = inputs(torch.float32)
    select[:, 0] = True  # position 0 is never predicted, whatever the mask says
    out = TokenLogProbs(targets, select)(hidden, weight, SCALE)
    assert list(out) == ["logps"] and out["logps"].dtype is torch.float32
    select[:, 0] = False
    assert torch.equal(out["logps"] != 0, select)
    assert list(TokenLogProbs(targets, entropy=True, log_z=True)(hidden, weight, SCALE)) == [
        "logps",
        "entropy",
        "log_z",
    ]


def test_nothing_selected_still_has_gradients() -> None:
    hidden, weight, targets, select = inputs()
    out = TokenLogProbs(targets, torch.zeros_like(select), entropy=True)(hidden, weight, SCALE)
    (out["logps"].sum() + out["entropy"].sum()).backward()
    assert float(hidden.grad.abs().sum()) == float(weight.grad.abs().sum()) == 0.0
    short = TokenLogProbs(targets[:, :1])(hidden[:, :1], weight, SCALE)["logps"]
    assert short.shape == (B, 1)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_of_two_gradients(frozen: str) -> None:
    hidden, weight, targets, select = inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    TokenLogProbs(targets, select)(hidden, weight, SCALE)["logps"].sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


@pytest.mark.parametrize("max_elements", [2**24, 4 * V])
def test_backward_twice_gives_twice(max_elements: int) -> None:
    hidden, weight, targets, _ = inputs()
    loss = TokenLogProbs(targets, entropy=True, max_elements=max_elements)(hidden, weight, SCALE)["entropy"].sum()
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_the_softmax_of_bfloat16_is_in_float32() -> None:
    hidden, weight, targets, select = inputs(torch.bfloat16)
    out = TokenLogProbs(targets, select)(hidden, weight, 1.0)["logps"]
    logits = (hidden[:, :-1] @ weight.T).double()  # the product itself is bfloat16
    expected = torch.nn.functional.pad(logits.log_softmax(-1).gather(2, targets[:, 1:, None]).squeeze(2), (1, 0))
    torch.testing.assert_close(out.double(), expected * select, rtol=1e-6, atol=1e-6)
    out.sum().backward()
    assert weight.grad.dtype is torch.bfloat16


def test_autocast_gives_float32_gradients_close_to_exact() -> None:
    hidden, weight, targets, select = inputs(torch.float32)
    exact = torch.autograd.grad(TokenLogProbs(targets, select)(hidden, weight, SCALE)["logps"].sum(), weight)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = TokenLogProbs(targets, select)(hidden, weight, SCALE)["logps"].sum()
    assert loss.dtype is torch.float32
    loss.backward()
    assert weight.grad.dtype is torch.float32
    torch.testing.assert_close(weight.grad, exact, rtol=0.05, atol=0.05)  # 8 bits of mantissa


class Largest(TorchDispatchMode):
    """Watches every operation, also of the backward pass: the largest number of elements one made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def test_no_tensor_holds_more_than_a_chunk_of_logits() -> None:
    rows, width, dim, vocab_size, chunk = 4, 65, 8, 1000, 5000
    hidden, weight = torch.randn(rows, width, dim, requires_grad=True), torch.randn(vocab_size, dim, requires_grad=True)
    targets = torch.randint(0, vocab_size, (rows, width))
    with Largest() as watch:
        out = TokenLogProbs(targets, entropy=True, log_z=True, max_elements=chunk)(hidden, weight, 1.0)
        sum(v.sum() for v in out.values()).backward()
    assert watch.numel <= max(chunk, weight.numel()) < rows * width * vocab_size / 25
    with Largest() as watch:  # the watch itself sees a full projection
        (hidden @ weight.T).sum().backward()
    assert watch.numel == rows * width * vocab_size
