"""The scheduler: whoever joins, leaves or fails beside it, a request gets the tokens it would have got alone."""

from __future__ import annotations

import gc
import random
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm.models import PaLM, PaLMConfig
from lit_palm.models.base import Cache
from lit_palm.models.kernels import last_logits
from lit_palm.rollout.continuous import Scheduler
from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.requests import Handle, QueueFull, Token
from lit_palm.rollout.sampling import Sampling, row_seeds

VOCAB, EOS, PAD = 40, 1, 0


def build(**changes: Any) -> PaLM:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8, "max_length": 128,
        "logit_scale": 0.4,
    }  # fmt: skip
    network = PaLMConfig(**{**fields, **changes}).build().eval()
    with torch.no_grad():
        network.embedding.weight.mul_(0.3)  # else a tied embedding of N(0, 1) repeats the last token for ever
    return network


@pytest.fixture(scope="module")
def network() -> PaLM:
    return build()


def decode(ids: list[int]) -> str:
    return "".join(chr(97 + i) for i in ids if i > 1)


def scheduler(network: PaLM, **options: Any) -> Scheduler:
    return Scheduler(network, **{"pad_id": PAD, "eos_id": EOS, "decode": decode, **options})


def alone(network: PaLM, prompt: list[int], sampling: Sampling, seed: int) -> tuple[list[int], Tensor, str]:
    """What the cached engine gives for this request by itself."""
    got = CachedEngine().generate(
        network, [torch.tensor(prompt)], sampling, torch.tensor([seed]), pad_id=PAD, eos_id=EOS, decode=decode
    )
    return got.completions[0].tolist(), got.logps[0], got.finish_reason[0]


def random_sampling(chance: random.Random) -> Sampling:
    """Any setting may be on, whatever the others are."""

    def maybe(value: Any, other: Any = None) -> Any:
        return value if chance.random() < 0.3 else other

    return Sampling(
        temperature=chance.choice([0.0, 0.6, 1.0, 1.0, 1.4]),
        top_k=maybe(chance.choice([1, 5, 12, 100])),
        top_p=maybe(chance.choice([0.3, 0.8, 0.95, 1.0])),
        min_p=maybe(chance.choice([0.0, 0.05, 0.3])),
        repetition_penalty=maybe(1.3, 1.0),
        frequency_penalty=maybe(0.5, 0.0),
        presence_penalty=maybe(-0.5, 0.0),
        stop=maybe(["k", "ef"], []),
        min_new_tokens=maybe(3, 0),
        max_new_tokens=chance.randint(3, 30),
    )


def random_prompt(chance: random.Random, longest: int = 40) -> list[int]:
    return [chance.randrange(2, VOCAB) for _ in range(chance.randint(1, longest))]


def run_arrivals(network: PaLM, chance: random.Random, count: int, **options: Any) -> list[Handle]:
    """Requests that come at random moments, some of which are cancelled; those that ended by themselves."""
    running, cancelled, handles = scheduler(network, **options), [], []
    left = count
    while left or running.busy:
        while left and chance.random() < 0.4:
            prompt = random_prompt(chance)
            if handles and chance.random() < 0.2:
                prompt = handles[-1].prompt  # read once for both
            handles.append(running.submit(prompt, random_sampling(chance), chance.randrange(2**40)))
            left -= 1
        if handles and chance.random() < 0.05:
            one = chance.choice(handles)
            if one.finish_reason is None:
                cancelled.append(one)
            running.cancel(one)
        running.step()
        if running.cache is not None and running.rows:
            assert running.cache.length == max(handle.cached for handle in running.rows)  # no slot is padding for all
    assert running.cache is None and all(handle.finish_reason == "cancelled" for handle in cancelled)
    return [handle for handle in handles if handle not in cancelled]


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2, "xpos": True}, {"num_kv_heads": 4, "qk_norm": "layer"}])
def test_random_arrivals_get_the_tokens_they_would_get_alone(changes: dict[str, Any]) -> None:
    network, total, wrong, greedy = build(**changes), 0, 0, 0
    for trial in range(6):
        chance = random.Random(trial)
        size = chance.choice([1, 3, 8, None])
        for handle in run_arrivals(
            network, chance, 25, max_batch_size=size, prefill_tokens=chance.choice([1, 7, 60, 4096])
        ):
            tokens, logps, reason = alone(network, handle.prompt, handle.sampling, handle.seed)
            total += len(tokens)
            if handle.tokens == tokens:
                assert handle.finish_reason == reason
                # sums run in another order in a batch of another size; a small temperature enlarges it
                torch.testing.assert_close(torch.tensor(handle.logps), logps, rtol=1e-4, atol=1e-4)
            else:  # a uniform number fell within rounding of the border between two tokens
                wrong += len(tokens)
                assert not handle.sampling.greedy
            greedy += handle.sampling.greedy
    assert total > 1000 and greedy > 10
    assert wrong <= total / 1000


