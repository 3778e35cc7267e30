"""A folder as `transformers` writes it, served and talked to as it stands: its tokeniser, its template, its names."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest
import torch

from lit_palm.cli import main
from tests.families import tokenizer, write_family
from tests.serve.conftest import Server

pytest.importorskip("litserve")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("hub") / "tiny-llama", "llama")


def greedy(folder: Path, ids: list[int], count: int) -> list[int]:
    """What transformers continues with."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    new: list[int] = out[0, len(ids) :].tolist()
    return new


def test_the_server_says_what_transformers_says(folder: Path) -> None:
    """Mixed lengths at once, through the chat template of the folder."""
    server = Server(folder, "--max_batch_size", "3")
    try:
        client, theirs = server.client(), tokenizer()
        assert [model.id for model in client.models.list()] == ["tiny-llama"]
        questions = [
            "cat",
            "the cat sat on a warm mat and saw nine small birds",
            "a",
            "fly over tall trees",
            "nine nine",
        ]
        said: dict[str, list[int]] = {}

        def ask(question: str) -> None:
            got = client.chat.completions.create(
                model="tiny-llama", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=20,
                extra_body={"return_token_ids": True},
            )  # fmt: skip
            said[question] = got.choices[0].token_ids
            text = theirs.decode(got.choices[0].token_ids, skip_special_tokens=True)
            assert got.choices[0].message.content == text

        threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for question in questions:
            ids = theirs.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            assert said[question] == greedy(folder, ids, 20), question
        assert server.end() == 0
    finally:
        server.kill()


def test_chat_says_it_too(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tokenizer()
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n"))
    assert main(["chat", str(folder), "--temperature", "0", "--max_new_tokens", "15"]) == 0
    ids = theirs.apply_chat_template(
        [{"role": "user", "content": "the cat"}], add_generation_prompt=True, return_dict=False
    )
    expected = theirs.decode(greedy(folder, ids, 15), skip_special_tokens=True)
    assert capsys.readouterr().out == expected + "\n"
