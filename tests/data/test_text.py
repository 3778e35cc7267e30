"""TextData: documents in windows, tokenised once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm.data.text import TextData
from lit_palm.data.tokenizers import BPETokenizer, ByteTokenizer

TOKENIZER = ByteTokenizer()


def batches(**options: Any) -> list[Any]:
    data = TextData(tokenizer=TOKENIZER, **options)
    data.setup("fit")
    return list(data.train_dataloader())


def test_packed_windows_hold_whole_documents(write: Any) -> None:
    texts = [f"film {i} " * (i % 4 + 1) for i in range(9)]
    path = write("x.jsonl", [{"text": t} for t in texts])
    found = []
    for batch in batches(train=path, sequence_length=48, batch_size=3):
        assert batch.tokens.shape[1] == 48
        for tokens, documents in zip(batch.tokens, batch.documents, strict=True):
            for number in range(int(documents.max()) + 1):
                document = tokens[documents == number].tolist()
                assert (document[0], document[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id)
                found.append(TOKENIZER.decode(document))
    assert sorted(found) == sorted(texts)


def test_a_long_document_is_split_without_losing_a_target(write: Any) -> None:
    text = "abcdefghijklmnopqrstuvwxyz" * 3
    path = write("x.jsonl", [{"text": text}])
    (batch,) = batches(train=path, sequence_length=10, batch_size=100, shuffle=False, pack=False)
    assert TOKENIZER.decode(batch.tokens[batch.loss_mask].tolist()) == text
    assert int(batch.loss_mask.sum()) == len(text) + 1  # EOS is a target too
    assert torch.equal(batch.tokens[1:, 0], batch.tokens[:-1, 9])  # the last token carried over as context
    assert "documents" not in batch


def test_empty_lines_of_a_text_file_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n\ntwo\n")
    (batch,) = batches(train=str(tmp_path / "x.txt"), sequence_length=16)
    assert TOKENIZER.decode(batch.tokens[batch.loss_mask].tolist()) in ("onetwo", "twoone")
    (batch,) = batches(train=str(tmp_path / "x.txt"), sequence_length=16, text_unit="document")
    assert TOKENIZER.decode(batch.tokens[batch.loss_mask].tolist()) == "one\n\ntwo\n"


def test_tokens_may_come_tokenised(write: Any) -> None:
    path = write("x.jsonl", [{"tokens": TOKENIZER.encode("abc")}])
    (batch,) = batches(train=path, sequence_length=5, batch_size=1)
    assert batch.tokens.tolist() == [[TOKENIZER.bos_id, 97, 98, 99, TOKENIZER.eos_id]]


def test_bits_per_byte_see_every_byte(write: Any) -> None:
    texts = ["the film é is good", "the film is bad 12", "\U0001f600"] * 3
    path = write("x.jsonl", [{"text": t} for t in texts])
    data = TextData(train=path, sequence_length=12, tokenizer=BPETokenizer(280))
    data.setup("fit")
    sizes = data.tokenizer.num_bytes()
    total = sum(int(sizes[batch.tokens[batch.loss_mask]].sum()) for batch in data.train_dataloader())
    assert total == sum(len(t.encode()) for t in texts)


def test_arguments_are_checked(write: Any) -> None:
    with pytest.raises(ValueError, match="sequence_length is 1"):
        TextData(sequence_length=1)
