"""From samples to an experience: prompt order, rows without gaps, annotation by length, ranks merged as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_palm.models.logprobs import TokenLogProbs
from lit_palm.models.palm import PaLMConfig
from lit_palm.objectives import PPO
from lit_palm.rollout.collector import RolloutConfig, annotate, assemble, merge, prompt_order
from lit_palm.rollout.engine import CachedEngine, Generation
from lit_palm.rollout.loader import RolloutLoader
from lit_palm.rollout.sampling import Sampling, row_seeds
from lit_palm.types import Experience

PAD, EOS = 0, 1
DEVICE = torch.zeros(0).device


# ---------------------------------------------------------------------- prompt order


@settings(max_examples=50, deadline=None)
@given(num=st.integers(1, 40), seed=st.integers(-(2**62), 2**62), passes=st.integers(1, 4))
def test_every_pass_is_a_permutation_of_the_prompts(num: int, seed: int, passes: int) -> None:
    order = prompt_order(num, seed, 0, passes * num)
    for k in range(passes):
        assert sorted(order[k * num : (k + 1) * num]) == list(range(num))


@settings(max_examples=100, deadline=None)
@given(num=st.integers(1, 20), start=st.integers(0, 100), chunks=st.lists(st.integers(0, 30), max_size=6))
def test_the_order_does_not_depend_on_how_it_is_cut_into_collections(num: int, start: int, chunks: list[int]) -> None:
    whole = prompt_order(num, 3, 0, start + sum(chunks))
    pieces: list[int] = []
    for count in chunks:
        pieces += prompt_order(num, 3, start + len(pieces), count)
    assert pieces == whole[start:]


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    first, second = prompt_order(50, 0, 0, 50), prompt_order(50, 0, 50, 50)
    assert first != second
    assert first != prompt_order(50, 1, 0, 50)
    assert first != sorted(first)


# ---------------------------------------------------------------------- assembling

PROMPTS = [[5, 6, 7], [8], [9, EOS, 4, 3, 2]]
COMPLETIONS = [[10, EOS], [11, 12, 13, 14], [EOS]]


def generation(completions: list[list[int]] = COMPLETIONS, ended: tuple[bool, ...] = (True, False, True)) -> Generation:
    return Generation(
        completions=[torch.tensor(c) for c in completions],
        logps=[torch.zeros(len(c)) for c in completions],
        ended=list(ended),
        finish_reason=["eos" if e else "length" for e in ended],
    )


def assembled(pad: int = PAD) -> Experience:
    prompts = [torch.tensor(p) for p in PROMPTS]
    return assemble(prompts, generation(), pad, torch.tensor([4, 5, 6]), torch.tensor([2, 2, 3]))


def test_defect_rollouts_decoded_and_retokenised() -> None:
    """The ids of a row are those of its prompt and those that were sampled, with nothing in between."""
    experience = assembled()
    for b, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        assert experience["tokens"][b][experience["mask"][b]].tolist() == prompt + completion
        assert experience["tokens"][b][experience["loss_mask"][b]].tolist() == completion


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_rows_are_right_padded_whatever_the_padding_id(pad: int) -> None:
    """The masks come from lengths: an EOS in the prompt, or one that is also the padding, is no end and no gap."""
    experience = assembled(pad)
    assert experience["tokens"].shape == (3, 6)
    assert experience["mask"].sum(1).tolist() == [5, 5, 6]
    assert not (experience["mask"][:, 1:] & ~experience["mask"][:, :-1]).any(), "no real token after padding"
    assert (experience["tokens"][~experience["mask"]] == pad).all()
    assert experience["loss_mask"].sum(1).tolist() == [2, 4, 1]
    assert not experience["loss_mask"][:, 0].any(), "the first token is never predicted"


def test_rows_groups_and_ends_come_along() -> None:
    experience = assembled()
    assert experience["row"].tolist() == [4, 5, 6] and experience["group"].tolist() == [2, 2, 3]
    assert experience["ended"].tolist() == [True, False, True] and experience["ended"].dtype == torch.bool


# ---------------------------------------------------------------------- annotating


def random_rows(lengths: list[int], seed: int = 0) -> Experience:
    """Rows of given lengths, half of each a completion."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    tokens = torch.where(mask, torch.randint(2, 30, mask.shape, generator=generator), PAD)
    start = torch.tensor(lengths)[:, None] // 2
    row = torch.arange(len(lengths))
    return Experience(tokens=tokens, mask=mask, loss_mask=mask & (torch.arange(width) >= start), row=row, group=row)


