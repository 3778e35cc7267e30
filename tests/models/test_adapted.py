"""Adapters on one frozen network: the formulas of LoRA, rsLoRA and DoRA, views of several roles, and recomputation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_palm.models.adapted import AdaptedNetwork
from lit_palm.models.base import Network, ScalarNetwork
from lit_palm.models.lora import LoRA, merge, targets_of
from lit_palm.models.palm import PaLMConfig
from lit_palm.models.weights import give_memory
from tests.families import architecture

KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
ROUNDING = 1e-12  # float64, sums in another order


def palm(**changes: Any) -> Network:
    torch.manual_seed(0)
    fields = {"d_model": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "max_length": 64, "vocab_size": 50}
    return PaLMConfig(**{**fields, **changes}).build()


def hugging_face(family: str, **changes: Any) -> Network:
    from lit_palm.models.huggingface_config import HuggingFaceConfig

    torch.manual_seed(0)
    plain = architecture(family, vocab_size=50).to_dict()
    return HuggingFaceConfig(architecture=plain, vocab_size=50, max_length=64, d_model=32, **changes).build()


def fill_adapters(network: AdaptedNetwork) -> AdaptedNetwork:
    """Numbers that matter in every adapter and head, in float64."""
    names = give_memory(network, torch.device(torch.get_default_device()))
    generator = torch.Generator().manual_seed(1)
    for name in names:
        path, _, own = name.rpartition(".")
        tensor = getattr(network.get_submodule(path), own)
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + (own == "scale" or "magnitude" in name))
    return network.double()


def adapted(trunk: Network, **lora: Any) -> AdaptedNetwork:
    roles = {"policy": LoRA(rank=4, alpha=6.0, **lora), "value": LoRA(rank=2, alpha=3.0, **lora)}
    return fill_adapters(AdaptedNetwork(trunk, roles, {"value": "last"}, ["policy", "value"]))


def ids(rows: int = 3, width: int = 9) -> Tensor:
    return torch.randint(50, (rows, width), generator=torch.Generator().manual_seed(3))


def by_hand(kind: str, x: Tensor, w: Tensor, a: Tensor, b: Tensor, m: Tensor | None, lora: LoRA) -> Tensor:
    """The equations of the papers, one row of the output after the other."""
    scale = lora.alpha / math.sqrt(lora.rank) if kind == "rslora" else lora.alpha / lora.rank
    whole = w + scale * b @ a
    if m is None:
        return x @ whole.T
    length = whole.square().sum(1).sqrt().detach()  # section 4.3 of DoRA: a constant to the gradient
    return (m / length) * (x @ whole.T)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_papers(kind: str) -> None:
    network = adapted(palm(), **KINDS[kind])
    layer: Any = network.trunk.get_submodule("layers.1.attn_ffn_in")
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    parts = [layer.lora_A["policy"].weight, layer.lora_B["policy"].weight]
    parts += [layer.lora_magnitude_vector["policy"].weight] if kind == "dora" else []
    with network.using("policy"):
        out = layer(x)
    out.sin().sum().backward()
    mine = [p.detach().clone().requires_grad_() for p in parts]
    expected = by_hand(kind, x, layer.base_layer.weight, *mine, *([None] * (3 - len(mine))), network.adapters["policy"])
    expected.sin().sum().backward()
    assert (out - expected).abs().max() < ROUNDING
    for part, own in zip(parts, mine, strict=True):
        assert part.grad.abs().max() > 1e-3 and (part.grad - own.grad).abs().max() < ROUNDING
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_scale_and_merging_are_those_of_peft(kind: str) -> None:
    """On a plain module that only `peft` has touched."""
    import peft

    lora = LoRA(rank=3, alpha=5.0, **KINDS[kind])
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_rslora=lora.rslora, use_dora=lora.dora,
                             init_lora_weights=False)  # fmt: skip
    model: Any = peft.get_peft_model(nn.Sequential(nn.Linear(6, 7)).double(), config)  # type: ignore[arg-type]
    layer = model.base_model.model[0]
    a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
    m = layer.lora_magnitude_vector["default"].weight.detach() * 1.5 if lora.dora else None
    if m is not None:
        layer.lora_magnitude_vector["default"].weight.data = m.clone()
    found = merge(layer.base_layer.weight.detach(), a, b, lora.scale, m)
    assert lora.scale == pytest.approx(layer.scaling["default"])
    layer.merge()
    assert (layer.base_layer.weight - found).abs().max() < ROUNDING
    transposed = merge(layer.base_layer.weight.detach().t().contiguous(), a, b, lora.scale, m, transposed=True)
    assert transposed.shape == (6, 7)


@pytest.mark.parametrize("trunk", ["palm", "llama", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
def test_recomputing_blocks_keeps_each_role_apart(trunk: str, dora: bool) -> None:
    """Two roles run before one backward pass, in which blocks are computed again."""
    found = []
    for again in (False, True):
        options = {"activation_checkpointing": again}
        network = adapted(palm(**options) if trunk == "palm" else hugging_face(trunk, **options), dora=dora).train()
        policy, value = network.view("policy"), network.view("value")
        with torch.no_grad():
            before = network.view(None)(ids())
        (policy(ids()).sin().sum() + value(ids()).sin().sum()).backward()
        grads = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
        assert all(g is not None and g.abs().max() > 0 for g in grads.values())
        found.append((before, grads))
    (one, first), (other, second) = found
    assert torch.equal(one, other)
    for name, grad in first.items():
        assert (grad - second[name]).abs().max() < ROUNDING, name


def test_inner_values_that_are_computed_again_change_no_gradient() -> None:
    networks = [palm(num_kv_heads=2).double() for _ in range(2)]
    for block in networks[1].blocks():
        block.spare = True  # type: ignore[assignment]
    for network in networks:
        network(ids()).sin().sum().backward()
    for own, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert own.grad is not None and torch.equal(own.grad, other.grad)  # type: ignore[arg-type]


def test_less_is_kept_for_the_backward_pass() -> None:
    """The feed-forward's inner width of every block and token, which is what `spare` is for."""

    def bytes_kept(spare: bool) -> int:
        network, sizes = adapted(palm()).train(), {}
        for block in network.blocks():
            block.spare = spare  # type: ignore[assignment]

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = network.view("policy")(ids())
        assert out.requires_grad
        return sum(sizes.values())

    inner = 2 * 3 * 9 * 64 * 8  # blocks, rows, tokens, inner width, bytes
    assert bytes_kept(False) - bytes_kept(True) >= 0.9 * inner


