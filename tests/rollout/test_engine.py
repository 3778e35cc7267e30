"""Both engines against a loop that runs the whole sequence again for every token, one row at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lit_palm.models import PaLM, PaLMConfig, TokenLogProbs
from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine, Engine, Generation
from lit_palm.rollout.sampling import Sampling, row_seeds, uniform

VOCAB, EOS, PAD = 30, 1, 0
Kind: type[Engine] = CachedEngine


@pytest.fixture(params=[CachedEngine, ContinuousEngine], autouse=True)
def _kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with each engine."""
    monkeypatch.setattr(sys.modules[__name__], "Kind", request.param)


@pytest.fixture(scope="module")
def network() -> PaLM:
    torch.manual_seed(0)
    config = PaLMConfig(
        vocab_size=VOCAB, d_model=32, num_layers=2, num_heads=4, head_dim=8, max_length=64, logit_scale=0.4, xpos=True
    )
    network = config.build()
    with torch.no_grad():
        network.embedding.weight.mul_(0.3)  # else a tied embedding of N(0, 1) repeats the last token for ever
    return network


def make_prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(2, VOCAB, (n,), generator=generator) for n in lengths]


def decode(ids: list[int]) -> str:
    """Token 2 is "c", 3 is "d" ...; EOS and padding have no text."""
    return "".join(chr(97 + i) for i in ids if i > 1)


def generate(network: PaLM, prompts: Sequence[Tensor], sampling: Sampling, **options: object) -> Generation:
    engine = options.pop("engine", None) or Kind()
    seeds = options.pop("seeds", row_seeds(0, 0, torch.arange(len(prompts))))
    return engine.generate(network, prompts, sampling, seeds, **{"pad_id": PAD, "eos_id": EOS, **options})


@torch.no_grad()
def slow(network: PaLM, prompt: Tensor, sampling: Sampling, seed: Tensor, eos_id: int | None = EOS) -> list[int]:
    """One row, no cache, transformers' filters, a plain running sum."""
    ids, new = prompt.tolist(), []
    for step in range(sampling.max_new_tokens):
        context = torch.tensor([ids + new])
        logits = network(context)[:, -1].float()
        if step < sampling.min_new_tokens and eos_id is not None:
            logits[:, eos_id] = -torch.inf
        if sampling.repetition_penalty != 1:
            logits = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(context, logits)
        for token in set(new):
            logits[:, token] -= sampling.presence_penalty + new.count(token) * sampling.frequency_penalty
        if sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            logits = TemperatureLogitsWarper(sampling.temperature)(context, logits)
            if sampling.top_k is not None:
                logits = TopKLogitsWarper(sampling.top_k)(context, logits)
            if sampling.top_p is not None:
                logits = TopPLogitsWarper(sampling.top_p)(context, logits)
            token = int((logits.double().softmax(-1).cumsum(-1) <= uniform(seed[None], step)).sum())
        new.append(token)
        if token == eos_id or any(stop in decode(new) for stop in sampling.stop):
            break
    return new


