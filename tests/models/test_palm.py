"""PaLM against what others wrote (palm-rlhf-pytorch, transformers' Cohere), the paper's sizes, and itself: cached,
padded, packed and recomputed passes must agree with the plain one.

Tolerance 1e-5 in float32: two orders of the same sums over a few hundred terms of size about 1.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_palm.models import PaLM, PaLMConfig, TokenLogProbs

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
VARIANTS = {
    "plain": {},
    "xpos": {"xpos": True, "xpos_scale_base": 16},
    "l2": {"qk_norm": "l2"},
    "layer": {"qk_norm": "layer"},
    "grouped": {"num_kv_heads": 2},
    "multi_head": {"num_kv_heads": 4},
    "all": {"num_kv_heads": 2, "xpos": True, "qk_norm": "layer"},
}


def small(**overrides: object) -> PaLM:
    """Two layers, four heads of 16; norms are not 1, so that a forgotten one shows."""
    torch.manual_seed(0)
    fields = {"vocab_size": 50, "d_model": 48, "num_layers": 2, "num_heads": 4, "head_dim": 16, "max_length": 64}
    network = PaLMConfig(**{**fields, **overrides}).build()
    for name, parameter in network.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return network


@pytest.fixture(params=VARIANTS)
def network(request: pytest.FixtureRequest) -> PaLM:
    return small(**VARIANTS[request.param]).eval()


def tokens_like(*shape: int, vocab_size: int = 50) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(1))


def gradients(module: nn.Module, logits: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random function of the logits."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((logits * weights).sum(), parameters), strict=True))


# ---------------------------------------------------------------- palm-rlhf-pytorch


def palm_rlhf_fused(fused: Tensor, heads: int, head_dim: int, d_ffn: int) -> Tensor:
    """Its fused rows q | k | v | up | gate in our order."""
    qkv, up, gate = fused.split([(heads + 2) * head_dim, d_ffn, d_ffn])
    return torch.cat((qkv, gate, up))


@pytest.mark.parametrize("xpos", [False, True])
@pytest.mark.parametrize("qk_norm", ["none", "l2"])
def test_same_logits_and_gradients_as_palm_rlhf_pytorch(xpos: bool, qk_norm: str) -> None:
    peers = pytest.importorskip("palm_rlhf_pytorch")
    torch.manual_seed(0)
    dim, heads, head_dim, depth = 64, 4, 16, 3
    peer = peers.PaLM(dim=dim, num_tokens=50, depth=depth, heads=heads, dim_head=head_dim, qk_rmsnorm=qk_norm == "l2")
    for name, parameter in peer.named_parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, -0.5, 0.5) if "gamma" in name else nn.init.uniform_(parameter, 0.5, 1.5)
    nn.init.normal_(peer.token_emb.weight)
    for layer in peer.layers:
        layer.fn.rotary_emb.use_xpos = xpos

    ours = PaLMConfig(
        vocab_size=50, d_model=dim, num_layers=depth, num_heads=heads, head_dim=head_dim, xpos=xpos, qk_norm=qk_norm,
        logit_scale=1.0, max_length=512,
    ).build()  # fmt: skip

    def translate(values: dict[str, Tensor], shift: float) -> dict[str, Tensor]:
        """Values by our names; `shift` is what its norm adds to its weight (nothing for gradients)."""
        new = {"embedding.weight": values["token_emb.weight"], "norm.weight": values["norm.gamma"] + shift}
        for i in range(depth):
            old, to = f"layers.{i}.fn.", f"layers.{i}."
            fused = values[old + "fused_attn_ff_proj.weight"]
            new[to + "norm.weight"] = values[old + "norm.gamma"] + shift
            new[to + "attn_ffn_in.weight"] = palm_rlhf_fused(fused, heads, head_dim, 4 * dim)
            new[to + "attn_out.weight"] = values[old + "attn_out.weight"]
            new[to + "ffn_out.weight"] = values[old + "ff_out.2.weight"]
            if qk_norm == "l2":
                new[to + "q_norm.weight"], new[to + "k_norm.weight"] = values[old + "q_scale"], values[old + "k_scale"]
        return new

    ours.load_state_dict(translate(peer.state_dict(), 1.0))
    tokens = tokens_like(3, 40)
    theirs, mine = peer(tokens), ours(tokens)
    torch.testing.assert_close(mine, theirs, **TOLERANCE)
    # sums over 120 positions of gradients that reach some hundreds: 1e-5 of the largest
    expected, got = translate(gradients(peer, theirs), 0.0), gradients(ours, mine)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()), msg=name)


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", ["none", "layer"])
def test_same_logits_and_gradients_as_cohere(kv_heads: int, qk_norm: str) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    ours = small(num_kv_heads=kv_heads, qk_norm=qk_norm, logit_scale=0.3)
    c = ours.config
    peer = CohereForCausalLM(
        CohereConfig(
            vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=4 * c.d_model, logit_scale=0.3,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=kv_heads,
            head_dim=c.head_dim, layer_norm_eps=c.norm_eps, use_qk_norm=qk_norm == "layer",
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, max_position_embeddings=c.max_length,
            pad_token_id=None, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip

    def pairs_side_by_side(rows: Tensor, heads: int) -> Tensor:
        """Rows of each head from (i, i + half) pairs to (2i, 2i + 1) pairs."""
        return rows.view(heads, 2, c.head_dim // 2, -1).transpose(1, 2).reshape(rows.shape)

    def translate(values: dict[str, Tensor]) -> dict[str, Tensor]:
        new = {"model.embed_tokens.weight": values["embedding.weight"], "model.norm.weight": values["norm.weight"]}
        for i in range(c.num_layers):
            old, to = f"layers.{i}.", f"model.layers.{i}."
            sizes = (c.num_heads * c.head_dim, kv_heads * c.head_dim, kv_heads * c.head_dim, 4 * c.d_model)
            q, k, v, gate, up = values[old + "attn_ffn_in.weight"].split((*sizes, 4 * c.d_model))
            new[to + "input_layernorm.weight"] = values[old + "norm.weight"]
            new[to + "self_attn.q_proj.weight"] = pairs_side_by_side(q, c.num_heads)
            new[to + "self_attn.k_proj.weight"] = pairs_side_by_side(k, kv_heads)
            new[to + "self_attn.v_proj.weight"] = v
            new[to + "self_attn.o_proj.weight"] = values[old + "attn_out.weight"]
            new[to + "mlp.gate_proj.weight"], new[to + "mlp.up_proj.weight"] = gate, up
            new[to + "mlp.down_proj.weight"] = values[old + "ffn_out.weight"]
            if qk_norm == "layer":
                for name, heads in (("q_norm", c.num_heads), ("k_norm", kv_heads)):
                    weight = values[f"{old}{name}.weight"]
                    new[f"{to}self_attn.{name}.weight"] = pairs_side_by_side(weight.reshape(-1, 1), heads).view(
                        heads, -1
                    )
        return new

    missing, unexpected = peer.load_state_dict(translate(ours.state_dict()), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied to the embedding
    tokens = tokens_like(3, 40)
    theirs, mine = peer(tokens).logits, ours(tokens)
    torch.testing.assert_close(mine, theirs, **TOLERANCE)
    expected, got = gradients(peer, theirs), translate(gradients(ours, mine))
    for name, gradient in got.items():
        bound = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=bound, msg=name)


# ---------------------------------------------------------------- sizes and initialisation


@pytest.mark.parametrize(("name", "billions"), [("8b", 8.63), ("62b", 62.50), ("540b", 540.35)])
def test_presets_have_the_papers_parameter_counts(name: str, billions: float) -> None:
    with torch.device("meta"):
        network = PaLMConfig.preset(name).build()
    # the paper's table 1 is cut, not rounded, to two decimals for 540B
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.0075)


def test_preset_overrides_and_unknown_name() -> None:
    assert PaLMConfig.preset("8b", vocab_size=100, num_layers=2).num_layers == 2
    with pytest.raises(ValueError, match="540b"):
        PaLMConfig.preset("9b")


def test_initialisation_is_the_papers_also_after_the_meta_device() -> None:
    with torch.device("meta"):
        network = PaLMConfig(vocab_size=500, d_model=128, num_layers=2, qk_norm="layer").build()
    network = network.to_empty(device=torch.get_default_device())
    network.init_weights()
    assert not list(network.buffers())
    for name, parameter in network.named_parameters():
        if name == "embedding.weight":
            expected = 1.0
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        else:
            expected = parameter.shape[1] ** -0.5
        # more than 60,000 numbers each: the standard deviation is known to 0.3%
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(parameter.mean().item()) < 0.02 * expected, name
    assert network(tokens_like(2, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("field", "value"),
    [("head_dim", 15), ("num_kv_heads", 3), ("dropout", 1.0), ("num_layers", 0), ("qk_norm", "rms"), ("vocab_size", 0)],
)
def test_bad_fields_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        PaLMConfig(**{"vocab_size": 10, field: value})


def test_a_vocabulary_is_needed_and_the_length_is_limited() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        PaLMConfig().build()
    with pytest.raises(ValueError, match="max_length"):
        small(max_length=8)(tokens_like(1, 9))
    network = small(max_length=8)
    cache = network.new_cache(1, 9)
    network(tokens_like(1, 8), cache=cache)
    with pytest.raises(ValueError, match="max_length"):
        network(tokens_like(1, 1), cache=cache)


# ---------------------------------------------------------------- one network, several ways through it


def test_multi_query_is_multi_head_with_repeated_keys_and_values() -> None:
    ours, wide = small(), small(num_kv_heads=4)
    state = ours.state_dict()
    for i in range(2):
        q, k, v, rest = state[f"layers.{i}.attn_ffn_in.weight"].split((64, 16, 16, 2 * 192))
        state[f"layers.{i}.attn_ffn_in.weight"] = torch.cat((q, k.repeat(4, 1), v.repeat(4, 1), rest))
    wide.load_state_dict(state)
    tokens = tokens_like(2, 20)
    torch.testing.assert_close(ours(tokens), wide(tokens), **TOLERANCE)


def test_the_future_is_not_seen(network: PaLM) -> None:
    tokens = tokens_like(2, 20)
    changed = tokens.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 50
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], **TOLERANCE)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-2)


@pytest.mark.parametrize("pieces", [[20], [7, 1, 1, 1, 10], [1] * 20, [19, 1]])
def test_cached_equals_uncached(network: PaLM, pieces: list[int]) -> None:
    tokens = tokens_like(3, 20)
    cache = network.new_cache(3, 20)
    with torch.no_grad():
        parts = [network(part, cache=cache) for part in tokens.split(pieces, 1)]
        assert cache.length == 20
        torch.testing.assert_close(torch.cat(parts, 1), network(tokens), **TOLERANCE)


def left_padded(tokens: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The first `lengths[b]` tokens of each row at the right, and the mask."""
    width = max(lengths)
    padded, mask = (
        torch.zeros(len(lengths), width, dtype=torch.long),
        torch.zeros(len(lengths), width, dtype=torch.bool),
    )
    for row, n in enumerate(lengths):
        padded[row, width - n :], mask[row, width - n :] = tokens[row, :n], True
    return padded, mask