def per_token(rows: Experience) -> dict[str, Tensor]:
    """A field that tells tokens, rows and places apart."""
    width = rows["tokens"].shape[1]
    value = 1000.0 * rows["row"][:, None] + rows["tokens"] * 10.0 + torch.arange(width) / 100
    return {"field": torch.where(rows["mask"], value, 0)}


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), batch_size=st.integers(1, 13))
def test_annotation_does_not_depend_on_the_batches_it_is_made_in(lengths: list[int], batch_size: int) -> None:
    experience = random_rows(lengths)
    expected = per_token(experience)["field"]
    annotate(experience, per_token, batch_size, DEVICE)
    assert torch.equal(experience["field"], expected)


def test_batches_are_no_larger_than_asked_and_little_is_computed_on_padding() -> None:
    shapes = []

    def compute(rows: Experience) -> dict[str, Tensor]:
        shapes.append(tuple(rows["tokens"].shape))
        return per_token(rows)

    annotate(random_rows([3, 12, 1, 11, 2]), compute, 2, DEVICE)
    assert shapes == [(2, 12), (1, 3), (2, 2)]


def test_annotation_keeps_float32_of_narrow_numbers_and_every_field() -> None:
    experience = random_rows([2, 4])

    def compute(rows: Experience) -> dict[str, Tensor]:
        field = per_token(rows)["field"]
        return {"narrow": field.bfloat16(), "other": -field}

    annotate(experience, compute, 1, DEVICE)
    assert experience["narrow"].dtype == torch.float32
    assert torch.equal(experience["narrow"], per_token(experience)["field"].bfloat16().float())
    assert torch.equal(experience["other"], -per_token(experience)["field"])


# ---------------------------------------------------------------------- merging ranks


def collected(rows: list[int], lengths: list[int], **more: Any) -> Experience:
    """What one process has of a collection: its rows, as wide as its own longest."""
    whole = random_rows(lengths)
    whole["scores"] = torch.arange(len(lengths)) / 7
    whole["ended"] = torch.arange(len(lengths)) % 2 == 0
    whole["answer"] = [f"answer {i}" for i in range(len(lengths))]
    part = whole.select(rows)
    part["rewards"] = {name: whole["scores"][rows] * k for k, name in enumerate(("a", "b"), start=1)}
    annotate(part, per_token, 2, DEVICE)
    return Experience(part, **more)