SETTINGS = {
    "plain": Sampling(max_new_tokens=20),
    "greedy": Sampling(max_new_tokens=20, temperature=0.0),
    "cool": Sampling(max_new_tokens=20, temperature=0.6),
    "filtered": Sampling(max_new_tokens=20, temperature=1.3, top_k=9, top_p=0.9),
    "penalty": Sampling(max_new_tokens=20, repetition_penalty=1.5),
    "greedy_penalty": Sampling(max_new_tokens=20, repetition_penalty=1.5, temperature=0.0),
    "minimum": Sampling(max_new_tokens=20, min_new_tokens=15),
    "stops": Sampling(max_new_tokens=20, stop=["k", "ef", "z"]),
    "frequency": Sampling(max_new_tokens=20, frequency_penalty=0.8),
    "presence": Sampling(max_new_tokens=20, presence_penalty=1.5, frequency_penalty=-0.2, temperature=0.8, top_k=12),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("max_batch_size", [None, 3])
def test_same_tokens_as_without_cache_and_batch(network: PaLM, name: str, max_batch_size: int | None) -> None:
    # mixed lengths, equal prompts, and more rows than survive to the end: padding, repeats and compaction all run
    prompts = make_prompts(5, 1, 12, 5, 9, 2, 7, 12)
    prompts[3] = prompts[0]
    sampling, seeds = SETTINGS[name], row_seeds(7, 0, torch.arange(8))
    engine = Kind(max_batch_size)
    got = generate(network, prompts, sampling, seeds=seeds, engine=engine, decode=decode)
    expected = [slow(network, p, sampling, s) for p, s in zip(prompts, seeds, strict=True)]
    assert [c.tolist() for c in got.completions] == expected
    assert len({tuple(e) for e in expected}) > 4  # different rows, or the comparison says little
    for completion, ended, reason in zip(expected, got.ended, got.finish_reason, strict=True):
        last = "eos" if completion[-1] == EOS else "length"
        last = "stop" if any(s in decode(completion) for s in sampling.stop) else last
        assert (reason, ended) == (last, last != "length")


def test_a_row_does_not_depend_on_its_batch(network: PaLM) -> None:
    prompts, seeds = make_prompts(5, 1, 12, 9, 2, 7), row_seeds(3, 2, torch.arange(6))
    together = generate(network, prompts, SETTINGS["plain"], seeds=seeds)
    order = [4, 0, 3]
    apart = generate(network, [prompts[i] for i in order], SETTINGS["plain"], seeds=seeds[order])
    for place, row in enumerate(order):
        assert torch.equal(apart.completions[place], together.completions[row])
        # sums run in another order in a batch of another size
        torch.testing.assert_close(apart.logps[place], together.logps[row], rtol=1e-5, atol=1e-5)


def test_equal_prompts_with_different_seeds_differ(network: PaLM) -> None:
    prompt = make_prompts(6)[0]
    got = generate(network, [prompt] * 20, SETTINGS["plain"])
    assert len({tuple(c.tolist()) for c in got.completions}) > 15


@pytest.mark.parametrize("name", SETTINGS)
def test_logps_are_those_of_the_uncached_forward(network: PaLM, name: str) -> None:
    sampling, prompts = SETTINGS[name], make_prompts(5, 1, 12, 5, 9)
    got = generate(network, prompts, sampling, decode=decode)
    for prompt, completion, logps in zip(prompts, got.completions, got.logps, strict=True):
        assert len(logps) == len(completion) and logps.dtype is torch.float32
        row = torch.cat((prompt, completion))[None]
        head = TokenLogProbs(row, temperature=sampling.temperature or 1.0)
        expected = network(row, head=head)["logps"][0, len(prompt) :]
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


def test_eos_in_the_prompt_is_an_ordinary_token(network: PaLM) -> None:
    prompts = [torch.tensor([5, EOS, 6, EOS]), torch.tensor([EOS]), torch.tensor([PAD, 7])]
    seeds = row_seeds(0, 0, torch.arange(3))
    got = generate(network, prompts, SETTINGS["minimum"], seeds=seeds)
    assert [c.tolist() for c in got.completions] == [
        slow(network, p, SETTINGS["minimum"], s) for p, s in zip(prompts, seeds, strict=True)
    ]
    assert all(len(c) >= 15 for c in got.completions)


def test_min_new_tokens_bans_eos_and_ignores_early_stops(network: PaLM) -> None:
    prompts = make_prompts(*[4] * 40)
    free = generate(network, prompts, Sampling(max_new_tokens=20, stop=["e"]), decode=decode)
    assert min(len(c) for c in free.completions) < 5 and {"eos", "stop"} <= set(free.finish_reason)
    got = generate(network, prompts, Sampling(max_new_tokens=20, min_new_tokens=6, stop=["e"]), decode=decode)
    lengths = [len(c) for c in got.completions]
    assert min(lengths) == 6
    early = [c for c in got.completions if "e" in decode(c[:5].tolist())]
    assert early and any(len(c) > 6 for c in early)  # a stop text that came too early does not end the row later
    for completion, reason in zip(got.completions, got.finish_reason, strict=True):
        assert EOS not in completion[:5]
        assert "e" not in decode(completion[5:-1].tolist())
        assert (reason == "stop") == (completion[-1] == 4)  # "e"


def test_no_eos_runs_to_the_limit(network: PaLM) -> None:
    got = generate(network, make_prompts(3, 8), Sampling(max_new_tokens=25), eos_id=None)
    assert [len(c) for c in got.completions] == [25, 25] and got.finish_reason == ["length", "length"]
    assert not any(got.ended)


def test_a_stop_text_may_span_tokens_and_reach_over_special_ones(network: PaLM) -> None:
    # about one stop in thirty is made over a padding token, which has no text
    prompts = make_prompts(*[3] * 150)
    sampling = Sampling(max_new_tokens=30, stop=[f"g{chr(c)}" for c in range(97, 127)])
    seeds = row_seeds(0, 0, torch.arange(150))
    got = generate(network, prompts, sampling, seeds=seeds, decode=decode)
    assert any(r == "stop" and c[-2] == PAD for r, c in zip(got.finish_reason, got.completions, strict=True))
    assert [c.tolist() for c in got.completions] == [
        slow(network, p, sampling, s) for p, s in zip(prompts, seeds, strict=True)
    ]


def test_tokens_are_streamed_in_order(network: PaLM) -> None:
    heard: dict[int, list[int]] = {}
    got = generate(
        network,
        make_prompts(5, 1, 12, 5, 9, 2),
        SETTINGS["plain"],
        on_token=lambda row, token: heard.setdefault(row, []).append(token),
        engine=Kind(4),
    )
    assert heard == {row: c.tolist() for row, c in enumerate(got.completions)}


def test_modes_and_gradients_are_left_as_they_were(network: PaLM) -> None:
    dropped = PaLMConfig(**{**vars(network.config), "dropout": 0.5}).build()
    dropped.load_state_dict(network.state_dict())
    dropped.train()
    dropped.layers[0].eval()
    prompts = make_prompts(5, 3)
    got = generate(dropped, prompts, SETTINGS["plain"])
    expected = generate(network, prompts, SETTINGS["plain"])
    assert [c.tolist() for c in got.completions] == [c.tolist() for c in expected.completions]  # dropout was off
    assert dropped.training and dropped.layers[1].training and not dropped.layers[0].training
    assert torch.is_grad_enabled() and not got.logps[0].requires_grad


def test_a_failure_restores_the_mode(network: PaLM) -> None:
    network.train()

    def fail(row: int, token: int) -> None:
        raise RuntimeError("the listener left")

    with pytest.raises(RuntimeError, match="listener"):
        generate(network, make_prompts(3), SETTINGS["plain"], on_token=fail)
    assert network.training and network.layers[0].training


def test_no_prompts_give_nothing(network: PaLM) -> None:
    got = generate(network, [], SETTINGS["plain"])
    assert got.completions == [] and got.ended == []


def test_bad_requests_name_the_prompt(network: PaLM) -> None:
    good = make_prompts(3)[0]
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(network, [good, good[:0]], SETTINGS["plain"])
    with pytest.raises(ValueError, match=r"prompt 1 has 50 tokens.*max_length"):
        generate(network, [good, *make_prompts(50)], SETTINGS["plain"])
    with pytest.raises(ValueError, match=r"prompt 0 holds token id 30"):
        generate(network, [torch.tensor([3, VOCAB])], SETTINGS["plain"])
    with pytest.raises(ValueError, match="decode"):
        generate(network, [good], SETTINGS["stops"])
    with pytest.raises(ValueError, match="max_batch_size"):
        Kind(0)
    generate(network, make_prompts(44), SETTINGS["plain"])  # 44 + 20 is exactly max_length


def test_a_diverged_network_is_named(network: PaLM) -> None:
    broken = PaLMConfig(**vars(network.config)).build()
    with torch.no_grad():
        broken.norm.weight.fill_(float("nan"))
    for sampling in (SETTINGS["plain"], SETTINGS["greedy"], SETTINGS["filtered"]):
        with pytest.raises(ValueError, match="not finite"):
            generate(broken, make_prompts(3, 4), sampling)


def test_bfloat16_generates(network: PaLM) -> None:
    half = PaLMConfig(**vars(network.config)).build().bfloat16()
    got = generate(half, make_prompts(5, 3), SETTINGS["filtered"])
    for prompt, completion, logps in zip(make_prompts(5, 3), got.completions, got.logps, strict=True):
        row = torch.cat((prompt, completion))[None]
        expected = half(row, head=TokenLogProbs(row, temperature=1.3))["logps"][0, len(prompt) :]
        # 8 bits of mantissa through two layers, logits of size 2
        torch.testing.assert_close(logps, expected, rtol=0.05, atol=0.05)