def test_a_cache_that_rows_join_and_leave_equals_the_uncached_forward(network: PaLM) -> None:
    """The cache by itself: joins of longer and shorter rows, selections of every kind, trims, growth."""
    chance = random.Random(3)
    rows: list[list[int]] = []
    cache: Cache | None = None
    kinds = set()

    def fresh(count: int) -> tuple[Cache, list[list[int]], Tensor]:
        prompts = [random_prompt(chance, 30) for _ in range(count)]
        width = max(map(len, prompts))
        padded = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
        mask = torch.arange(width) >= width - torch.tensor([[len(p)] for p in prompts])
        new = network.new_cache(count, width)
        logits = network(padded, mask=None if bool(mask.all()) else mask, cache=new, head=last_logits)
        return new, prompts, logits

    with torch.no_grad():
        for _ in range(150):
            if cache is None or (len(rows) < 12 and chance.random() < 0.3):
                new, prompts, _ = fresh(chance.randint(1, 3))
                if cache is None:
                    cache, rows = new, prompts
                else:
                    kinds.add("longer" if new.length > cache.length else "shorter")
                    cache.join(new)
                    rows += prompts
            if chance.random() < 0.3 and len(rows) > 1:
                order = chance.sample(range(len(rows)), chance.randint(1, len(rows) - 1))
                if chance.random() < 0.5:  # as the scheduler does it: the last one moves into the gap
                    hole = chance.randrange(len(rows))
                    order = [len(rows) - 1 if i == hole else i for i in range(len(rows) - 1)]
                cache.select(torch.tensor(order))
                rows = [list(rows[i]) for i in order]
            spare = cache.length - max(map(len, rows))
            if spare:
                kinds.add("trim")
                cache.trim(spare)
            if max(map(len, rows)) > 100:
                cache = None
                continue
            tokens = [chance.randrange(2, VOCAB) for _ in rows]
            rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
            # positions are counted by the cache itself, and given
            positions = torch.tensor([[len(row) - 1] for row in rows]) if chance.random() < 0.5 else None
            got = network(torch.tensor(tokens)[:, None], positions=positions, cache=cache, head=last_logits)
            place = chance.randrange(len(rows))
            torch.testing.assert_close(got[place], network(torch.tensor([rows[place]]))[0, -1], rtol=1e-4, atol=1e-4)
    assert kinds == {"longer", "shorter", "trim"}


def test_memory_is_bound_while_rows_come_and_go(network: PaLM) -> None:
    chance, running, peak = random.Random(0), scheduler(network, max_batch_size=6), 0
    for _ in range(400):
        while len(running.waiting) < 4:
            running.submit(random_prompt(chance), Sampling(max_new_tokens=chance.randint(1, 30)), chance.randrange(99))
        running.step()
        keys = running.cache.layers[0][0] if running.cache is not None else torch.empty(0)
        peak = max(peak, keys.shape[0] * keys.shape[2] if keys.dim() == 4 else 0)
    # at most half more rows than may run, and twice the longest request's slots with some slack
    assert 6 * 30 < peak <= 9 * (2 * 70 + 128)


