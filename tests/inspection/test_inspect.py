"""`lit-palm data inspect`: what it says is what a run trains on; from YAML, from flags, from a reader and a path."""

from __future__ import annotations

import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml

from lit_palm.callbacks import LastCheckpoint
from lit_palm.cli import main
from lit_palm.data import PreferenceData
from lit_palm.data.readers import OASST
from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.inspection.measuring import Inspection, Lengths
from lit_palm.inspection.showing import show
from tests.data.readers.published import oasst, said
from tests.support import language_model, text_data, trainer, write_jsonl

Run = Callable[..., tuple[int, str, str]]
docstrings = functools.cache(docstring_parser.parse_from_object)


@pytest.fixture
def lit_palm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """lit_palm("inspect", ...) in a folder of its own -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(docstring_parser, "parse_from_object", docstrings)
    argv, environment = list(sys.argv), dict(os.environ)

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main(["data", *arguments])
        except SystemExit as exit:
            status = int(exit.code or 0)
        return status, *capsys.readouterr()

    yield run
    sys.argv[:] = argv
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]


def shown(run: Run, *arguments: str) -> str:
    status, out, err = run("inspect", *arguments)
    assert status == 0, err
    return out


def record(run: Run, *arguments: str) -> dict[str, Any]:
    return json.loads(shown(run, *arguments, "--json"))


def trees(path: str = "oasst.jsonl") -> str:
    rows = []
    for i in range(3):
        lang = {"lang": "de" if i == 2 else "en"}
        rows += [oasst(f"q{i}", None, f"Why {i}?", tree=str(i), **lang)]
        rows += [oasst(f"{a}{i}", f"q{i}", a, rank=r, tree=str(i), **lang) for r, a in enumerate(("Because.", "No."))]
    return write_jsonl(Path(path), rows)


def test_a_reader_and_a_path(lit_palm: Run) -> None:
    trees()
    out = shown(lit_palm, "OASST", "oasst.jsonl", "--data.reader.lang=[en]", "--data.tokenizer=bytes", "--rows", "1")
    assert out == (
        "PreferenceData, train: oasst.jsonl, read by OASST as preferences\n"
        "\n"
        "rows read   9\n"
        "used        2 prompts with 4 answers\n"
        "\n"
        "left out\n"
        "  the message is not in en (data.reader.lang): 1 row left out (oasst.jsonl:7)\n"
        "  a message is left out that this one follows: 2 rows left out (oasst.jsonl:8, 9)\n"
        "\n"
        "lengths                           min   median      p95      max\n"
        "  prompt, characters                6        6        6        6\n"
        "  answer, characters                3        8        8        8\n"
        "  row, tokens                      13       18       18       18\n"
        "  learned from, tokens              4        9        9        9\n"
        "\n"
        "rows, as trained on; learned from is what stands in \u27e6\u27e7\n"
        "\n"
        "[1] prompt 0, rank 0\n"
        "    <bos><user>Why 0?<assistant>\u27e6Because.<eos>\u27e7\n"
        "\n"
        "[2] prompt 0, rank 1\n"
        "    (the same prompt) \u27e6No.<eos>\u27e7\n"
    )


def test_what_is_said_is_what_a_run_trains_on(lit_palm: Run) -> None:
    """The same numbers and the same loss mask as the batches of the data module, which takes them from the cache."""
    source = trees()
    found = record(lit_palm, "OASST", source, "--data.tokenizer=bytes", "--rows=9")
    entries = sorted(Path("cache").iterdir())
    data = PreferenceData(train=source, reader=OASST(), tokenizer="bytes", shuffle=False)
    data.setup("fit")
    assert sorted(Path("cache").iterdir()) == entries, "a run finds it in the cache"
    (batch,) = data.train_dataloader()
    assert found["rows_trained_on"] == 3 and found["answers"] == len(batch.tokens) == len(found["rows"])
    lengths = batch["mask"].sum(1)
    assert found["tokens"]["row"] == {"least": lengths.min(), "median": 18, "p95": lengths.max(), "most": lengths.max()}
    for row, tokens, mask, learned in zip(found["rows"], batch.tokens, batch.mask, batch.loss_mask, strict=True):
        text = "".join(segment["text"] for segment in row["segments"])
        assert text == data.tokenizer.decode(tokens[mask].tolist(), skip_special=False)
        taught = "".join(segment["text"] for segment in row["segments"] if segment["learned"])
        assert taught == data.tokenizer.decode(tokens[learned].tolist(), skip_special=False)


def test_views_of_a_reader(lit_palm: Run) -> None:
    trees()
    found = record(lit_palm, "OASST", "oasst.jsonl", "--view", "demonstrations", "--data.tokenizer=bytes")
    assert found["data"] == "DemonstrationData" and found["used"] == 3
    assert [s["learned"] for s in found["rows"][0]["segments"]] == [False, True]
    found = record(lit_palm, "OASST", "oasst.jsonl", "--view=prompts", "--data.tokenizer=bytes")
    assert found["data"] == "PromptData" and found["rows"][0]["message_id"] == "q0"
    assert found["rows"][0]["segments"] == [{"text": "<user>Why 0?<assistant>", "learned": False}]


def config(model: Any, data: dict[str, Any]) -> None:
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 1}, "model": model, "data": data}))


def test_the_configuration_of_a_run_with_its_checkpoint(lit_palm: Run, tmp_path: Path) -> None:
    """The tokeniser, its template and the context come from the network's checkpoint."""
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer = ByteTokenizer(chat_template=template + "{% if add_generation_prompt %}[assistant]{% endif %}")
    run = trainer(tmp_path, callbacks=[LastCheckpoint("sft")], max_steps=1)
    run.fit(language_model(), datamodule=text_data(tmp_path, tokenizer=tokenizer))
    write_jsonl(Path("d.jsonl"), [{"messages": said("a", "b", "c", "d")}, {"messages": said("a", "b" * 80)}])
    model = {"class_path": "LitLanguageModel", "init_args": {"network": "sft/last.ckpt"}}
    config(model, {"class_path": "DemonstrationData", "init_args": {"train": "nothing.jsonl"}})
    found = record(lit_palm, "--config", "run.yaml", "--data.train=d.jsonl")
    assert found["limit"] == 64 and found["tokenizer"] == "ByteTokenizer" and not found["notes"]
    assert found["faults"] == ["longer than 64 tokens (data.overlong): 1 row cut (d.jsonl:2)"]
    segments = found["rows"][0]["segments"]
    assert [(s["text"], s["learned"]) for s in segments] == [
        ("<bos>[user]a[assistant]", False), ("b", True), ("[user]c[assistant]", False), ("d<eos>", True)
    ]  # fmt: skip


