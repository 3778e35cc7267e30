"""Nine Hugging Face families as networks: the same numbers as `transformers`, whole, cached, padded and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm import CachedEngine, Network, Sampling, load_network
from lit_palm.models.logprobs import TokenLogProbs
from tests.families import FAMILIES, write_family

# float32 rounding of another order of the same sums; logits are of size 1
LOGITS = 1e-5


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family") / request.param, request.param)


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Network, Any]:
    from transformers import AutoModelForCausalLM

    network = load_network(folder).eval()
    assert isinstance(network, Network)
    return network, AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(5, 320, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_are_those_of_transformers(pair: tuple[Network, Any]) -> None:
    network, peer = pair
    ids = tokens(3, 40)
    assert (network(ids) - peer(ids).logits).abs().max() < LOGITS


@torch.no_grad()
def test_padding_does_not_show(pair: tuple[Network, Any]) -> None:
    network, peer = pair
    rows = [tokens(1, n)[0] for n in (4, 31, 17)]
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    logits = network(ids, mask=mask)
    right = network(torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows]))
    for row, left, other in zip(rows, logits, right, strict=True):
        alone = peer(row[None]).logits[0]
        assert (left[-len(row) :] - alone).abs().max() < LOGITS
        assert (other[: len(row)] - alone).abs().max() < LOGITS


@torch.no_grad()
def test_documents_cannot_see_each_other(pair: tuple[Network, Any]) -> None:
    network, peer = pair
    ids = tokens(2, 40)
    documents = torch.tensor([[0] * 9 + [1] * 20 + [2] * 11, [0] * 25 + [1] * 15])
    logits = network(ids, documents=documents)
    for row in range(2):
        for number in documents[row].unique():
            place = documents[row] == number
            assert (logits[row][place] - peer(ids[row][place][None]).logits[0]).abs().max() < LOGITS


@torch.no_grad()
def test_the_cache_gives_what_a_whole_pass_gives(pair: tuple[Network, Any]) -> None:
    network, peer = pair
    rows, after = [tokens(1, n)[0] for n in (3, 24, 11)], tokens(3, 12)
    width = 24
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows])
    cache = network.new_cache(3, width + 12)
    found = [network(ids, mask=mask, cache=cache)[:, -1]]
    chosen = torch.arange(3)
    for step in range(12):
        if step == 5:  # rows leave and change places
            chosen = torch.tensor([2, 0])
            cache.select(chosen)
        found.append(network(after[chosen, step][:, None], cache=cache)[:, -1])
    for place, row in enumerate(chosen.tolist()):
        whole = peer(torch.cat([rows[row], after[row]])[None]).logits[0, len(rows[row]) - 1 :]
        early, late = torch.stack([step[row] for step in found[:6]]), torch.stack([step[place] for step in found[6:]])
        assert (torch.cat([early, late]) - whole).abs().max() < LOGITS


def test_sampled_log_probabilities_are_those_of_a_whole_pass(pair: tuple[Network, Any]) -> None:
    network, peer = pair
    prompts = [tokens(1, n)[0] for n in (6, 19, 6)]
    made = CachedEngine().generate(
        network, prompts, Sampling(max_new_tokens=15, temperature=0.8), torch.arange(3), pad_id=0, eos_id=None
    )
    for prompt, completion, logps in zip(prompts, made.completions, made.logps, strict=True):
        with torch.no_grad():
            logits = peer(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.8).log_softmax(-1).gather(1, completion[:, None])[:, 0]
        assert (logps - expected).abs().max() < 1e-4  # of a sum over the vocabulary, in float32


def test_gradients_are_those_of_transformers(pair: tuple[Network, Any]) -> None:
    network, peer = pair
    ids = tokens(2, 24)
    network.zero_grad()
    (-network(ids, head=TokenLogProbs(ids))["logps"].sum()).backward()
    peer.zero_grad()
    logps = peer(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    (-logps.sum()).backward()
    theirs = {name: p.grad for name, p in peer.named_parameters()}
    ours = {name.removeprefix("lm."): p.grad for name, p in network.named_parameters()}
    assert ours.keys() == theirs.keys()  # a tied weight counts once in both
    for name, grad in ours.items():
        assert grad is not None and theirs[name] is not None
        assert torch.allclose(grad, theirs[name], rtol=1e-3, atol=1e-4), name  # sums over 46 tokens


def test_recomputing_blocks_changes_no_gradient(pair: tuple[Network, Any], folder: Path) -> None:
    network, _ = pair
    ids = tokens(2, 16)
    recomputing = load_network(folder, overrides={"activation_checkpointing": True})
    assert isinstance(recomputing, Network)
    grads = []
    for one in (network, recomputing):
        one.zero_grad()
        one.train()(ids, head=TokenLogProbs(ids))["logps"].sum().backward()
        grads.append({name: p.grad for name, p in one.named_parameters()})
    network.eval()
    assert len(network.blocks()) == 2
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-5, atol=1e-6), name
