"""Layers with LoRA against peft's own in float64.

float32 results and gradients agree to 1e-5 of the largest: sums of up to 700 terms in another order. In bfloat16 every
number that is passed on is rounded to 8 bits, several times on each side: 3e-2 of the largest, and no farther from
float64 than peft's own are, half as much again allowed for luck.
"""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn

from lit_palm.models.adapted import AdaptedNetwork
from lit_palm.models.adapted_linear import AdaptedLinear
from lit_palm.models.decoding import Decoding, decoding_form
from lit_palm.models.kernels import last_logits
from lit_palm.models.layers import Linear, QuickLinear
from lit_palm.models.lora import LoRA
from lit_palm.models.palm import PaLMConfig
from lit_palm.models.products import native
from lit_palm.models.side_by_side import side_by_side
from lit_palm.models.weights import give_memory

SHAPES = [(64, 200), (200, 64), (96, 96), (700, 34)]


def layer(
    inputs: int,
    outputs: int,
    kind: str = "own",
    rank: int = 4,
    dropout: float = 0.0,
    other: dict[str, Any] | None = None,
) -> nn.Module:
    """peft's layer, with a B that is not zero."""
    torch.manual_seed(0)
    base: nn.Module = Linear(inputs, outputs) if kind == "own" else QuickLinear(inputs, outputs)
    holder = nn.ModuleDict({"it": base.requires_grad_(False)})
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["it"], lora_dropout=dropout)
    peft.inject_adapter_in_model(config, holder, "policy")
    if other is not None:
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["it"], **other), holder, "other")
    found = holder["it"]
    nn.init.normal_(found.lora_B["policy"].weight, std=0.3)  # type: ignore[index, union-attr, operator]
    return found