def test_a_limit_on_slots_holds_back_what_does_not_fit(network: PaLM) -> None:
    running = scheduler(network, max_slots=60)
    handles = [running.submit([5] * 10, Sampling(max_new_tokens=10), seed) for seed in range(6)]
    handles.append(running.submit([5] * 90, Sampling(max_new_tokens=10), 9))  # more than the limit: it runs alone
    most = 0
    while running.step():
        most = max(most, len(running.rows))
        assert len(running.rows) * max((h.width for h in running.rows), default=0) <= 60 or len(running.rows) == 1
    assert most == 3 and all(handle.finish_reason for handle in handles)


def test_a_row_joins_while_others_decode_and_leaves_at_once(network: PaLM) -> None:
    running = scheduler(network, eos_id=None, max_batch_size=2)
    long = running.submit([3, 4, 5], Sampling(max_new_tokens=20), 1)
    for _ in range(5):
        running.step()
    short = running.submit([6], Sampling(max_new_tokens=2), 2)
    third = running.submit([7, 8], Sampling(max_new_tokens=2), 3)
    assert len(long.tokens) == 5 and short.tokens == []
    running.step()
    assert len(long.tokens) == 6 and len(short.tokens) == 1 and third.tokens == []  # two rows at most
    running.step()
    assert short.finish_reason == "length" and running.rows == [long]
    running.step()
    assert len(third.tokens) == 1 and len(long.tokens) == 8


def test_a_long_prompt_is_read_in_parts_while_others_go_on(network: PaLM) -> None:
    running = scheduler(network, eos_id=None, prefill_tokens=8)
    widths, quick = [], running.quick

    def watched(tokens: torch.Tensor, **options: Any) -> Any:
        widths.append(tokens.shape[1])
        return quick(tokens, **options)

    running.quick = watched
    other = running.submit([3, 4], Sampling(max_new_tokens=40), 1)
    running.step()
    long = [running.submit(list(range(2, 30)), Sampling(max_new_tokens=5), seed) for seed in (2, 3)]
    behind = running.submit([5], Sampling(max_new_tokens=5), 4)
    for step in range(3):
        running.step()
        assert len(other.tokens) == 2 + step and not long[0].tokens and running.busy
    running.step()
    assert len(long[0].tokens) == len(long[1].tokens) == 1  # the same prompt: read once, for both
    assert max(widths) == 8
    dropped = running.submit(list(range(2, 30)), Sampling(max_new_tokens=5), 5)
    running.step()
    running.step()  # it is being read
    running.cancel(dropped)
    while running.step():
        pass
    assert dropped.finish_reason == "cancelled" and not dropped.tokens
    for handle in (other, *long, behind):
        assert handle.tokens == alone_without_eos(network, handle)


def test_the_queue_is_limited_and_cancelling_makes_room(network: PaLM) -> None:
    running = scheduler(network, eos_id=None, max_batch_size=1, max_queue=2)
    first = running.submit([3], Sampling(max_new_tokens=50), 0)
    running.step()
    second, third = (running.submit([3], Sampling(max_new_tokens=4), seed) for seed in (1, 2))
    with pytest.raises(QueueFull):
        running.submit([3], Sampling(), 3)
    ended: list[Handle] = []
    second.on_end = ended.append
    running.cancel(second)
    running.cancel(second)
    assert ended == [second] and second.finish_reason == "cancelled" and second.tokens == []
    running.cancel(first)
    running.step()
    assert len(first.tokens) == 1 and len(third.tokens) == 1  # the row was free at once
    while running.step():
        pass
    assert third.tokens == alone_without_eos(network, third)


