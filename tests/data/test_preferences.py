"""PreferenceData: every format becomes groups of judged answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lit_palm.data.preferences import PreferenceData
from lit_palm.data.tokenizers import ByteTokenizer, tokenizer_from_dict

TOKENIZER = ByteTokenizer()


def load(path: str, **options: Any) -> PreferenceData:
    data = PreferenceData(train=path, shuffle=False, **{"tokenizer": TOKENIZER, **options})
    data.setup("fit")
    return data


def rows(path: str, **options: Any) -> list[tuple[Any, ...]]:
    """(group, text with the answer in brackets, rank, margin or rating) of every row."""
    found = []
    for batch in load(path, **options).train_dataloader():
        for i in range(batch.num_rows):
            tokens, targets = batch.tokens[i][batch.mask[i]], batch.loss_mask[i][batch.mask[i]]
            start = int(targets.int().argmax())
            assert bool(targets[start:].all()) and not bool(targets[:start].any())
            text = [TOKENIZER.decode(t.tolist(), skip_special=False) for t in (tokens[:start], tokens[start:])]
            judged = [batch[name][i].item() for name in ("rank", "rating", "margin") if name in batch]
            found.append((int(batch.group[i]), f"{text[0]}[{text[1]}]", *judged))
    return found


def test_pairs(write: Any) -> None:
    path = write(
        "x.jsonl",
        [
            {"prompt": "It", "chosen": " is good", "rejected": " is bad", "margin": 1.5},
            {"prompt": "", "chosen": "a", "rejected": "b", "margin": 2},
        ],
    )
    assert rows(path, batch_size=1) == [
        (0, "<bos>It[ is good<eos>]", 0, 1.5),
        (0, "<bos>It[ is bad<eos>]", 1, 1.5),
        (1, "<bos>[a<eos>]", 0, 2.0),
        (1, "<bos>[b<eos>]", 1, 2.0),
    ]
    assert rows(path, batch_size=2) == rows(path, batch_size=1)


USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo"), ("assistant", "no")))
CHAT = [(0, "<bos><user>hi<assistant>[yo<eos>]", 0), (0, "<bos><user>hi<assistant>[no<eos>]", 1)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "yo", "rejected": "no"},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        {"prompt": [USER], "completions": ["yo", [BAD]], "ranks": [0, 1]},
        {
            "prompt": {
                "message_id": "1", "text": "hi", "role": "prompter", "replies": [
                    {"message_id": "2", "text": "yo", "role": "assistant", "rank": 0, "replies": []},
                    {"message_id": "3", "text": "no", "role": "assistant", "rank": 1, "replies": []},
                ],
            }
        },
    ],
    ids=["messages", "mixed", "string", "repeated", "dialogues", "hh", "ranking", "oasst"],
)  # fmt: skip
def test_conversations_in_every_format(row: dict[str, Any], write: Any) -> None:
    assert rows(write("x.jsonl", [row])) == CHAT


def test_hh_dialogues_share_their_beginning(write: Any) -> None:
    start = "\n\nHuman: one\n\nAssistant: two\n\nlines\n\nHuman: three"
    path = write("x.jsonl", [{"chosen": start + "\n\nAssistant: good", "rejected": start + "\n\nAssistant:"}])
    before = "<bos><user>one<assistant>two\n\nlines<eos><user>three<assistant>"
    assert rows(path, empty="keep") == [(0, before + "[good<eos>]", 0), (0, before + "[<eos>]", 1)]


def test_rankings_with_ties(write: Any) -> None:
    path = write("x.jsonl", [{"prompt": "p", "completions": ["a", "b", "c"], "ranks": [1, 0, 1]}])
    assert rows(path) == [(0, "<bos>p[a<eos>]", 1), (0, "<bos>p[b<eos>]", 0), (0, "<bos>p[c<eos>]", 1)]


def test_ratings(write: Any) -> None:
    path = write("x.jsonl", [{"text": "good", "rating": 2.5}, {"text": "bad", "rating": "-1"}])
    assert rows(path) == [(0, "<bos>[good<eos>]", 2.5), (1, "<bos>[bad<eos>]", -1.0)]
    path = write("y.jsonl", [{"prompt": "it", "completion": " is", "rating": 1}])
    assert rows(path) == [(0, "<bos>it[ is<eos>]", 1.0)]


def test_flat_oasst_messages_become_their_trees(write: Any) -> None:
    def message(name: str, parent: str | None, text: str, role: str, rank: int | None = None) -> dict[str, Any]:
        return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank}

    path = write(
        "x.jsonl",
        [
            message("d", "b", "again", "prompter"),
            message("a", None, "hi", "prompter"),
            message("c", "a", "no", "assistant", 1),
            message("b", "a", "yo", "assistant", 0),
            message("e", "d", "one", "assistant", 1),
            message("f", "d", "two", "assistant", 0),
            message("z", None, "alone", "prompter"),
            message("y", "z", "single", "assistant", 0),
        ],
    )
    deep = "<bos><user>hi<assistant>yo<eos><user>again<assistant>"
    assert sorted(rows(path)) == sorted(
        [*CHAT, (1, deep + "[one<eos>]", 1), (1, deep + "[two<eos>]", 0)],
    )


def test_the_last_token_is_eos_whatever_the_template_writes_after_it(write: Any) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer = tokenizer_from_dict({**TOKENIZER.to_dict(), "chat_template": template})
    data = load(write("x.jsonl", [{"prompt": [USER], "chosen": "yo", "rejected": "n"}]), tokenizer=tokenizer)
    (batch,) = data.train_dataloader()
    assert batch.tokens[range(2), batch.mask.sum(1) - 1].tolist() == [TOKENIZER.eos_id] * 2


def test_too_long_cuts_the_prompt_alike_or_drops_the_group(write: Any) -> None:
    path = write(
        "x.jsonl",
        [
            {"prompt": "12345", "chosen": "abc", "rejected": "d"},
            {"prompt": "1", "chosen": "abcdefgh", "rejected": "d"},
            {"prompt": "1", "chosen": "a", "rejected": "d"},
        ],
    )
    with pytest.warns(UserWarning, match=r"overlong\): 1 row cut \(.*x.jsonl:1\); 1 row dropped \(.*x.jsonl:2\)"):
        assert [r[1] for r in rows(path, max_length=8)] == [
            "<bos>345[abc<eos>]", "<bos>345[d<eos>]", "<bos>1[a<eos>]", "<bos>1[d<eos>]",
        ]  # fmt: skip
    with pytest.raises(ValueError, match=r"x\.jsonl:1: an answer with its prompt has 10 tokens"):
        rows(path, max_length=8, overlong="error")


def test_validation_never_shares_a_prompt_with_training(write: Any) -> None:
    path = write("x.jsonl", [{"prompt": f"p{i % 20}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(60)])
    data = load(path, validation_fraction=0.3)

    def prompts(loader: Any) -> list[str]:
        return [
            TOKENIZER.decode(t[m & ~x].tolist())
            for b in loader
            for t, m, x in zip(b.tokens, b.mask, b.loss_mask, strict=True)
        ]

    train, validation = prompts(data.train_dataloader()), prompts(data.val_dataloader())
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 120
    assert len(set(train)) + len(set(validation)) == 20 and validation


def test_a_blank_is_one_row_alone(write: Any) -> None:
    data = load(write("x.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}]))
    batch = data.train_dataloader().collate(np.array([0]), True)
    assert batch.num_rows == len(batch.group) == 1 and not bool(batch.loss_mask.any())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "column 'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": [GOOD]}, "must both be"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "'rejected' does not end with"),
        ({"prompt": "a", "completions": ["b"], "ranks": [0]}, "at least two answers, this one has 1"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [0]}, "2 'completions' but 1 'ranks'"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [0, 0.5]}, "whole numbers"),
        ({"prompt": "a", "completions": "bc", "ranks": [0, 1]}, "must be lists"),
        ({"completion": "a", "rating": "high"}, "column 'rating' must be a number, not 'high'"),
        ({"completion": "a", "rating": float("nan")}, "must be finite"),
        ({"prompt": "a", "text": "b"}, "these are no preferences"),
        ({"message_id": "a", "parent_id": None, "role": "prompter"}, "must have a string 'text'"),
    ],
)
def test_faulty_rows_are_named(row: dict[str, Any], words: str, write: Any) -> None:
    with pytest.raises(ValueError, match=rf"x\.jsonl:1: .*{words}"):
        rows(write("x.jsonl", [row]))
