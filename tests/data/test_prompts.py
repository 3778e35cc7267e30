"""PromptData: prompts with the columns that rewards read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lit_palm.data.prompts import PromptData
from lit_palm.data.tokenizers import ByteTokenizer, Tokenizer

TOKENIZER = ByteTokenizer()
ROWS = [
    {"prompt": "1+1=", "answer": 2},
    {"prompt": [{"role": "user", "content": "2+2"}], "answer": 4, "hint": "even"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
    {"prompt": ""},
]


def load(path: str, module: Any = None, **options: Any) -> PromptData:
    data = PromptData(train=path, validation=path, tokenizer=TOKENIZER, batch_size=3, **options)
    if module is not None:
        # an exception interrupted the fifth batch of the first epoch
        progress = SimpleNamespace(current=SimpleNamespace(ready=5, processed=4), is_last_batch=False)
        epoch = SimpleNamespace(current=SimpleNamespace(ready=1, started=1, processed=0))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress), epoch_progress=epoch)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            lightning_module=module, fit_loop=loop, num_training_batches=8, accumulate_grad_batches=1
        )
    data.setup("fit")
    return data


def test_rows_keep_every_column(write: Any) -> None:
    prompts = load(write("x.jsonl", ROWS)).prompts("train")
    assert len(prompts) == 4
    texts = [TOKENIZER.decode(p["prompt_ids"].tolist(), skip_special=False) for p in prompts]
    assert texts == ["<bos>1+1=", "<bos><user>2+2<assistant>", "<bos><user>hi<assistant>", "<bos>"]
    assert [p["prompt"] for p in prompts] == ["1+1=", "<user>2+2<assistant>", "<user>hi<assistant>", ""]
    assert prompts[0]["columns"] == {"answer": 2, "prompt": None, "hint": None, "messages": None}
    assert prompts[-3]["columns"]["prompt"] == ROWS[1]["prompt"]
    assert [p["prompt"] for p in prompts[2:]] == ["<user>hi<assistant>", ""]


def test_validation_batches(write: Any) -> None:
    data = load(write("x.jsonl", ROWS))
    first, second = data.val_dataloader()
    assert first["row"].tolist() + second["row"].tolist() == [0, 1, 2, 3]
    assert first["columns"]["answer"] == [2, 4, None] and len(first["prompts"]) == 3
    blank = data.val_dataloader().collate(np.array([1]), True)
    assert blank["row"].tolist() == [-1]


def test_training_asks_the_module_for_rollouts_and_keeps_their_state(write: Any) -> None:
    class Loader:
        position = 0

        def snapshot(self, in_flight: int = 0, over: bool = False) -> dict[str, Any]:
            return {"position": self.position - in_flight}

        def restore(self, state: dict[str, Any]) -> None:
            self.position = state["position"]

    path = write("x.jsonl", ROWS)
    module = SimpleNamespace(rollout_loader=lambda prompts: Loader())
    data = load(path, module)
    assert data.state_dict() == {"rollouts": {}}
    data.train_dataloader().position = 5
    saved = data.state_dict()
    assert saved == {"rollouts": {"position": 4}}
    again = load(path, module)
    again.load_state_dict(saved)  # Lightning restores before it asks for the loader
    assert again.state_dict() == saved
    assert again.train_dataloader().position == 4
    with pytest.raises(ValueError, match="makes no rollouts"):
        load(path, SimpleNamespace()).train_dataloader()


def test_a_prompt_that_is_too_long_is_named(write: Any) -> None:
    path = write("x.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: this prompt has 6 tokens, more than data\.max_prompt_length 5"):
        load(path, max_prompt_length=5)
    with pytest.raises(ValueError, match=r"x\.jsonl:2: this prompt has 6 tokens, more than the network's context"):
        load(path, SimpleNamespace(context_length=6))
    with pytest.raises(ValueError, match="the network's context is 10 tokens"):
        load(path, SimpleNamespace(context_length=10), max_prompt_length=10)
    load(path, SimpleNamespace(context_length=7))


def test_prompts_that_are_too_long_are_dropped_and_counted_where_asked_for(write: Any) -> None:
    path = write("x.jsonl", ROWS)
    everything = load(path).prompts()
    with pytest.warns(UserWarning, match=r"longer than 5 tokens \(data\.overlong\): 1 row dropped \(.*x\.jsonl:2\)"):
        data = load(path, max_prompt_length=5, overlong="drop")
    left = data.prompts()
    assert [row["prompt"] for row in left] == [r["prompt"] for i, r in enumerate(everything) if i != 1]
    assert left.lengths.tolist() == [len(row["prompt_ids"]) for row in left] and max(left.lengths) <= 5
    batch = next(iter(data.loader("train", 2)))
    assert batch["row"].tolist() == [0, 1] and batch["prompts"] == [row["prompt"] for row in left[:2]]
    with pytest.raises(ValueError, match=r"no row is left of the data; longer than 2 tokens"):
        load(write("y.jsonl", ROWS[1:2]), SimpleNamespace(context_length=3), overlong="drop")


def test_an_empty_prompt_needs_a_beginning(write: Any) -> None:
    class NoBos(ByteTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.bos_id = None  # type: ignore[assignment]

    tokenizer: Tokenizer = NoBos()
    data = PromptData(train=write("x.jsonl", ROWS), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"x\.jsonl:4: the prompt is empty"):
        data.setup("fit")