def alone_without_eos(network: PaLM, handle: Handle) -> list[int]:
    got = CachedEngine().generate(
        network, [torch.tensor(handle.prompt)], handle.sampling, torch.tensor([handle.seed]), pad_id=PAD, eos_id=None
    )
    return got.completions[0].tolist()


def test_bad_requests_are_refused_before_they_wait(network: PaLM) -> None:
    running = scheduler(network, decode=None)
    for prompt, sampling, fault in (
        ([], Sampling(), "empty"),
        ([VOCAB], Sampling(), f"token id {VOCAB}"),
        ([3] * 100, Sampling(max_new_tokens=29), "max_length"),
        ([3], Sampling(stop=["x"]), "decode"),
    ):
        with pytest.raises(ValueError, match=fault):
            running.submit(prompt, sampling, 0)
    assert not running.step()
    with pytest.raises(ValueError, match="max_slots"):
        ContinuousEngine(max_slots=0)


def test_listeners_hear_every_token_with_its_likeliest_rivals(network: PaLM) -> None:
    heard: list[tuple[Handle, Token]] = []
    running = scheduler(network)
    sampling = Sampling(temperature=0.7, max_new_tokens=8, min_new_tokens=8)
    asking = running.submit([3, 9, 4], sampling, 5, num_top=4, on_token=lambda h, t: heard.append((h, t)))
    silent = running.submit([3, 9], sampling, 6)
    other = running.submit([3], sampling, 7, num_top=2, on_token=lambda h, t: heard.append((h, t)))
    while running.step():
        pass
    assert [t.id for h, t in heard if h is asking] == asking.tokens and len(asking.tokens) == 8
    assert [t.logp for h, t in heard if h is other] == other.logps and len(silent.tokens) == 8
    assert all(len(t.top) == (4 if h is asking else 2) for h, t in heard)
    with torch.no_grad():
        row = torch.tensor([[*asking.prompt, *asking.tokens]])
        expected = (network(row) / 0.7).log_softmax(-1)[0, 2:-1]
    for place, (_, token) in enumerate((h, t) for h, t in heard if h is asking):
        values, ids = expected[place].topk(4)
        assert [i for i, _ in token.top] == ids.tolist()
        torch.testing.assert_close(torch.tensor([v for _, v in token.top]), values, rtol=1e-4, atol=1e-4)
        assert token.logp == pytest.approx(float(expected[place, token.id]), abs=1e-4)


def test_a_listener_may_cancel_others(network: PaLM) -> None:
    running = scheduler(network, eos_id=None)
    told: list[int] = []
    first = running.submit([3], Sampling(max_new_tokens=9), 0, on_token=lambda h, t: running.cancel(second))
    second = running.submit([4], Sampling(max_new_tokens=9), 1, on_token=lambda h, t: told.append(t.id))
    while running.step():
        pass
    assert told == [] and second.finish_reason == "cancelled" and len(first.tokens) == 9