@torch.no_grad()
def test_views_share_the_memory_of_the_trunk_and_differ_in_what_they_compute() -> None:
    trunk = palm()
    plain = copy.deepcopy(trunk).double()
    network = adapted(trunk)
    views = [network.view(role) for role in ("policy", "value", None)]
    pointers = [{p.data_ptr() for p in view.parameters()} for view in views]
    weights = {p.data_ptr() for name, p in network.trunk.named_parameters() if ".lora_" not in name}
    assert len(weights) == len(list(plain.parameters())) and all(weights <= own for own in pointers)
    policy, value, reference = (view(ids()) for view in views)
    assert torch.equal(reference, plain(ids())) and (policy - reference).abs().max() > 1e-2
    assert isinstance(views[1], ScalarNetwork) and value.shape == ids().shape
    assert torch.equal(network(ids()), reference), "called by itself it is the network as it was"


def test_a_view_that_is_not_trained_runs_without_dropout_and_leaves_the_others_their_mode() -> None:
    network = adapted(palm(dropout=0.5), dropout=0.5).train()
    reference, policy = network.view(None), network.view("policy")
    reference.eval(), reference.requires_grad_(False)
    assert policy.training and network.trunk.training and not reference.training
    with torch.no_grad():
        assert torch.equal(reference(ids()), reference(ids()))
        assert not torch.equal(policy(ids()), policy(ids()))
    assert any(p.requires_grad for p in network.parameters())
    policy.eval()
    with torch.no_grad():
        assert torch.equal(policy(ids()), policy(ids()))
    policy.train()
    assert network.trunk.training


