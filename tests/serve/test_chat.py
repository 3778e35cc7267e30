"""`lit-palm chat` from a pipe and on a terminal: what is said, remembered, saved, stopped and refused."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm.cli import main
from lit_palm.data import DemonstrationData
from lit_palm.data.templates import encode_chat
from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.modules.weights import load_network
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.sampling import Sampling, row_seeds
from lit_palm.serve.chat import Chat
from tests.serve.conftest import Offline, write_checkpoint
from tests.support import make_stages

Messages = list[dict[str, str]]


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: Path, said: str, *arguments: str
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a chat whose stdin is a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    capsys.readouterr()
    status = main(["chat", str(checkpoint), *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def answer(offline: Offline, messages: Messages, turn: int, seed: int = 0, **sampling: Any) -> str:
    """What the network says at this turn, without the chat."""
    ids = encode_chat(offline.tokenizer, messages, add_generation_prompt=True)[0]
    got = CachedEngine().generate(
        offline.network,
        [torch.tensor(ids)],
        Sampling(**sampling),
        row_seeds(seed, turn, torch.arange(1)),
        pad_id=offline.tokenizer.pad_id,
        eos_id=offline.tokenizer.eos_id,
        decode=offline.tokenizer.decode,
    )
    return offline.tokenizer.decode(got.completions[0].tolist())


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_turns_history_and_files(
    checkpoint: Path, offline: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "new" / "chat.jsonl"
    said = f"the cat\n\n//reset\n/save {file}\n/reset\nnine\n/save {file}\n/exit\nnever read\n"
    options = ["--system", "Be kind.", "--max_new_tokens", "9", "--temperature", "0.7", "--seed", "5"]
    status, out, err = talk(monkeypatch, capsys, checkpoint, said, *options)
    system, sampling = {"role": "system", "content": "Be kind."}, {"max_new_tokens": 9, "temperature": 0.7, "seed": 5}
    first: Messages = [system, user("the cat")]
    first.append({"role": "assistant", "content": answer(offline, first, 0, **sampling)})
    first.append(user("/reset"))
    first.append({"role": "assistant", "content": answer(offline, first, 1, **sampling)})
    second: Messages = [system, user("nine")]
    second.append({"role": "assistant", "content": answer(offline, second, 2, **sampling)})
    assert status == 0
    assert out == "".join(f"{messages[i]['content']}\n" for messages, i in ((first, 2), (first, 4), (second, 2)))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"messages": first}, {"messages": second}]
    assert "saved as row 1" in err and "saved as row 2" in err and "a new conversation" in err
    assert [path.name for path in file.parent.iterdir()] == ["chat.jsonl"]
    # what was saved can be learned from
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    data = DemonstrationData(train=str(file), tokenizer=offline.tokenizer, batch_size=2)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["loss_mask"].sum() > 20


def test_commands(
    checkpoint: Path, offline: Offline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    said = f"/help\n/nonsense\n/undo\n/save\n/save {tmp_path}/x\nthe cat\n/undo\nnine\n/save {tmp_path}\n/system\n"
    said += "/system Be brief.\n/system\nthe cat\n"
    status, out, err = talk(monkeypatch, capsys, checkpoint, said, "--max_new_tokens", "5")
    answers = [
        answer(offline, [user("the cat")], 0, max_new_tokens=5),
        answer(offline, [user("nine")], 1, max_new_tokens=5),
    ]
    answers.append(answer(offline, [{"role": "system", "content": "Be brief."}, user("the cat")], 2, max_new_tokens=5))
    assert status == 0 and out == "".join(f"{text}\n" for text in answers)
    for said in ("/save FILE", "there is no /nonsense", "nothing to take back", "name a file", "nothing to save",
                 "taken back", "not saved", "system prompt: none", "system prompt: Be brief."):  # fmt: skip
        assert said in err


def test_a_stop_text_is_not_part_of_the_answer(
    checkpoint: Path, offline: Offline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = answer(offline, [user("the cat")], 0, max_new_tokens=60)
    stop = next(c for c in whole[10:] if c.isascii() and c.isprintable() and c not in "\"' \\" and whole.index(c) > 5)
    _, out, _ = talk(
        monkeypatch, capsys, checkpoint, "the cat\n", "--max_new_tokens", "60", "--stop", json.dumps([stop])
    )
    assert out == whole[: whole.index(stop)] + "\n"


def test_the_oldest_turns_leave_when_the_context_is_full(
    checkpoint: Path, offline: Offline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # 256 tokens of context; an answer may need a quarter of it
    said = "".join(f"{letter * 60}\n" for letter in "abcde")
    status, out, err = talk(monkeypatch, capsys, checkpoint, said, "--max_new_tokens", "12", "--system", "S")
    assert status == 0 and len(out) > 5
    assert "[the context of 256 tokens is full: the oldest 2 turns are left out]" in err
    assert err.count("turns are left out") >= 2
    # the last answer is that to what was left
    chat = Chat(offline.network, offline.tokenizer, Sampling(max_new_tokens=12), system="S")
    for letter in "abcde":
        chat.ask(letter * 60, lambda piece: None)
    assert chat.dropped >= 4
    kept = [chat.messages[0], *chat.turns[chat.dropped : -1]]
    assert chat.turns[-1]["content"] == answer(offline, kept, 4, max_new_tokens=12) and len(chat.turns) == 10
    with pytest.raises(ValueError, match="ask a shorter one"):
        chat.ask("x" * 300, lambda piece: None)
    assert len(chat.turns) == 10  # a question that was not answered is not remembered
    status, _, err = talk(monkeypatch, capsys, checkpoint, "x" * 300)
    assert status == 2 and "the network reads at most 256: ask a shorter one" in err


def test_an_interrupted_answer_is_kept_as_far_as_it_came(offline: Offline, capsys: pytest.CaptureFixture[str]) -> None:
    chat, pieces = Chat(offline.network, offline.tokenizer, Sampling(max_new_tokens=80)), []

    def show(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    chat.ask("the cat", show)
    assert chat.turns[-1] == {"role": "assistant", "content": "".join(pieces)} and len(pieces) == 3
    assert "[stopped]" in capsys.readouterr().err
    chat.network, network = None, chat.network  # type: ignore[assignment]

    class Impatient:
        config = network.config

        def modules(self) -> list[Any]:
            raise KeyboardInterrupt

    chat.network = Impatient()  # type: ignore[assignment]
    assert chat.ask("again", show) == "" and len(chat.turns) == 2  # nothing was said: the question is taken back


def test_ctrl_c_ends_the_answer_and_not_the_chat(tmp_path: Path) -> None:
    """A real signal to a real process, in the midst of an answer that would take seconds."""
    checkpoint = write_checkpoint(tmp_path / "slow", d_model=128, num_layers=12, max_length=4096)
    process = subprocess.Popen(
        [sys.executable, "-m", "lit_palm", "chat", str(checkpoint), "--max_new_tokens=4000", "--min_new_tokens=4000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        # a shell has what it starts in the background ignore the signal, tests included
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(b"the cat\n")
    process.stdin.flush()
    assert process.stdout.read(8)  # it is on its way
    process.send_signal(signal.SIGINT)
    process.stdin.write(b"/undo\n/undo\n/exit\n")
    process.stdin.close()
    err = process.stderr.read().decode()
    process.stdout.read()
    assert process.wait(60) == 0, err
    assert "[stopped]" in err and err.index("[stopped]") < err.index("[taken back]") < err.index("nothing to take back")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_PALM_CACHE", str(folder / "cache"))
        return make_stages(folder)


def test_the_best_of_several_by_a_reward_model(
    stages: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = talk(
        monkeypatch, capsys, stages["policy"], "cat\n", "--best_of", "5", "--reward", str(stages["reward_model"]),
        "--max_new_tokens", "8",
    )  # fmt: skip
    offline = Offline(stages["policy"])
    reward: Any = load_network(stages["reward_model"], "reward").eval()
    ids = encode_chat(offline.tokenizer, [user("cat")], add_generation_prompt=True)[0]
    answers = offline.generate(ids, 0, 5, max_new_tokens=8).completions
    with torch.no_grad():
        scores = [float(reward(torch.cat((torch.tensor(ids), a))[None])[0, -1]) for a in answers]
    best = max(range(5), key=lambda i: scores[i])
    assert status == 0 and out == offline.tokenizer.decode(answers[best].tolist()) + "\n"
    ranked = sorted(scores, reverse=True)
    assert f"best of 5: reward {ranked[0]:.3f}; the others {', '.join(f'{s:.3f}' for s in ranked[1:])}]" in err
    assert ranked[0] > ranked[1]


def test_what_cannot_be_talked_to_is_one_line(
    checkpoint: Path, stages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cases: list[tuple[Path, list[str], str]] = [
        (tmp_path / "none.ckpt", [], "does not exist"),
        (checkpoint, ["--best_of", "3"], "go together"),
        (checkpoint, ["--reward", str(stages["reward_model"])], "go together"),
        (checkpoint, ["--temperature", "-1"], "temperature"),
        (checkpoint, ["--nonsense", "1"], "nonsense"),
        (stages["reward_model"], [], "none of which can be used as policy"),
        (stages["policy"], ["--best_of", "2", "--reward", str(checkpoint)], "none of which can be used as reward"),
    ]
    for path, arguments, fault in cases:
        status, out, err = talk(monkeypatch, capsys, path, "hi\n", *arguments)
        assert (status, out) == (2, "") and fault in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    "template, fault",
    [
        ("{{ raise_exception('system prompts are not for me') if messages[0].role == 'system' }}",
         "the chat template does not take these messages: system prompts are not for me"),
        ("{{ messages[0]['content'] // 2 }}", "the chat template does not take these messages"),
        ("{% for m in messages %}", "the chat template is not valid Jinja"),
    ],
)  # fmt: skip
def test_a_template_that_raises_is_one_line_with_what_it_says(
    checkpoint: Path, tmp_path: Path, template: str, fault: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stored = torch.load(checkpoint, weights_only=True)
    stored["lit_palm"]["tokenizer"] = ByteTokenizer(chat_template=template).to_dict()
    torch.save(stored, tmp_path / "odd.ckpt")
    status, out, err = talk(monkeypatch, capsys, tmp_path / "odd.ckpt", "hi\n", "--system", "Be kind.")
    assert (status, out) == (2, "") and fault in err and "odd.ckpt" in err and len(err.strip().splitlines()) == 1


def test_on_a_terminal_a_mistake_does_not_end_the_chat_and_nothing_steers_it(
    offline: Offline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lit_palm.serve import terminal

    chat = Chat(offline.network, offline.tokenizer, Sampling(max_new_tokens=4))
    said = iter(["x" * 300, "the cat"])
    interrupted: list[bool] = []

    def ask(prompt: str) -> str:
        assert prompt == "> "
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    terminal.converse(chat, terminal=True)
    err = capsys.readouterr().err
    assert "ctrl-d leaves" in err and "ask a shorter one" in err and len(chat.turns) == 2
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    terminal.show("a\x1b[2Jb\ttab\nline\x9b31m\r")
    assert capsys.readouterr().out == "a\\x1b[2Jb\ttab\nline\\x9b31m\\x0d"
