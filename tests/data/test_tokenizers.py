"""Tokenizers against Python's own UTF-8 and against transformers' reading of the same vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lit_palm.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    HFTokenizer,
    Tokenizer,
    choose_tokenizer,
    load_tokenizer,
    tokenizer_from_dict,
)

TEXTS = [
    "the film is good",
    "the film was not good at all, 12 of 345",
    "Überraschend — ein Film!\n\nZwei Zeilen",
    "a literal <eos> and <user> stay text",
    "  two  spaces \t and \u65e5\u672c\u8a9e \U0001f600",
    "",
]


def trained_bpe(vocab_size: int = 320) -> BPETokenizer:
    tokenizer = BPETokenizer(vocab_size)
    tokenizer.train(TEXTS * 5)
    return tokenizer


BPE = trained_bpe()


def as_transformers(tokenizer: BPETokenizer, **special: str) -> PreTrainedTokenizerFast:
    tokens = {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **tokens)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_and_its_bytes_are_counted(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.num_bytes()[ids].sum()) == len(text.encode())
    assert not set(ids) & set(tokenizer.special_tokens.values())


@settings(max_examples=50, deadline=None)
@given(text=st.lists(st.sampled_from(["<eos>", "<user>", "a", " film", "\u00e9", "\n"])).map("".join))
def test_offsets_point_at_the_text_of_each_token(text: str) -> None:
    for tokenizer in (ByteTokenizer(), BPE):
        for special in (True, False):
            ids, offsets = tokenizer.encode_offsets(text, special=special)
            assert "".join(text[a:b] for a, b in dict.fromkeys(offsets)) == text
            assert tokenizer.decode(ids, skip_special=False) == text
            count = sum(text.count(token) for token in ("<eos>", "<user>"))
            assert len([i for i in ids if i in tokenizer.special_tokens.values()]) == (count if special else 0)


def test_bytes_are_utf8() -> None:
    assert ByteTokenizer().encode("hé") == list("hé".encode())


def test_bpe_equals_transformers_reading_of_it() -> None:
    theirs = as_transformers(BPE)
    expected = [theirs(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in TEXTS]
    assert BPE.encode_batch(TEXTS) == expected
    with_special, _ = BPE.encode_offsets(TEXTS[3], special=True)
    assert with_special == theirs(TEXTS[3], add_special_tokens=False)["input_ids"]
    assert [BPE.decode(ids) for ids in expected] == [theirs.decode(i) for i in expected] == TEXTS


def test_bpe_learns_merges_splits_digits_and_is_deterministic() -> None:
    assert len(BPE.encode("the film")) < len("the film") // 2
    assert len(BPE.encode("345")) == 3
    assert trained_bpe().fingerprint() == BPE.fingerprint()
    assert trained_bpe(300).fingerprint() != BPE.fingerprint()


@pytest.mark.parametrize("kind", ["bytes", "bpe", "hf"])
def test_dict_and_folder_bring_the_tokenizer_back(kind: str, tmp_path: Path) -> None:
    if kind == "hf":
        as_transformers(BPE).save_pretrained(tmp_path / "hf")
    made = {"bytes": ByteTokenizer, "bpe": lambda: BPE, "hf": lambda: HFTokenizer(str(tmp_path / "hf"))}
    tokenizer: Tokenizer = made[kind]()
    data = tokenizer.to_dict()
    assert all(value is None or isinstance(value, (str, int)) for value in data.values())
    torch.save({"lit_palm": {"tokenizer": data}}, tmp_path / "x.ckpt")
    tokenizer.save(str(tmp_path / "saved"))
    tokenizer.save("memory://tokenizer-test")
    for back in (
        tokenizer_from_dict(json.loads(json.dumps(data))),
        load_tokenizer(str(tmp_path / "x.ckpt")),
        load_tokenizer(str(tmp_path / "saved")),
        load_tokenizer("memory://tokenizer-test"),
    ):
        assert back.same_as(tokenizer)
        assert back.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
        for name in ("vocab_size", "pad_id", "eos_id", "bos_id", "chat_template"):
            assert getattr(back, name) == getattr(tokenizer, name)
    fsspec.filesystem("memory").rm("/tokenizer-test", recursive=True)


def test_any_transformers_folder_loads(tmp_path: Path) -> None:
    theirs = as_transformers(BPE, unk_token="<user>")
    theirs.chat_template = "{{ messages[0]['content'] }}"
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_tokenizer(str(tmp_path / "hf"))
    assert isinstance(ours, HFTokenizer)
    expected = [theirs(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in TEXTS]
    assert ours.encode_batch(TEXTS) == expected
    assert (ours.vocab_size, ours.eos_id, ours.pad_id) == (len(theirs), theirs.eos_token_id, theirs.pad_token_id)
    assert ours.bos_id is None  # this one does not put its BOS in front of a text by itself
    assert HFTokenizer(str(tmp_path / "hf"), bos_token="<bos>").bos_id == theirs.bos_token_id
    assert ours.chat_template == theirs.chat_template
    assert int(ours.num_bytes()[ours.encode(TEXTS[2])].sum()) == len(TEXTS[2].encode())
    assert load_tokenizer(str(tmp_path / "hf" / "tokenizer.json")).encode_batch(TEXTS) == expected


def test_bytes_of_vocabularies_that_are_not_byte_level() -> None:
    text = "the film é is good, the film is not"
    spaced = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    pieces = ["<unk>", "<eos>", *(f"<0x{i:02X}>" for i in range(256))]
    spaced.train_from_iterator(
        [text.replace("é", "e")] * 5, trainers.BpeTrainer(vocab_size=300, special_tokens=pieces[:2])
    )
    vocabulary = {**spaced.get_vocab(), **{p: len(spaced.get_vocab()) + i for i, p in enumerate(pieces[2:])}}
    merges = [tuple(m) for m in json.loads(spaced.to_str())["model"]["merges"]]
    spaced.model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    words = Backend(models.WordPiece(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    words.train_from_iterator([text] * 5, trainers.WordPieceTrainer(vocab_size=60, special_tokens=["<unk>", "<eos>"]))
    for backend, extra in ((spaced, 0), (words, 2)):  # WordPiece: each word counts the space before it, "good" and ","
        tokenizer = HFTokenizer.from_json(backend.to_str(), "made here")
        ids = tokenizer.encode(text)
        assert int(tokenizer.num_bytes()[ids].sum()) == len(text.encode()) + extra


def test_a_tokenizer_without_padding_never_pads_with_eos(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=BPE.backend, eos_token="<eos>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert 0 <= tokenizer.pad_id < tokenizer.vocab_size
    assert tokenizer.pad_id != tokenizer.eos_id


def test_constructors_read_nothing() -> None:
    HFTokenizer("there/is-no-such-tokenizer")
    assert not BPETokenizer().trained


def test_faults_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = AutoTokenizer.from_pretrained

    def offline(name: str, **options: Any) -> Any:  # what a hub that cannot be reached does, without its retries
        if not Path(name).exists():
            raise OSError("offline")
        return real(name, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("{}")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    PreTrainedTokenizerFast(tokenizer_object=BPE.backend).save_pretrained(tmp_path / "no_eos")
    for name, words in {
        str(tmp_path / "missing.json"): "does not exist",
        str(tmp_path / "missing" / "folder"): "does not exist",
        str(tmp_path / "broken.json"): "not JSON",
        str(tmp_path / "other.json"): "neither",
        str(tmp_path / "plain.ckpt"): "carries no tokenizer",
        str(tmp_path / "pickle.ckpt"): "read safely",
        str(tmp_path / "no_eos"): "eos_token",
        "there/is-no-such-tokenizer": "no tokenizer",
    }.items():
        with pytest.raises(ValueError, match=words):
            load_tokenizer(name)
    with pytest.raises(ValueError, match="not trained"):
        BPETokenizer().encode("a")
    with pytest.raises(ValueError, match="at least 263"):
        BPETokenizer(100)
    with pytest.raises(ValueError, match="cannot be imported"):
        tokenizer_from_dict({"class_path": "no.such.Thing"})
    with pytest.raises(ValueError, match="not a lit_palm Tokenizer"):
        tokenizer_from_dict({"class_path": "os.system"})


def test_a_mismatch_is_refused_but_another_template_is_fine() -> None:
    retold = tokenizer_from_dict({**BPE.to_dict(), "chat_template": "{{ messages }}"})
    assert choose_tokenizer(retold, BPE) is retold
    assert choose_tokenizer(None, BPE) is BPE
    for other in ("bytes", trained_bpe(300), BPETokenizer(320)):
        with pytest.raises(ValueError, match="another tokenizer"):
            choose_tokenizer(other, BPE)
    with pytest.raises(ValueError, match="no tokenizer"):
        choose_tokenizer(None, None)