LENGTHS = [3, 9, 2, 4, 7, 5, 1, 6]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("copies", [1, 2])
def test_ranks_merged_are_what_one_process_has(world: int, copies: int) -> None:
    single = collected(list(range(8)), LENGTHS)
    assert merge([single], PAD) is single
    shares = [[p * copies + c for p in range(rank, 8 // copies, world) for c in range(copies)] for rank in range(world)]
    parts = [collected(share, LENGTHS) for share in shares]
    assert len({p["tokens"].shape[1] for p in parts}) > 1, "ranks differ in width"
    merged = merge(parts, PAD)
    assert merged.keys() == single.keys()
    for name, value in single.items():
        if isinstance(value, Tensor):
            assert torch.equal(merged[name], value) and merged[name].dtype == value.dtype, name
        elif isinstance(value, dict):
            assert value.keys() == merged[name].keys()
            assert all(torch.equal(merged[name][k], v) for k, v in value.items()), name
        else:
            assert merged[name] == value, name


def test_merging_pads_tokens_with_the_padding_id_and_all_else_with_nothing() -> None:
    merged = merge([collected([0, 2], LENGTHS), collected([1], LENGTHS)], pad_id=29)
    assert merged["tokens"].shape == (3, 9)
    assert (merged["tokens"][0, 3:] == 29).all()
    assert not merged["field"][0, 3:].any() and not merged["mask"][0, 3:].any()


def test_no_rewards_are_made_up_where_there_are_none() -> None:
    parts = [random_rows([2, 3]), random_rows([4])]
    parts[1]["row"] = torch.tensor([2])
    assert "rewards" not in merge(parts, PAD)


# ---------------------------------------------------------------------- with a network


@pytest.fixture(scope="module")
def sampled() -> tuple[torch.nn.Module, Experience]:
    """A tiny policy and a collection sampled from it: 8 prompts of 1 to 8 tokens, up to 7 new ones."""
    torch.manual_seed(0)
    config = PaLMConfig(vocab_size=37, d_model=16, num_layers=2, num_heads=2, head_dim=8, max_length=32)
    network = config.build().eval()
    prompts = [torch.randint(2, 37, (1 + i,)) for i in range(8)]
    rows = torch.arange(8)
    sampling = Sampling(max_new_tokens=7, temperature=1.3)
    result = CachedEngine().generate(network, prompts, sampling, row_seeds(0, 0, rows), pad_id=PAD, eos_id=EOS)
    experience = assemble(prompts, result, PAD, rows, rows)
    experience["generation_logps"] = list(result.logps)
    return network, experience


def logps_of(network: torch.nn.Module, rows: Experience) -> dict[str, Tensor]:
    with torch.no_grad():
        head = TokenLogProbs(rows["tokens"], rows["loss_mask"], temperature=1.3)
        return {"old_logps": network(rows["tokens"], head=head)["logps"]}


def test_defect_ratio_not_1_before_the_first_update(sampled: tuple[torch.nn.Module, Experience]) -> None:
    """Sampled with a cache, annotated by length, served shuffled: however rows are batched, log-probabilities agree."""
    network, experience = sampled
    annotate(experience, lambda rows: logps_of(network, rows), 3, DEVICE)
    experience["generated"] = torch.zeros_like(experience["old_logps"])
    experience["generated"][experience["loss_mask"]] = torch.cat(experience["generation_logps"])
    # float32: rounding of two layers, 1e-6 each; the bound is the one of the start-up check
    torch.testing.assert_close(experience["generated"], experience["old_logps"], rtol=0, atol=1e-4)
    loader = RolloutLoader(lambda k: experience, RolloutConfig(num_prompts=8, minibatch_size=4), num_rows=8)
    for batch in loader:
        ratio = (logps_of(network, batch)["old_logps"] - batch["old_logps"])[batch["loss_mask"]].exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-4)


def test_defect_full_vocabulary_probabilities_kept_per_token(sampled: tuple[torch.nn.Module, Experience]) -> None:
    """A prepared collection holds [B] and [B, T] and nothing that grows with the vocabulary."""
    network, experience = sampled
    experience = Experience(experience)
    annotate(experience, lambda rows: logps_of(network, rows), 3, DEVICE)
    experience["ref_logps"], experience["values"] = experience["old_logps"], torch.zeros_like(experience["old_logps"])
    experience["scores"] = torch.randn(8)
    prepared = PPO().prepare(experience)
    shapes = {name: tuple(v.shape) for name, v in prepared.items() if isinstance(v, Tensor)}
    assert set(shapes.values()) <= {(8,), tuple(experience["tokens"].shape)}, shapes
    assert {"advantages", "returns"} <= shapes.keys()


def test_ranks_prepare_the_same_advantages_as_one_process() -> None:
    def annotated(rows: list[int]) -> Experience:
        part = random_rows(LENGTHS).select(rows)
        part["scores"] = torch.arange(8.0)[rows]
        part["ended"] = torch.ones(len(rows), dtype=torch.bool)

        def compute(batch: Experience) -> dict[str, Tensor]:
            field = torch.where(batch["loss_mask"], batch["tokens"] / 10, 0)
            return {"old_logps": -field, "ref_logps": -0.9 * field, "values": field.cos()}

        annotate(part, compute, 3, DEVICE)
        return part

    single = PPO().prepare(annotated(list(range(8))))
    merged = PPO().prepare(merge([annotated([0, 2, 4, 6]), annotated([1, 3, 5, 7])], PAD))
    assert torch.equal(merged["advantages"], single["advantages"])
    assert merged["metrics"] == single["metrics"]


# ---------------------------------------------------------------------- configuration


@pytest.mark.parametrize("key", ["num_prompts", "completions_per_prompt", "passes", "minibatch_size", "batch_size"])
def test_sizes_below_1_are_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=rf"rollout\.{key}"):
        RolloutConfig(**{key: 0})


def test_num_rows_counts_completions() -> None:
    assert RolloutConfig(num_prompts=6, completions_per_prompt=4).num_rows == 24
