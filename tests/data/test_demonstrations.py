"""DemonstrationData: what is learned from, and what is too long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lit_palm.data.demonstrations import DemonstrationData
from lit_palm.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
MESSAGES = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "ciao"},
]


def rows(path: str, **options: Any) -> list[tuple[str, str]]:
    """(whole text, text learned from) of every row, special tokens shown."""
    data = DemonstrationData(train=path, tokenizer=TOKENIZER, shuffle=False, batch_size=2, **options)
    data.setup("fit")
    return [
        (
            TOKENIZER.decode(tokens[mask].tolist(), skip_special=False),
            TOKENIZER.decode(tokens[targets].tolist(), skip_special=False),
        )
        for batch in data.train_dataloader()
        for tokens, mask, targets in zip(batch.tokens, batch.mask, batch.loss_mask, strict=True)
    ]


def test_strings_and_messages(write: Any) -> None:
    path = write(
        "x.jsonl",
        [
            {"prompt": "The film", "completion": " is good"},
            {"prompt": "", "completion": "The end"},
            {"text": "a text"},
            {"messages": MESSAGES},
            {"prompt": MESSAGES[:3], "completion": "ciao"},
            {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
            {"prompt": "hi", "completion": MESSAGES[1:2]},
        ],
    )
    chat = "<bos><user>hi<assistant>hello<eos><user>bye<assistant>ciao<eos>"
    assert rows(path) == [
        ("<bos>The film is good<eos>", " is good<eos>"),
        ("<bos>The end<eos>", "The end<eos>"),
        ("<bos>a text<eos>", "a text<eos>"),
        (chat, "hello<eos>ciao<eos>"),
        (chat, "ciao<eos>"),
        (chat, "ciao<eos>"),
        ("<bos><user>hi<assistant>hello<eos>", "hello<eos>"),
    ]
    assert rows(path, completion_only=False)[0] == ("<bos>The film is good<eos>", "The film is good<eos>")


def test_too_long_is_cut_dropped_or_an_error_and_never_silent(write: Any) -> None:
    long = [{"prompt": "12", "completion": "3456789"}, {"prompt": "123456789", "completion": "x"}]
    path = write("x.jsonl", [*long, {"prompt": "a", "completion": "b"}])
    short = ("<bos>ab<eos>", "b<eos>")
    with pytest.warns(UserWarning, match=r"overlong\): 1 row cut \(.*x.jsonl:1\); 1 row dropped \(.*x.jsonl:2\)"):
        assert rows(path, max_length=6) == [("<bos>12345", "345"), short]
    with pytest.warns(UserWarning, match=r"than 6 tokens .*: 2 rows dropped \(.*x\.jsonl:1, 2\)"):
        assert rows(path, max_length=6, overlong="drop") == [short]
    with pytest.raises(ValueError, match=r"x\.jsonl:1: this conversation has 11 tokens, more than data\.max_length 6"):
        rows(path, max_length=6, overlong="error")
    only_long = write("y.jsonl", long)
    with pytest.raises(ValueError, match=r"no row is left .* longer than 6 tokens \(data\.overlong\): 2 rows dropped"):
        rows(only_long, max_length=6, overlong="drop")


def test_packed_rows_learn_the_same_tokens(write: Any) -> None:
    path = write("x.jsonl", [{"prompt": "p" * i, "completion": "c" * (i % 3 + 1)} for i in range(12)])

    def learned(**options: Any) -> tuple[int, list[int]]:
        data = DemonstrationData(train=path, tokenizer=TOKENIZER, max_length=16, **options)
        data.setup("fit")
        found = list(data.train_dataloader())
        tokens = torch.cat([b.tokens[b.loss_mask] for b in found])
        return sum(b.num_rows for b in found), sorted(tokens.tolist())

    (padded, first), (packed, second) = learned(), learned(pack=True)
    assert first == second and packed < padded
    with pytest.raises(ValueError, match=r"needs data\.max_length"):
        DemonstrationData(pack=True)


def test_conversations_are_split_by_what_was_asked_not_by_the_system_message(write: Any) -> None:
    system = {"role": "system", "content": "be brief"}
    chats = [[system, {"role": "user", "content": f"q{i % 20}"}, *MESSAGES[1:]] for i in range(40)]
    path = write("x.jsonl", [{"messages": chat} for chat in chats])
    data = DemonstrationData(train=path, tokenizer=TOKENIZER, validation_fraction=0.4)
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader())
    train, held_out = ({str(t.tolist()) for b in loader for t in b.tokens[:, :20]} for loader in loaders)
    assert not train & held_out and len(train) + len(held_out) == 20 and held_out


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a"}, "column 'completion' is missing"),
        ({"completion": "a"}, "column 'prompt' is missing"),
        ({"prompt": "a", "completion": None}, "column 'completion' is null"),
        ({"prompt": "a", "completion": 3}, "column 'completion' must be"),
        ({"messages": []}, "non-empty list of messages"),
        ({"messages": [{"role": "user"}]}, "message 0 of 'messages' must have"),
        ({"messages": MESSAGES[:1]}, "no message of the role 'assistant'"),
        ({"messages": [{"role": "robot", "content": "x"}, *MESSAGES]}, "role 'robot'"),
    ],
)
def test_faulty_rows_are_named(row: dict[str, Any], words: str, write: Any) -> None:
    path = write("x.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: .*{words}"):
        rows(path)