def test_left_padded_equals_unpadded(network: PaLM) -> None:
    tokens, lengths = tokens_like(4, 20), [20, 1, 13, 7]
    padded, mask = left_padded(tokens, lengths)
    logits = network(padded, mask=mask)
    assert logits.isfinite().all()  # padding too: a NaN there would reach the gradients
    for row, n in enumerate(lengths):
        torch.testing.assert_close(logits[row, 20 - n :], network(tokens[row : row + 1, :n])[0], **TOLERANCE)


@torch.no_grad()
def test_left_padded_cached_and_selected_equals_unpadded(network: PaLM) -> None:
    tokens, lengths, order = tokens_like(4, 30), [12, 1, 9, 12], [2, 0, 0, 1]
    padded, mask = left_padded(tokens, lengths)
    cache = network.new_cache(4, 30)
    network(padded[:, :10], mask=mask[:, :10], cache=cache)  # a prompt in two pieces
    network(padded[:, 10:], mask=mask[:, 10:], cache=cache)
    cache.select(torch.tensor(order))
    for steps in ([0], [1], [2, 3, 4], [5]):  # one token a row, and several at once
        new = torch.stack([tokens[row, [lengths[row] + s for s in steps]] for row in order])
        logits = network(new, cache=cache)
        for place, row in enumerate(order):
            end = lengths[row] + steps[-1] + 1
            expected = network(tokens[row : row + 1, :end])[0, -len(steps) :]
            torch.testing.assert_close(logits[place], expected, **TOLERANCE)