def taken_over(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    AdaptedLinear.take_over(made)
    assert type(made) is AdaptedLinear
    return made


def results(module: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """The result, the input's gradient and those of A and B."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).roll(7, 0).to(y.dtype))
    trained = [p.grad for p in module.parameters() if p.requires_grad]
    assert len(trained) == 2
    return [y.detach(), x.grad, *trained]  # type: ignore[list-item]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kind", ["own", "quick"])
@pytest.mark.parametrize("rank", [4, 5])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_layer_is_peft_s(inputs: int, outputs: int, rank: int, kind: str) -> None:
    theirs = layer(inputs, outputs, kind, rank)
    x = torch.randn(3, 11, inputs)
    expected = results(copy.deepcopy(theirs).double(), x.double())
    for found, exact in zip(results(taken_over(theirs), x), expected, strict=True):
        assert found.dtype is torch.float32
        assert distance(found, exact) < 1e-5


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_under_autocast(inputs: int, outputs: int) -> None:
    theirs = layer(inputs, outputs)
    x = torch.randn(300, inputs)
    exact = results(copy.deepcopy(theirs).double(), x.double())
    peft_s, ours = results(copy.deepcopy(theirs), x, True), results(taken_over(theirs), x, True)
    for found, other, expected in zip(ours, peft_s, exact, strict=True):
        assert found.dtype is other.dtype
        assert distance(found, expected) < 3e-2
        assert distance(found, expected) < 1.5 * distance(other, expected) + 1e-3


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_backward_pass_in_autocast(inputs: int, outputs: int) -> None:
    """Of what was computed in float32 outside of it."""
    module, x = taken_over(layer(inputs, outputs)), torch.randn(40, inputs)
    expected = results(module, x)
    module.zero_grad()
    x.requires_grad_()
    y = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).roll(7, 0))
    for found, right in zip(
        (x.grad, *(p.grad for p in module.parameters() if p.requires_grad)), expected[1:], strict=True
    ):
        assert found is not None
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_dropout_is_of_what_the_update_reads(inputs: int, outputs: int) -> None:
    theirs = layer(inputs, outputs, dropout=0.5)
    ours, x = taken_over(theirs), torch.randn(40, inputs)
    for training in (True, False):
        both = []
        for module in (theirs, ours):
            module.train(training).zero_grad()
            torch.manual_seed(1)
            both.append(results(module, x))
        for found, expected in zip(both[1], both[0], strict=True):
            assert distance(found, expected.double()) < 1e-5


@pytest.mark.parametrize("kind", ["own", "quick"])
def test_some_of_the_outputs(kind: str) -> None:
    if not native(torch.float32):
        pytest.skip("matrix products are torch's here")
    module: Any = taken_over(layer(64, 200, kind))
    x, outputs = torch.randn(40, 64), slice(30, 110)
    whole = module(x)[:, outputs]
    torch.testing.assert_close(module.part(x, outputs), whole, rtol=1e-5, atol=1e-5)
    assert module.part(x[:1], outputs) is None  # too few rows for a product of our own


@pytest.mark.parametrize("change", ["few rows", "off", "two", "dora", "merged", "base", "hook"])
def test_what_is_not_plain_is_left_to_peft(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"two": {}, "dora": {"use_dora": True}}.get(change)
    theirs = layer(64, 80, other=other)
    x = torch.randn(2 if change == "few rows" else 40, 64)
    if other is not None:
        theirs.set_adapter(["policy", "other"] if change == "two" else "other")  # type: ignore[operator]
    elif change == "off":
        theirs.enable_adapters(False)  # type: ignore[operator]
    elif change == "merged":
        theirs.merge()  # type: ignore[operator]
    elif change == "base":

        class Doubled(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        theirs.base_layer.__class__ = Doubled
    elif change == "hook":
        theirs.base_layer.register_forward_hook(lambda module, given, result: 2 * result)  # type: ignore[union-attr]
    ours: Any = taken_over(theirs)
    monkeypatch.setattr(AdaptedLinear, "product", None)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------- networks


def adapted(dtype: torch.dtype = torch.float32, **options: Any) -> AdaptedNetwork:
    """A PaLM with an adapter that changes what it gives."""
    torch.manual_seed(0)
    config = PaLMConfig(vocab_size=61, d_model=64, num_layers=3, num_heads=2, head_dim=32, d_ffn=160, max_length=96)
    network = AdaptedNetwork(config.build().to(dtype).eval(), {"policy": LoRA(rank=4, **options)}, trained=["policy"])
    give_memory(network, torch.device("cpu"))
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2).add_("magnitude" in name)
    return network


def logits_of(network: Any, tokens: Tensor, how: Decoding | None) -> list[Tensor]:
    """Those after a prompt of 40 tokens and after each of the rest; without a setting by whole passes."""
    with torch.no_grad():
        if how is None:
            return [network(tokens[:, :n], head=last_logits) for n in range(40, tokens.shape[1])]
        decode, cache = decoding_form(network, how), network.new_cache(len(tokens), tokens.shape[1])
        assert decode is not network
        found = [decode(tokens[:, :40], cache=cache, head=last_logits)]
        for place in range(40, tokens.shape[1] - 1):
            found.append(decode(tokens[:, place : place + 1], cache=cache, head=last_logits))
        return found


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"targets": ["attn_out"]}], ids=["plain", "dora", "one"])
@pytest.mark.parametrize("weights", [None, "bf16"])
def test_decoding_has_the_adapter_in_its_copies(weights: Any, options: dict[str, Any]) -> None:
    """Packed or converted; in float32 within 1e-4 of logits up to 8, and the matrices themselves are not touched."""
    if weights is None and not native(torch.float32):
        pytest.skip("no copies are made here")
    network = adapted(**options)
    before = {name: weight.clone() for name, weight in network.named_parameters()}
    tokens = torch.randint(0, 61, (3, 50))
    view, base = network.view("policy"), network.view(None)
    expected = logits_of(view, tokens, None)
    for found, right in zip(logits_of(view, tokens, Decoding(weights)), expected, strict=True):
        assert float((found - right).abs().max()) < (1e-4 if weights is None else 0.3)
    plain = logits_of(base, tokens, Decoding())
    assert float((plain[-1] - expected[-1]).abs().max()) > 0.5, "an adapter that changes nothing shows nothing"
    assert all(torch.equal(weight, before[name]) for name, weight in network.named_parameters())


def test_decoding_without_copies_is_the_network_s_own() -> None:
    """A few tokens do not pay for packing, and 16 bits would lose small updates."""
    view = adapted().view("policy")
    assert decoding_form(view, Decoding(num_tokens=4)) is view
    half = adapted(torch.bfloat16).view("policy")
    assert decoding_form(half, Decoding()) is half
    with pytest.raises(ValueError, match=r"engine.weights is bf16.* merged; this"):
        decoding_form(half, Decoding("bf16"))
    with pytest.raises(ValueError, match=r"engine.compile is True.*merge_to_sample"):
        decoding_form(view, Decoding(compile=True))


def test_the_last_block_is_cut_with_an_adapter_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and gradients of the tokens that are read are those of a network that computes all."""
    tokens = torch.randint(0, 61, (4, 60))
    mask, targets = torch.ones(4, 60, dtype=torch.bool), torch.arange(60).expand(4, 60) >= 45
    found = side_by_side(tokens, mask, targets, torch.arange(4), depth=3)
    assert found is not None and found.sequences.read is not None
    shared = found.sequences
    both = []
    for cut in (True, False):
        network = adapted().train()
        if not cut:
            monkeypatch.setattr(AdaptedLinear, "part", lambda *given: None)
        logits = network.view("policy")(found.tokens, positions=found.positions, sequences=shared)
        assert logits.shape[1] == shared.read
        logits.square().mean().backward()
        both.append([logits.detach(), *(p.grad for p in network.parameters() if p.requires_grad)])
    for cut_one, whole in zip(*both, strict=True):
        torch.testing.assert_close(cut_one, whole, rtol=1e-4, atol=1e-5)


def test_ours_are_what_a_network_has() -> None:
    layers = [module for module in adapted().modules() if isinstance(module, lora.Linear)]
    assert len(layers) == 9 and all(type(module) is AdaptedLinear for module in layers)
