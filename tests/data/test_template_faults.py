"""A chat template that raises is one error that names the row, the tokenizer and the template, whatever it raises."""

from __future__ import annotations

from typing import Any

import pytest

from lit_palm.data import DemonstrationData, PreferenceData, PromptData
from lit_palm.data.readers import OASST
from lit_palm.data.tokenizers import ByteTokenizer
from tests.data.readers.published import oasst, said

FAULTS = {
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ 1 / 0 }}": "ZeroDivisionError: division by zero",
    "{{ messages[0].content.nothing.more }}": "has no attribute 'nothing'",
    "{{ messages[0].content + 1 }}": "TypeError",
    "{% for i in range(10000000) %}x{% endfor %}": "OverflowError: Range too big",
    "{{ messages.__class__.__mro__ }}": "unsafe",
}


@pytest.mark.parametrize("template", FAULTS)
def test_a_template_that_raises_names_row_tokenizer_and_template(template: str, write: Any) -> None:
    path = write("x.jsonl", [{"messages": said("a", "b")}])
    text = "{% if messages %}" + template + "{% endif %}"
    data = DemonstrationData(train=path, tokenizer=ByteTokenizer(chat_template=text))
    with pytest.raises(ValueError) as caught:
        data.setup("fit")
    message = str(caught.value)
    assert "x.jsonl:1: the chat template does not take these messages: " in message and FAULTS[template] in message
    assert "(the template of ByteTokenizer, " in message and "{% if messages %}{" in message and "\n" not in message


def test_rows_that_a_reader_made_are_named_by_the_line_they_came_from(write: Any) -> None:
    path = write("x.jsonl", [oasst("q", None, "Q"), oasst("a", "q", "A", rank=0), oasst("b", "q", "B", rank=1)])
    tokenizer = ByteTokenizer(chat_template="{% if messages | length == 2 %}{{ raise_exception('two') }}{% endif %}x")
    with pytest.raises(ValueError, match=r"x\.jsonl:1 \(message q\): the chat template .*: two \(the template of Byte"):
        PreferenceData(train=path, reader=OASST(), tokenizer=tokenizer).setup("fit")
    prompts = ByteTokenizer(chat_template="{{ raise_exception('none') }}")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the chat template .*: none"):
        PromptData(train=path, reader=OASST(), tokenizer=prompts).setup("fit")