@torch.no_grad()
def test_decoding_with_a_cache_is_a_whole_pass() -> None:
    network = adapted(palm())
    policy: Any = network.view("policy")
    cache = policy.new_cache(3, 9)
    steps = [
        policy(ids()[:, :4], cache=cache)[:, -1:],
        *(policy(ids()[:, i : i + 1], cache=cache) for i in range(4, 9)),
    ]
    assert (torch.cat(steps, 1) - policy(ids())[:, 3:]).abs().max() < ROUNDING


@pytest.mark.parametrize("trunk", ["palm", "gpt2"])
@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_merged_passes_are_the_same_and_leave_no_trace(trunk: str, dora: bool) -> None:
    network = adapted(palm() if trunk == "palm" else hugging_face(trunk), dora=dora)
    policy, reference = network.view("policy"), network.view(None)
    before, plain, kept = policy(ids()), reference(ids()), {k: v.clone() for k, v in network.state_dict().items()}
    places = [p.data_ptr() for p in network.parameters()]
    with network.merged("policy"):
        moved = {p.data_ptr() for p in network.parameters()} - set(places)
        assert len(moved) == len(network.targets["policy"])
        assert 0 <= (policy(ids()) - before).abs().max() < ROUNDING
        with pytest.raises(AssertionError, match="another role"):
            reference(ids())
    assert places == [p.data_ptr() for p in network.parameters()]
    assert all(torch.equal(v, kept[k]) for k, v in network.state_dict().items())
    assert torch.equal(policy(ids()), before) and torch.equal(reference(ids()), plain)


@pytest.mark.parametrize(
    "family, expected",
    [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn"]), ("bloom", ["query_key_value"]), ("cohere", None)],
)
def test_usual_targets_are_those_of_peft(family: str, expected: list[str] | None) -> None:
    network = hugging_face(family)
    found = {name.rpartition(".")[2] for name in targets_of(network, LoRA())}
    whole = {name.rpartition(".")[2] for name in targets_of(network, LoRA(targets="all-linear"))}
    assert found == (set(expected) if expected else whole) and found <= whole
    assert "lm_head" not in whole


def test_targets_of_a_palm() -> None:
    assert len(targets_of(palm(), LoRA())) == 6 == len(targets_of(palm(), LoRA(targets="all-linear")))
    assert targets_of(palm(), LoRA(targets=["layers.1.attn_out"])) == ["layers.1.attn_out"]
    with pytest.raises(
        ValueError, match=r"no linear layer is called q_proj in the blocks of a PaLM; there are attn_ffn_in"
    ):
        targets_of(palm(), LoRA(targets=["attn_out", "q_proj"]))


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"alpha": 0.0}, "lora.alpha is 0.0"),
        ({"dropout": 1.0}, "lora.dropout is 1.0"),
        ({"targets": []}, "lora.targets is empty"),
        ({"quantize": "2bit"}, "choose 4bit, 8bit"),
    ],
)
def test_settings_out_of_range_are_one_line(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LoRA(**fields)


def test_dropout_of_an_adapter_is_what_is_said() -> None:
    network = adapted(palm(), dropout=0.25).train()
    layer: Any = network.trunk.get_submodule("layers.0.ffn_out")
    assert layer.lora_dropout["policy"].p == 0.25
    with network.using("policy"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        out = layer(x := torch.ones(1, 64, dtype=torch.float64))
        torch.manual_seed(5)
        inner = F.dropout(x, 0.25)
    a, b = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight
    expected = x @ layer.base_layer.weight.T + 6.0 / 4 * (inner @ a.T) @ b.T
    assert (out - expected).abs().max() < ROUNDING