def test_right_padding_needs_no_mask(network: PaLM) -> None:
    tokens = tokens_like(1, 20)
    padded = F.pad(tokens[:, :13], (0, 7))
    mask = torch.arange(20)[None] < 13
    expected = network(tokens[:, :13])
    torch.testing.assert_close(network(padded)[:, :13], expected, **TOLERANCE)
    torch.testing.assert_close(network(padded, mask=mask)[:, :13], expected, **TOLERANCE)


def test_packed_documents_equal_separate_rows(network: PaLM) -> None:
    tokens = tokens_like(2, 24)
    documents = torch.tensor([[0] * 5 + [1] * 12 + [2] * 3 + [-1] * 4, [0] * 1 + [1] * 23])
    positions = torch.tensor([[*range(5), *range(12), *range(3), *range(4)], [0, *range(23)]])
    packed, counted = network(tokens, documents=documents, positions=positions), network(tokens, documents=documents)
    # RoPE and xPos know only differences of positions: counted from the start of the row gives the same
    torch.testing.assert_close(packed, counted, **TOLERANCE)
    for row, start, end in [(0, 0, 5), (0, 5, 17), (0, 17, 20), (1, 0, 1), (1, 1, 24)]:
        alone = network(tokens[row : row + 1, start:end])[0]
        torch.testing.assert_close(packed[row, start:end], alone, **TOLERANCE)


