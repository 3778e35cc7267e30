"""The loader of rollouts: lazy, complete, the same for every number of processes, and resumable at every position.

`run` does what Lightning does: it drops what is left at the start of an epoch, makes an iterator, and asks for `len()`
minibatches and not one more.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lit_palm.rollout.collector import RolloutConfig
from lit_palm.rollout.loader import RolloutLoader
from lit_palm.types import Experience

Served = list[tuple[int, list[int]]]


class Collections:
    """Collects rows that know their collection, and remembers being asked."""

    def __init__(self, num_prompts: int, kept: int = 1) -> None:
        self.num_prompts, self.kept = num_prompts, kept
        self.asked: list[int] = []

    def __call__(self, collection: int) -> Experience:
        self.asked.append(collection)
        rows = torch.arange(self.num_prompts * self.kept)
        lengths = 1 + (rows * 7 + collection) % 5
        mask = torch.arange(6) < lengths[:, None]
        return Experience(
            tokens=torch.where(mask, 100 * collection + rows[:, None], 0),
            mask=mask,
            row=rows,
            # rows of a group do not lie side by side
            group=rows % self.num_prompts,
            of=torch.full_like(rows, collection),
            answer=[f"{collection}/{row}" for row in rows.tolist()],
            rewards={"a": rows.float()},
            metrics={"objective/kl": 1.0},
        )


def loader(
    num_prompts: int = 12,
    kept: int = 1,
    passes: int = 2,
    minibatch_size: int = 4,
    collect: Callable[[int], Experience] | None = None,
    seed: int = 0,
    copies: int | None = None,
    **options: Any,
) -> RolloutLoader:
    config = RolloutConfig(
        num_prompts=num_prompts,
        completions_per_prompt=copies or kept,
        passes=passes,
        minibatch_size=minibatch_size,
        seed=seed,
    )
    return RolloutLoader(collect or Collections(num_prompts, kept), config, num_prompts * kept, **options)


def epoch(source: RolloutLoader, resumed: bool = False) -> Iterator[Experience]:
    """The minibatches that Lightning takes in one epoch; a resumed one does not announce its start."""
    if not resumed:
        source.finish()
    iterator = iter(source)
    for _ in range(len(source) - (source.position if resumed else 0)):
        batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def name(batch: Experience) -> tuple[int, list[int]]:
    """Collection and rows of a minibatch."""
    assert batch["of"].unique().numel() == 1, "a minibatch is of one collection"
    return int(batch["of"][0]), batch["row"].tolist()


def run(source: RolloutLoader, epochs: int) -> Served:
    return [name(batch) for _ in range(epochs) for batch in epoch(source)]


def saved(source: RolloutLoader, in_flight: int = 0) -> dict[str, Any]:
    """The snapshot, through a file that may hold nothing but tensors and plain data."""
    file = io.BytesIO()
    torch.save(source.snapshot(in_flight), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


# ---------------------------------------------------------------------- lazily


def test_nothing_is_collected_before_the_first_minibatch_is_asked_for() -> None:
    collect = Collections(12)
    source = loader(collect=collect)
    first, second = iter(source), iter(source)  # Lightning asks twice at set-up
    assert len(source) == 6 and collect.asked == []
    next(second)
    assert collect.asked == [0]
    next(first)
    assert collect.asked == [0], "what is there is served first"


def test_each_epoch_collects_once_and_only_after_the_last_step_of_the_one_before() -> None:
    collect = Collections(12)
    source = loader(collect=collect)
    for k in range(3):
        for batch in epoch(source):
            assert collect.asked == list(range(k + 1))
            assert name(batch)[0] == k
        assert collect.asked == list(range(k + 1)), "the next one must not be sampled by a stale policy"


def test_without_lightning_a_for_loop_is_an_epoch() -> None:
    source = loader()
    assert [[name(b) for b in source] for _ in range(3)] == [run(loader(), 3)[6 * k : 6 * k + 6] for k in range(3)]


def test_without_lightning_len_minibatches_are_an_epoch_too() -> None:
    source = loader()
    served = [[name(batch) for _, batch in zip(range(len(source)), source, strict=False)] for _ in range(2)]
    assert served[0] + served[1] == run(loader(), 2)


def test_without_lightning_a_stopped_loop_is_followed_by_the_next_collection() -> None:
    source = loader()
    for _ in source:
        source.stop()
    assert [name(batch) for batch in source] == run(loader(), 2)[6:]


def test_a_collection_that_failed_is_tried_again_under_its_number() -> None:
    collect, failures = Collections(12), [RuntimeError("out of memory")]

    def sometimes(collection: int) -> Experience:
        if collection == 1 and failures:
            raise failures.pop()
        return collect(collection)

    source = loader(collect=sometimes)
    run(source, 1)
    with pytest.raises(RuntimeError, match="memory"):
        run(source, 1)
    state = saved(source)
    assert state["collection"] == 1 and state["buffer"] is None
    assert {of for of, _ in run(source, 1)} == {1}


def test_an_epoch_cut_short_drops_the_rest_of_its_collection() -> None:
    source = loader()
    first = epoch(source)
    for _ in range(2):  # limit_train_batches: 2
        next(first)
    assert {of for of, _ in run(source, 1)} == {1}


# ---------------------------------------------------------------------- completely


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("minibatch_size", [1, 3, 12])
def test_every_row_is_served_once_a_pass(passes: int, minibatch_size: int) -> None:
    source = loader(passes=passes, minibatch_size=minibatch_size)
    served = run(source, 2)
    steps = 12 // minibatch_size
    assert len(source) == passes * steps and len(served) == 2 * len(source)
    for k in range(2 * passes):
        rows = [row for _, batch in served[k * steps : (k + 1) * steps] for row in batch]
        assert sorted(rows) == list(range(12))


def test_passes_collections_and_seeds_have_orders_of_their_own() -> None:
    def orders(seed: int) -> list[list[int]]:
        served = run(loader(num_prompts=30, minibatch_size=30, seed=seed), 2)
        return [rows for _, rows in served]

    every = orders(0) + orders(1)
    assert len({tuple(order) for order in every}) == 8
    assert orders(0) == orders(0)


@pytest.mark.parametrize("seed", [-5, 2**40, 2**62])
def test_any_seed_will_do(seed: int) -> None:
    assert len(run(loader(seed=seed), 1)) == 6


def test_minibatches_hold_the_rows_own_tensors_and_lists_without_trailing_padding() -> None:
    for batch in epoch(loader()):
        of, rows = name(batch)
        assert batch["answer"] == [f"{of}/{row}" for row in rows]
        longest = max(1 + (row * 7 + of) % 5 for row in rows)
        assert batch["tokens"].shape == (4, longest)
        assert (batch["tokens"][:, 0] == torch.tensor(rows) + 100 * of).all()
        assert "metrics" not in batch and "rewards" not in batch


def test_changing_a_minibatch_leaves_the_collection_alone() -> None:
    source = loader(minibatch_size=12)
    want = [batch["tokens"].clone() for batch in epoch(loader(minibatch_size=12))]
    got = []
    for batch in epoch(source):
        got.append(batch["tokens"].clone())
        batch["tokens"].zero_()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---------------------------------------------------------------------- groups and ranks


@pytest.mark.parametrize("kept", [2, 3, 4])
@pytest.mark.parametrize("copies", [4, 7])
def test_rows_of_a_group_stay_in_one_minibatch_also_when_some_were_dropped(kept: int, copies: int) -> None:
    """Of `copies` completions a prompt the objective keeps some: best of n, or best against worst."""
    source = loader(num_prompts=8, kept=kept, copies=copies, minibatch_size=2 * kept, grouped=True)
    served = 0
    for batch in epoch(source):
        groups, sizes = batch["group"].unique(return_counts=True)
        assert sizes.tolist() == [kept, kept] and len(groups) == 2
        served += len(batch["row"])
    assert served == 2 * 8 * kept


def test_rows_without_groups_are_shuffled_one_by_one() -> None:
    mixed = [batch["group"].unique(return_counts=True)[1].tolist() for batch in epoch(loader(num_prompts=6, kept=2))]
    assert any(max(sizes) == 1 for sizes in mixed)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_the_slices_of_all_ranks_are_the_minibatch_of_one_process(world: int, grouped: bool) -> None:
    options: dict[str, Any] = {"num_prompts": 8, "kept": 2, "minibatch_size": 8, "grouped": grouped}
    one = run(loader(**options), 2)
    ranks = [run(loader(**options, rank=rank, world_size=world), 2) for rank in range(world)]
    for k, (of, rows) in enumerate(one):
        shares = [served[k] for served in ranks]
        assert all(share[0] == of and len(share[1]) == 8 // world for share in shares)
        assert sorted(row for share in shares for row in share[1]) == sorted(rows)
    if grouped:
        for served in ranks:
            assert all(sorted(r % 8 for r in rows) == sorted(2 * list({r % 8 for r in rows})) for _, rows in served)


def test_the_number_of_ranks_may_change_between_runs() -> None:
    source = loader(minibatch_size=4)
    straight = run(loader(minibatch_size=4), 1)
    first = epoch(source)
    for _ in range(2):
        next(first)
    state = saved(source)
    ranks = []
    for rank in range(2):
        resumed = loader(minibatch_size=4, rank=rank, world_size=2)
        resumed.restore(state)
        ranks.append([name(batch) for batch in epoch(resumed, resumed=True)])
    together = [sorted(a[1] + b[1]) for a, b in zip(*ranks, strict=True)]
    assert together == [sorted(rows) for _, rows in straight[2:]]


# ---------------------------------------------------------------------- resuming


def continued(state: dict[str, Any], epochs: int, served: int = 0) -> tuple[Served, list[int]]:
    """What a new loader serves from a snapshot on: the rest of an epoch that had begun, then whole ones."""
    collect = Collections(12)
    source = loader(collect=collect)
    source.restore(state)
    rest = [name(batch) for batch in epoch(source, resumed=True)] if served else []
    return rest + run(source, epochs), collect.asked


@pytest.mark.parametrize("position", range(1, 7))
@pytest.mark.parametrize("before", [0, 2])
def test_a_run_resumed_at_any_position_continues_as_if_never_stopped(before: int, position: int) -> None:
    straight = run(loader(), before + 3)
    source = loader()
    done = run(source, before)
    under_way = epoch(source)
    done += [name(next(under_way)) for _ in range(position)]
    exhausted = position == len(source)
    rest, asked = continued(saved(source), 2, served=0 if exhausted else position)
    assert done + rest == straight
    assert asked == [before + 1, before + 2], "the collection under way is not sampled again"


def test_an_exhausted_collection_is_left_out_of_the_state() -> None:
    source = loader()
    run(source, 1)
    assert saved(source)["buffer"] is None and saved(source)["collection"] == 1
    source.finish()
    assert saved(source)["collection"] == 1, "saved before or after the epoch is counted, it counts once"


@pytest.mark.parametrize("position", range(1, 7))
def test_a_minibatch_that_an_exception_interrupted_is_served_again(position: int) -> None:
    straight = run(loader(), 2)
    source = loader()
    under_way = epoch(source)
    done = [name(next(under_way)) for _ in range(position)]
    rest, _ = continued(saved(source, in_flight=1), 1, served=position)
    assert done[:-1] + rest == straight


@pytest.mark.parametrize("position", [1, 3, 6])
@pytest.mark.parametrize("announced", [False, True])
def test_a_stopped_update_ends_its_epoch_also_when_resumed(position: int, announced: bool) -> None:
    """Stopped on too large a KL, the rest is unused, and the next epoch is the next collection."""
    source, resumed = loader(), loader()
    served = 0
    for _ in epoch(source):
        served += 1
        if served == position:
            source.stop()
            state = saved(source)
    assert served == position
    assert state["buffer"] is None and state["stopped"] is True
    resumed.restore(state)
    if not announced:  # in the middle of an epoch Lightning asks on, and is told that it is over
        assert list(iter(resumed)) == []
    straight = run(loader(), 3)[6:]
    assert run(resumed, 2) == straight
    assert run(source, 2) == straight


def test_stopping_ends_the_iterator_under_way() -> None:
    source = loader()
    iterator = iter(source)
    next(iterator)
    source.stop()
    with pytest.raises(StopIteration):
        next(iterator)
    assert {of for of, _ in run(source, 1)} == {1}


def test_a_loader_that_has_not_begun_is_restored_to_the_beginning() -> None:
    state = saved(loader())
    assert state == {
        "collection": 0,
        "position": 0,
        "minibatch_size": 4,
        "num_rows": 12,
        "num_batches": 6,
        "buffer": None,
        "stopped": False,
    }
    assert continued(state, 2)[0] == run(loader(), 2)


def test_the_state_serves_all_that_the_collection_did() -> None:
    source = loader()
    under_way = epoch(source)
    next(under_way)
    want = list(under_way)
    again = loader()
    next(epoch(again))
    resumed = loader()
    resumed.restore(saved(again))
    for got, batch in zip(epoch(resumed, resumed=True), want, strict=True):
        assert got.keys() == batch.keys()
        for field, value in batch.items():
            assert torch.equal(got[field], value) if isinstance(value, torch.Tensor) else got[field] == value, field


def test_lightning_is_given_no_state_to_restore_too_late() -> None:
    source = loader()
    assert source.state_dict() == {}
    source.load_state_dict({"collection": 5})
    assert run(source, 1)[0][0] == 0


@pytest.mark.parametrize("change", [{"minibatch_size": 6}, {"num_prompts": 24}])
def test_sizes_may_change_between_collections_only(change: dict[str, int]) -> None:
    source = loader()
    next(epoch(source))
    with pytest.raises(ValueError, match="minibatch_size"):
        loader(**change).restore(saved(source))
    run(source, 1)  # to the end of collection 1
    resumed = loader(**change)
    resumed.restore(saved(source))
    assert {of for of, _ in run(resumed, 1)} == {2}


# ---------------------------------------------------------------------- sizes that do not fit


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"minibatch_size": 5}, "minibatch_size 5 does not divide"),
        ({"minibatch_size": 24}, "minibatch_size 24 does not divide"),
        ({"num_prompts": 12, "kept": 0, "copies": 1}, "0 rows"),
        ({"minibatch_size": 3, "world_size": 2}, "2 processes"),
        ({"kept": 2, "minibatch_size": 3, "grouped": True}, "2 completions a prompt"),
        ({"kept": 3, "minibatch_size": 6, "grouped": True, "world_size": 4}, "4 processes times 3"),
    ],
    ids=str,
)
def test_sizes_that_do_not_divide_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        loader(**options)


def test_a_grouped_objective_keeps_equally_many_of_each_prompt() -> None:
    config = RolloutConfig(num_prompts=4, completions_per_prompt=3, minibatch_size=2)
    with pytest.raises(ValueError, match="equally many"):
        RolloutLoader(Collections(4), config, num_rows=10, grouped=True)

    def uneven(collection: int) -> Experience:
        experience = Collections(4, kept=2)(collection)
        experience["group"] = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
        return experience

    with pytest.raises(ValueError, match="groups have 1 to 3 rows"):
        next(iter(RolloutLoader(uneven, config, num_rows=8, grouped=True)))


def test_a_prepare_that_keeps_more_rows_than_it_said_is_named() -> None:
    source = loader(collect=Collections(16))
    with pytest.raises(ValueError, match=r"16 rows after .*prepare.*num_kept.*at most 12"):
        next(iter(source))


# ------------------------------------------------------------------------------------------ smaller collections


@pytest.mark.parametrize("kept, batches", [(12, 6), (9, 6), (8, 4), (1, 2)])
def test_a_smaller_collection_makes_a_shorter_epoch_and_loses_no_row(kept: int, batches: int) -> None:
    source = loader(collect=Collections(kept))
    assert len(source) == source.num_batches == 6  # the most there can be
    served = [batch["row"].tolist() for batch in epoch(source)]
    assert source.num_batches == 6, "of the next collection, which is not made yet"
    assert len(served) == batches and max(map(len, served)) <= 4
    for number in range(2):
        one_pass = served[number * batches // 2 : (number + 1) * batches // 2]
        assert sorted(row for rows in one_pass for row in rows) == list(range(kept))


def test_of_a_small_minibatch_a_rank_may_get_a_row_without_weight() -> None:
    ranks = [loader(collect=Collections(5), rank=rank, world_size=2, passes=1) for rank in range(2)]
    served = [list(epoch(source)) for source in ranks]
    assert [len(batches) for batches in served] == [2, 2]
    rows = [[b["row"].tolist() for b in batches if b["of"].any() or b["mask"].sum() > 1] for batches in served]
    assert sum(len(r) for part in rows for r in part) in (4, 5)
    blank = served[1][1]
    assert blank.num_rows == 1 and blank["tokens"].shape == blank["mask"].shape == (1, 1)


def test_a_collection_of_nothing_is_one_minibatch_without_weight() -> None:
    def nothing(collection: int) -> Experience:
        whole = Collections(4)(collection)
        whole["loss_mask"] = whole["mask"]
        return whole.select([])

    source = loader(collect=nothing, passes=1)
    (batch,) = list(epoch(source))
    assert batch.num_rows == 1 and not batch["loss_mask"].any() and batch["mask"].all()
    assert source.collection == 1


def test_in_the_middle_of_a_smaller_collection_a_run_goes_on() -> None:
    whole = loader(collect=Collections(7))
    expected = run(whole, 2)
    source = loader(collect=Collections(7))
    batches = iter(source)
    served = [name(next(batches)) for _ in range(3)]
    other = loader(collect=Collections(7))
    other.restore(saved(source))
    assert served + [name(b) for b in epoch(other, resumed=True)] + run(other, 1) == expected
