"""GSM8K: word problems as prompts with an answer that is checked, and as demonstrations; PPO on them end to end."""

from __future__ import annotations

from typing import Any

import pytest

from lit_palm.data.readers import GSM8K
from lit_palm.rollout.rewards.gsm8k import published_answer
from tests.data.readers.published import columns, gsm8k, read, said


def test_the_final_number_is_the_answer_and_the_solution_goes_along(write: Any) -> None:
    path = write("x.jsonl", [gsm8k(), gsm8k("And now?", "1,234")])
    first, second = columns(GSM8K(), "prompts", path)
    solution = "She sold 48/2 = 24 in May.\nAnd more.\n#### 72"
    assert first == {"prompt": said("How many clips?"), "answer": "72", "solution": solution}
    assert second["answer"] == "1234" == published_answer(gsm8k("", "1,234")["answer"])
    assert columns(GSM8K(), "demonstrations", path)[0] == {
        "prompt": said("How many clips?"),
        "completion": [{"role": "assistant", "content": solution}],
    }


def test_options_change_what_is_written(write: Any) -> None:
    path = write("x.jsonl", [gsm8k()])
    (row,) = columns(GSM8K(calculator=True, chat=False), "demonstrations", path)
    assert row["prompt"] == "Question: How many clips?\nAnswer:"
    assert row["completion"].startswith(" She sold 48/2 = <<48/2=24>>24 in May.")
    (row,) = columns(GSM8K(system="End with #### and the number."), "prompts", path)
    assert row["prompt"][0] == {"role": "system", "content": "End with #### and the number."}
    assert GSM8K("socratic").hub.config == "socratic"
    with pytest.raises(ValueError, match=r"needs data\.reader\.chat"):
        GSM8K(system="s", chat=False)


def test_a_solution_without_its_number_is_named(write: Any) -> None:
    for wrong in ("seventy-two", "####72"):
        path = write("x.jsonl", [gsm8k(), {"question": "q", "answer": wrong}])
        with pytest.raises(ValueError, match=r"x\.jsonl:2: the key 'answer' does not end in '#### NUMBER'"):
            read(GSM8K(), "prompts", path)
    with pytest.raises(ValueError, match=r"y\.jsonl:1: the key 'question' is missing"):
        read(GSM8K(), "prompts", write("y.jsonl", [{"answer": "#### 1"}]))