def test_the_head_gets_hidden_weight_and_scale(network: PaLM) -> None:
    tokens = tokens_like(2, 6)
    hidden, weight, scale = network(tokens, head=lambda *given: given)
    assert weight is network.embedding.weight and scale == pytest.approx(48**-0.5)
    torch.testing.assert_close(hidden @ weight.T * scale, network(tokens), **TOLERANCE)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    plain, recomputed = small(dropout=0.1), small(dropout=0.1, activation_checkpointing=True)
    tokens, results = tokens_like(2, 16), []
    for network in (plain, recomputed):
        torch.manual_seed(5)  # the same dropout
        results.append(gradients(network, network(tokens)))
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, **TOLERANCE)


def test_dropout_is_for_training_only_and_keeps_the_mean() -> None:
    network = small(dropout=0.2)
    tokens = tokens_like(1, 6)
    still = network.eval()(tokens)
    assert torch.equal(still, network(tokens))
    network.train()
    assert not torch.allclose(network(tokens), network(tokens), atol=1e-2)
    block = network.layers[0]
    x, rope = torch.randn(1, 1, 48), network.rope(tokens[:, :1], None, None, None)
    with torch.no_grad():
        many = torch.stack([block(x, rope, None, None) for _ in range(4000)])
        # one position attends to itself alone: every drop scales a linear output, whose mean stays
        expected = block.eval()(x, rope, None, None)
    error = (many.mean(0) - expected).abs() / (many.std(0) / 4000**0.5 + 1e-6)
    assert float(error.max()) < 5  # standard errors


def test_positions_stay_exact_in_bfloat16() -> None:
    network = small().eval()
    exact = network.rope(tokens_like(1, 64), None, None, None)
    half = copy.deepcopy(network).bfloat16()
    for low, high in zip(half.rope(tokens_like(1, 64), None, None, None), exact, strict=True):
        assert torch.equal(low, high)
    logits, expected = half(tokens_like(2, 64)).float(), network(tokens_like(2, 64))
    # bfloat16 keeps 8 bits: some parts in a hundred of logits of size 1 after two layers
    assert (logits - expected).abs().max().item() < 0.1 * expected.std().item() + 0.05


def test_validation_in_inference_mode_may_come_before_training() -> None:
    network = small(xpos=True)
    with torch.inference_mode():
        network(tokens_like(1, 8))
    gradients(network, network(tokens_like(1, 8)))


def test_a_copy_is_independent_and_equal() -> None:
    network = small()
    tokens = tokens_like(1, 8)
    expected = network(tokens).detach()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        network.embedding.weight.add_(1.0)
    assert torch.equal(twin(tokens), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_decoding_under_autocast(dtype: torch.dtype) -> None:
    network = small().eval()
    tokens, mask = left_padded(tokens_like(2, 10), [10, 4])
    cache = network.new_cache(2, 12)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16):
        network(tokens[:, :-1], mask=mask[:, :-1], cache=cache)
        last = network(tokens[:, -1:], cache=cache)[:, -1].float()
        expected = network(tokens, mask=mask)[:, -1].float()
    torch.testing.assert_close(
        last, expected, **(TOLERANCE if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05})
    )


def test_log_probs_through_the_network_match_its_logits(network: PaLM) -> None:
    tokens = tokens_like(2, 10)
    logps = network(tokens, head=TokenLogProbs(tokens))["logps"]
    expected = network(tokens).log_softmax(-1)[:, :-1].gather(2, tokens[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(logps[:, 1:], expected, **TOLERANCE)
    assert (logps[:, 0] == 0).all()