def test_a_checkpoint_that_is_not_there_yet_leaves_characters(lit_palm: Run) -> None:
    write_jsonl(Path("d.jsonl"), [{"prompt": "p" * i, "completion": " c"} for i in range(100)])
    model = {"class_path": "LitLanguageModel", "init_args": {"network": "later/last.ckpt"}}
    config(model, {"class_path": "DemonstrationData", "init_args": {"train": "d.jsonl"}})
    found = record(lit_palm, "--config=run.yaml")
    assert found["notes"][0].startswith("model.network is left aside: checkpoint 'later/last.ckpt' does not exist")
    # the row without a prompt is a conversation of its own
    assert found["characters"]["prompt"] == {"least": 1, "median": 50, "p95": 95, "most": 99}
    assert found["tokens"] == {} and found["rows_trained_on"] is None
    out = shown(lit_palm, "--config=run.yaml", "--rows=2")
    assert "rows, as read, before the chat template" in out and "[2]\n    p\u27e6 c\u27e7\n" in out


def test_without_a_tokenizer_messages_are_shown_with_what_the_assistant_says_marked(lit_palm: Run) -> None:
    trees()
    out = shown(lit_palm, "OASST", "oasst.jsonl", "--rows=1")
    assert out.endswith("[1] rank [0, 1]\n    user: Why 0?\n    \u27e6Because.\u27e7\n    \u27e6No.\u27e7\n")
    out = shown(lit_palm, "OASST", "oasst.jsonl", "--view=demonstrations", "--rows=1")
    assert out.endswith("[1]\n    user: Why 0?\n    assistant: \u27e6Because.\u27e7\n")


def test_a_tokenizer_that_a_run_would_train_is_not_trained(lit_palm: Run) -> None:
    write_jsonl(Path("t.jsonl"), [{"text": "one two"}, {"text": "three"}])
    tokenizer = {"class_path": "BPETokenizer", "init_args": {"vocab_size": 300}}
    model = {"class_path": "LitLanguageModel", "init_args": {"network": {"class_path": "PaLMConfig"}}}
    config(model, {"class_path": "TextData", "init_args": {"train": "t.jsonl", "tokenizer": tokenizer}})
    found = record(lit_palm, "--config=run.yaml")
    assert "not trained yet" in found["notes"][0] and found["characters"]["document"]["most"] == 7
    assert not Path("cache").exists()


def test_packed_text_and_other_stages(lit_palm: Run) -> None:
    write_jsonl(Path("t.jsonl"), [{"text": "one two"}, {"text": "three"}, {"text": "four"}])
    flags = ["--data=TextData", "--data.train=t.jsonl", "--data.tokenizer=bytes", "--data.sequence_length=64"]
    found = record(lit_palm, *flags)
    assert found["used"] == 3 and found["rows_trained_on"] == 1 and found["limit"] == 64
    status, _, err = lit_palm("inspect", *flags, "--stage", "validation")
    assert status == 2 and "data.validation is not set" in err
    found = record(lit_palm, *flags, "--data.validation=t.jsonl", "--stage", "validation", "--data.eval_limit=2")
    assert found["stage"] == "validation" and found["rows_read"] == 2


