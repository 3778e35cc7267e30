"""PreferenceData on unpaired feedback: labels, the numbers of rows, and prompts with another row's completion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lit_palm.data.preferences import PreferenceData
from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.types import Experience

TOKENIZER = ByteTokenizer()


def load(path: str, **options: Any) -> PreferenceData:
    data = PreferenceData(train=path, **{"tokenizer": TOKENIZER, "shuffle": False, **options})
    data.setup("fit")
    return data


def feedback(count: int) -> list[dict[str, Any]]:
    """Prompts p0, p11, p222, ... with completions a, bb, ccc, ...; every other one was wanted."""
    return [
        {"prompt": "p" + str(i) * (i + 1), "completion": "abcdefgh"[i] * (i + 1), "label": i % 2 == 0}
        for i in range(count)
    ]


def rows(batch: Experience) -> list[str]:
    """Every row as text, with what is learned from in brackets."""
    found = []
    for tokens, mask, targets in zip(batch.tokens, batch.mask, batch.loss_mask, strict=True):
        assert not bool((targets & ~mask).any()) and bool((tokens[~mask] == TOKENIZER.pad_id).all())
        start = int(targets.int().argmax()) if bool(targets.any()) else int(mask.sum())
        parts = [
            TOKENIZER.decode(t.tolist(), skip_special=False) for t in (tokens[:start], tokens[start:][mask[start:]])
        ]
        found.append(f"{parts[0]}[{parts[1]}]" if bool(targets.any()) else parts[0])
    return found


def test_labels(write: Any) -> None:
    chat = {"prompt": [{"role": "user", "content": "hi"}], "completion": "yo", "label": 0}
    data = load(write("x.jsonl", [*feedback(2), chat, {"prompt": "q", "completion": "r", "label": 1}]))
    (batch,) = data.train_dataloader()
    assert rows(batch) == [
        "<bos>p0[a<eos>]",
        "<bos>p11[bb<eos>]",
        "<bos><user>hi<assistant>[yo<eos>]",
        "<bos>q[r<eos>]",
    ]
    assert batch.label.tolist() == [True, False, False, True] and batch.label.dtype == torch.bool
    assert batch.group.tolist() == batch.row.tolist() == [0, 1, 2, 3]
    assert "rank" not in batch and "mismatched" not in batch


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("true", "must be true or false .*, not 'true' of type str; .*write jsonl"),
        ("False", "not 'False' of type str"),
        ("1", "not '1' of type str"),
        (2, "not 2 of type int"),
        (-1, "not -1 of type int"),
        (0.5, "not 0.5 of type float"),
        (None, "column 'label' is null"),
        ([True], "of type list"),
    ],
)
def test_a_label_that_is_neither_is_refused_with_its_line(label: Any, words: str, write: Any) -> None:
    path = write("x.jsonl", [*feedback(1), {"prompt": "p", "completion": "c", "label": label}])
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: .*{words}"):
        load(path)


def test_a_row_of_feedback_needs_its_prompt(write: Any) -> None:
    with pytest.raises(ValueError, match=r"x\.jsonl:1: column 'prompt' is missing"):
        load(write("x.jsonl", [{"completion": "c", "label": True}]))
    with pytest.raises(ValueError, match="'completion' and 'label', or OASST"):
        load(write("y.jsonl", [{"prompt": "c"}]))


# ------------------------------------------------------------------------------------------ numbers of rows


def test_rows_are_numbered_through_whatever_the_order_and_the_batches(write: Any) -> None:
    pairs = [{"prompt": "p", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(5)]
    pairs.insert(2, {"prompt": "p", "chosen": "c", "rejected": "c"})  # left out: not numbered
    path = write("x.jsonl", pairs)
    texts: dict[int, set[str]] = {}
    for options in ({}, {"shuffle": True, "seed": 3}, {"batch_size": 2, "shuffle": True, "seed": 4}):
        data = load(path, **options)
        for batch in data.train_dataloader():
            assert batch.row.dtype == torch.long
            for row, text in zip(batch.row.tolist(), rows(batch), strict=True):
                texts.setdefault(row, set()).add(text)
        assert data._elements["train"].num_rows == 10
    names = [f"<bos>p[{letter}{i}<eos>]" for i in range(5) for letter in "ab"]
    assert texts == {number: {text} for number, text in enumerate(names)}


# ------------------------------------------------------------------------------------------ mismatched rows


def test_each_prompt_comes_again_with_the_next_rows_completion(write: Any) -> None:
    data = load(write("x.jsonl", feedback(4)), mismatched=True, batch_size=3)
    first, last = data.train_dataloader()
    assert rows(first) == [
        "<bos>p0[a<eos>]", "<bos>p11[bb<eos>]", "<bos>p222[ccc<eos>]",
        "<bos>p0[bb<eos>]", "<bos>p11[ccc<eos>]", "<bos>p222[a<eos>]",
    ]  # fmt: skip
    assert first.mismatched.tolist() == [False] * 3 + [True] * 3
    assert first.row.tolist() == [0, 1, 2, -1, -1, -1] and first.label.tolist()[:3] == [True, False, True]
    assert rows(last) == ["<bos>p3333[dddd<eos>]", "<bos>p3333[a<eos>]"], (
        "alone: the completion that follows in the data"
    )
    for batch in (first, last):
        groups = batch.group.tolist()
        assert len(set(groups)) == len(groups), "no two rows belong together"
        kinds = {"tokens": torch.long, "mask": torch.bool, "loss_mask": torch.bool, "group": torch.long,
                 "row": torch.long, "label": torch.bool, "mismatched": torch.bool}  # fmt: skip
        assert {name: value.dtype for name, value in batch.items()} == kinds
        assert len({len(value) for value in batch.values()}) == 1
        assert batch.tokens.shape == batch.mask.shape == batch.loss_mask.shape
        assert bool(batch.mask.any(0).all()), "as wide as the longest row"


def test_real_rows_are_the_same_with_and_without_mismatched_ones(write: Any) -> None:
    path = write("x.jsonl", feedback(7))
    plain = load(path, shuffle=True, batch_size=3).train_dataloader()
    more = load(path, shuffle=True, batch_size=3, mismatched=True).train_dataloader()
    for one, other in zip(plain, more, strict=True):
        width = one.tokens.shape[1]
        for name, value in one.items():
            upper = other[name][: len(value)]
            assert torch.equal(upper[:, :width] if upper.dim() == 2 else upper, value), name
            assert upper.dim() == 1 or name == "tokens" or not bool(upper[:, width:].any())


def test_too_long_together_cuts_the_beginning_of_the_prompt(write: Any) -> None:
    texts = [
        {"prompt": "12345", "completion": "a", "label": True},
        {"prompt": "6", "completion": "bcdef", "label": True},
    ]
    (batch,) = load(write("x.jsonl", texts), mismatched=True, max_length=8).train_dataloader()
    assert rows(batch) == ["<bos>12345[a<eos>]", "<bos>6[bcdef<eos>]", "<bos>5[bcdef<eos>]", "<bos>6[a<eos>]"]
    texts[1] = {"prompt": "", "completion": "bcdefg", "label": True}
    (batch,) = load(write("y.jsonl", texts), mismatched=True, max_length=8).train_dataloader()
    assert rows(batch)[2] == "<bos>[bcdefg<eos>]", "down to nothing: BOS stays"


def test_a_completion_of_several_turns_keeps_its_targets(write: Any) -> None:
    turns = [{"role": r, "content": c} for r, c in (("assistant", "one"), ("user", "more"), ("assistant", "two"))]
    prompt = [{"role": "user", "content": "hi"}]
    path = write("x.jsonl", [{"prompt": prompt, "completion": turns, "label": True}, *feedback(1)])
    (batch,) = load(path, mismatched=True).train_dataloader()
    real, mixed = (batch.tokens[i][batch.loss_mask[i]].tolist() for i in (0, 3))
    assert mixed == real and TOKENIZER.decode(mixed, skip_special=False) == "one<eos>two<eos>"


def test_a_filler_has_no_weight_neither_has_its_mismatched_row(write: Any) -> None:
    data = load(write("x.jsonl", feedback(3)), mismatched=True)
    batch = data.train_dataloader().collate(np.array([1]), True)
    assert batch.num_rows == 2 and batch.mismatched.tolist() == [False, True]
    assert not bool(batch.loss_mask.any()) and batch.row.tolist() == [-1, -1]
    plain = load(write("y.jsonl", feedback(3))).train_dataloader().collate(np.array([1]), True)
    assert plain.num_rows == 1 and plain.row.tolist() == [-1] and not bool(plain.loss_mask.any())


def test_mismatched_rows_need_unpaired_feedback_of_two_rows(write: Any) -> None:
    pairs = write("x.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match=r"data\.mismatched is for unpaired feedback"):
        load(pairs, mismatched=True)
    with pytest.raises(ValueError, match=r"data\.mismatched needs the completion of another row"):
        load(write("y.jsonl", feedback(1)), mismatched=True)


def test_an_epoch_is_the_same_again_and_resumes_in_its_middle(write: Any) -> None:
    path = write("x.jsonl", feedback(8))
    options: dict[str, Any] = {"mismatched": True, "shuffle": True, "batch_size": 2}
    whole = [rows(batch) for batch in load(path, **options).train_dataloader()]
    resumed = load(path, **options)
    resumed.load_state_dict({"epoch": 0, "batch": 2, "elements": 8, "batch_size": 2})
    assert [rows(batch) for batch in resumed.train_dataloader()] == whole[2:]