def test_a_row_without_numbers_ends_alone(network: PaLM) -> None:
    """A prompt that drives the network out of its range is its own misfortune."""
    sick = PaLMConfig(**vars(network.config)).build().eval()
    sick.load_state_dict(network.state_dict())
    with torch.no_grad():
        sick.embedding.weight[7] = float("nan")  # whoever reads a 7 is lost; all see it among the logits
    clean = sick.embedding.weight.clone()
    good = [[3, 4, 5], [9] * 20, [12, 13]]

    def finite_logits(hidden: Tensor, weight: Tensor, scale: float) -> Tensor:
        return last_logits(hidden, clean.nan_to_num(0.0), scale)

    class Sick(PaLM):
        def forward(self, tokens: Tensor, *, head: object = None, **options: Any) -> Any:
            return super().forward(tokens, head=finite_logits, **options)

    sick.__class__ = Sick
    running = scheduler(sick, eos_id=None)
    sampling = Sampling(max_new_tokens=12, top_k=3)
    handles = [running.submit(prompt, sampling, seed) for seed, prompt in enumerate(good)]
    running.step()
    ill = [running.submit(prompt, sampling, 50) for prompt in ([7], [5] * 30 + [7])]
    running.step()
    late = running.submit([20, 21], sampling, 60)
    while running.step():
        pass
    assert [h.finish_reason for h in ill] == ["error", "error"] and "not finite" in str(ill[0].error)
    for handle in [*handles, late]:
        assert len(handle.tokens) == 12 or (handle.finish_reason == "error" and 7 in handle.tokens)
        got = CachedEngine()
        if handle.finish_reason == "length":
            assert (
                handle.tokens
                == got.generate(
                    sick,
                    [torch.tensor(handle.prompt)],
                    sampling,
                    torch.tensor([handle.seed]),
                    pad_id=PAD,
                    eos_id=None,
                )
                .completions[0]
                .tolist()
            )
    assert sum(h.finish_reason == "length" for h in [*handles, late]) >= 3


@pytest.mark.parametrize("while_reading", [False, True])
def test_after_a_failure_within_a_step_those_that_wait_go_on(network: PaLM, while_reading: bool) -> None:
    running = scheduler(network, eos_id=None, max_batch_size=2)
    handles = [running.submit([3], Sampling(max_new_tokens=5), 0)]
    running.step()
    handles += [running.submit([3 + n], Sampling(max_new_tokens=5), n) for n in (1, 2)]
    if while_reading:
        running._begin = None  # type: ignore[assignment, method-assign]
    else:
        running.quick = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        running.step()
    running.__dict__.pop("_begin", None)
    running.quick = network
    running.abort("out of memory")
    lost = handles[: 1 + while_reading]  # one that was just being read is lost too, not forgotten
    assert all(h.finish_reason == "error" and h.error == "out of memory" for h in lost)
    while running.step():
        pass
    for handle in handles[len(lost) :]:
        assert handle.finish_reason == "length" and handle.tokens == alone_without_eos(network, handle)


def test_the_offline_engine_keeps_its_batch_full(network: PaLM) -> None:
    """Mixed lengths, fewer rows than prompts: far fewer forward passes than batch after batch."""
    prompts = [torch.tensor([3 + n % 30] * (1 + n % 7)) for n in range(60)]
    seeds, counts = row_seeds(0, 0, torch.arange(60)), {}
    results = {}
    for engine in (CachedEngine(8), ContinuousEngine(8)):
        passes: list[int] = []
        hook = network.register_forward_hook(lambda m, a, o, passes=passes: passes.append(1))
        results[type(engine)] = engine.generate(
            network, prompts, Sampling(max_new_tokens=60), seeds, pad_id=PAD, eos_id=EOS
        )
        hook.remove()
        counts[type(engine)] = len(passes)
    for one, other in zip(*(r.completions for r in results.values()), strict=True):
        assert torch.equal(one, other)
    assert counts[ContinuousEngine] < 0.75 * counts[CachedEngine]


def test_nothing_is_kept_of_requests_that_ended(network: PaLM) -> None:
    """Neither objects nor memory. Pools of the interpreter and of torch grow towards a bound, so that some blocks are
    allowed: fewer than two a request, whose handle alone has ten."""
    running, chance = scheduler(network, max_batch_size=4), random.Random(1)

    def some() -> tuple[Counter[str], int]:
        for _ in range(60):
            running.submit(random_prompt(chance, 8), Sampling(max_new_tokens=5), 0)
        while running.step():
            pass
        gc.collect()
        kinds = Counter(type(thing).__name__ for thing in gc.get_objects())
        return kinds, sys.getallocatedblocks()

    for _ in range(5):
        objects, blocks = some()
    for _ in range(3):
        more, after = some()
    assert (more - objects).total() < 10
    assert after - blocks < 2 * 180