def test_a_fault_that_would_stop_the_run_stops_it_here(lit_palm: Run) -> None:
    Path("oasst.jsonl").write_text(json.dumps({**oasst("q", None, "Q"), "role": "human"}) + "\n")
    mistakes = {
        ("inspect", "OASST", "oasst.jsonl"): "oasst.jsonl:1: the key 'role' is 'human', neither 'prompter'",
        ("inspect", "OASST", "none.jsonl"): "none.jsonl: there is no such file",
        ("inspect", "OASIS", "oasst.jsonl"): "there is no reader 'OASIS': name one of Alpaca, GSM8K, HHRLHF",
        ("inspect", "Reader", "oasst.jsonl"): "there is no reader 'Reader'",
        ("inspect", "my.Own", "oasst.jsonl"): "the reader 'my.Own' cannot be imported (No module named 'my')",
        ("inspect", "OASST", "oasst.jsonl", "more"): "'more' is neither",
        ("inspect", "Alpaca", "x", "--view", "preferences"): "--view preferences: Alpaca has demonstrations, prompts",
        ("inspect", "OASST", "oasst.jsonl", "--data.reader.language=[en]"): "did you mean lang? OASST takes version",
        ("inspect", "OASST", "oasst.jsonl", "--rows", "-1"): "--rows is -1",
        ("inspect", "--view", "prompts"): "name the reader first",
        ("inspect",): "name the data: --config FILE",
        ("look",): "there is `lit-palm data inspect`",
    }
    for arguments, words in mistakes.items():
        status, _, err = lit_palm(*arguments)
        last = err.splitlines()[-1]
        assert status == 2 and last.startswith("lit-palm: error: ") and words in last, (arguments, err)
        assert "Traceback" not in err


def test_what_stops_a_run_at_its_tokens_comes_after_what_is_known(lit_palm: Run) -> None:
    """The lengths are what one needs to choose a limit by."""
    write_jsonl(Path("x.jsonl"), [{"prompt": "p" * n, "chosen": "a", "rejected": "b"} for n in (1, 60)])
    flags = ["--data=PreferenceData", "--data.train=x.jsonl", "--data.tokenizer=bytes", "--data.max_length=32"]
    status, out, err = lit_palm("inspect", *flags, "--data.overlong=error")
    assert status == 2 and "x.jsonl:2: an answer with its prompt has 63 tokens" in err.splitlines()[-1]
    assert "used        2 prompts with 4 answers" in out and "prompt, characters                1       60" in out
    status, out, _ = lit_palm("inspect", *flags, "--data.overlong=error", "--json")
    assert status == 2 and "63 tokens" in json.loads(out)["error"]
    out = shown(lit_palm, *flags, "--data.overlong=drop")
    assert "parsed      2 prompts with 4 answers\ntrained on  1 of them\n" in out
    assert "faults\n  longer than 32 tokens (data.overlong): 1 row dropped (x.jsonl:2)\n" in out


def test_a_reader_of_ones_own_by_its_dotted_name(lit_palm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.getcwd())
    Path("own_reader.py").write_text(
        "from lit_palm.data.readers import Hub, Reader\n"
        "from lit_palm.data.sources import Row\n"
        "class Lines(Reader):\n"
        '    """Texts.\n\n    Args:\n        shout: in capitals.\n    """\n'
        "    def __init__(self, shout: bool = False) -> None:\n        self.shout = shout\n"
        "    hub = property(lambda self: Hub('someone/lines'))\n"
        "    def prompts(self, rows, drop):\n"
        "        for row in rows:\n"
        "            text = self.field(row, 'line', str)\n"
        "            yield Row(row.where, {'prompt': text.upper() if self.shout else text})\n"
    )
    write_jsonl(Path("x.jsonl"), [{"line": "hello"}])
    found = record(lit_palm, "own_reader.Lines", "x.jsonl", "--data.reader.shout=true")
    assert found["reader"] == "Lines" and found["rows"][0]["segments"][0]["text"] == "HELLO"


def test_long_rows_are_shown_by_their_ends_and_brackets_suit_the_terminal(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "p" * 1000, "chosen": "good", "rejected": "bad", "margin": 2}])
    data = PreferenceData(train=path, tokenizer="bytes", cache_dir=str(tmp_path))
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show(Inspection(data, None, "train"), 1, out)
    out.seek(0)
    text = out.read()
    assert "p" * 100 in text and "p" * 400 not in text and "characters) ... " in text
    assert "[1] prompt 0, rank 0, margin 2\n" in text and "[[good<eos>]]\n" in text


def test_lengths_are_values_that_occur() -> None:
    assert Lengths.of([5]) == (5, 5, 5, 5)
    assert Lengths.of(list(range(100, 0, -1))) == (1, 51, 96, 100)


def test_streams_are_not_read_to_their_end(lit_palm: Run) -> None:
    status, _, err = lit_palm("inspect", "--data=StreamingTextData", "--data.train=x.jsonl")
    assert status == 2 and "inspect one of its sources with --data=TextData" in err
