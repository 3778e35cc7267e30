"""What requests may hold, as in OpenAI's interface, and how they are refused.

A request is checked whole before anything runs: every fault is `{"error": {"message", "type", "param", "code"}}` with
the status that OpenAI's clients turn into the right exception. What changes the answer and is not supported is refused
by name rather than passed over. `top_k`, `min_p`, `repetition_penalty`, `min_tokens` and `return_token_ids` are
additions that other servers of open models have too (`extra_body` in the official client); `row_seeds` is our own.
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Protocol, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lit_palm.rollout.sampling import Sampling, row_seeds

__all__ = ["APIError", "ChatRequest", "CompletionRequest", "parse", "sampling_of"]

MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP, MAX_PROMPTS, MAX_FIELDS = 16, 256, 20, 1024, 100


class APIError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: for people.
        param: the field at fault.
        code: for programs.
        headers: to go with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = {429: "rate_limit_error"}.get(self.status, "server_error" if self.status >= 500 else "")
        return {
            "error": {
                "message": self.message,
                "type": kind or "invalid_request_error",
                "param": self.param,
                "code": self.code,
            }
        }


def _clean(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted; nothing is padded."""


Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Request(Strict):
    """What both kinds of request share. None means the default everywhere, as clients send it."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """-1 and 0: no such filter."""
    min_p: float | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    return_token_ids: bool | None = None
    logit_bias: Any = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None

    def refuse_unsupported(self) -> None:
        """Raise `APIError` for what would change the answer."""
        if self.logit_bias:
            raise APIError(400, "logit_bias is not supported", "logit_bias", "unsupported_parameter")

    def seeds(self, count: int) -> list[int]:
        """One for each completion."""
        seed = fresh_seed() if self.seed is None else self.seed
        return [int(one) for one in row_seeds(seed, 0, torch.arange(count)).tolist()]

    @property
    def stops(self) -> list[str]:
        """Stop texts as a list."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MAX_STOPS or any(len(s) > MAX_STOP_LENGTH for s in stops):
            raise APIError(400, f"stop takes up to {MAX_STOPS} texts of {MAX_STOP_LENGTH} characters", "stop")
        return [_clean(s) for s in stops]


class ChatRequest(_Request):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    web_search_options: Any = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        unsupported = {
            "tools": bool(self.tools),
            "tool_choice": self.tool_choice not in (None, "none", "auto"),
            "functions": bool(self.functions),
            "function_call": self.function_call not in (None, "none", "auto"),
            "response_format": (self.response_format or {}).get("type", "text") != "text",
            "modalities": self.modalities not in (None, ["text"]),
            "audio": self.audio is not None,
            "web_search_options": self.web_search_options is not None,
        }
        for name, there in unsupported.items():
            if there:
                raise APIError(400, f"{name} is not supported", name, "unsupported_parameter")
        if self.top_logprobs and not self.logprobs:
            raise APIError(400, "top_logprobs needs logprobs to be true", "top_logprobs")

    def chat(self) -> list[dict[str, Any]]:
        """The messages as a template takes them: contents in parts are joined to one text."""
        messages = []
        for number, message in enumerate(self.messages):
            where = f"messages[{number}]"
            if not isinstance(message.get("role"), str):
                raise APIError(400, f"{where} needs a role", f"{where}.role")
            content = message.get("content")
            if isinstance(content, list):
                parts = [p.get("text") if isinstance(p, dict) and p.get("type") == "text" else None for p in content]
                texts = [part for part in parts if isinstance(part, str)]
                if len(texts) < len(parts):
                    raise APIError(400, f"{where}: only parts of the type text are supported", f"{where}.content")
                content = "".join(texts)
            if content is None and message["role"] == "assistant":
                content = ""
            if not isinstance(content, str):
                raise APIError(400, f"{where} needs a content that is a string", f"{where}.content")
            messages.append({"role": _clean(message["role"]), "content": _clean(content)})
        return messages


# a body of faults must not keep others waiting: the first one is enough
Texts = Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS)]
Ids = Annotated[list[int], Field(fail_fast=True)]
ManyIds = Annotated[list[Ids], Field(fail_fast=True, max_length=MAX_PROMPTS)]


class CompletionRequest(_Request):
    """The body of `/v1/completions`."""

    prompt: str | Texts | Ids | ManyIds
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    row_seeds: Annotated[list[Seed], Field(fail_fast=True, max_length=MAX_PROMPTS)] | None = None
    """One for each completion, in the order of the choices, instead of those that come from `seed`."""
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.suffix:
            raise APIError(400, "suffix is not supported", "suffix", "unsupported_parameter")
        if self.best_of not in (None, self.n or 1):
            raise APIError(400, "best_of is not supported", "best_of", "unsupported_parameter")
        if self.row_seeds is not None and self.seed is not None:
            raise APIError(400, "give seed or row_seeds, not both", "row_seeds", "invalid_value")
        if self.echo and self.logprobs is not None:
            raise APIError(400, "echo together with logprobs is not supported", "echo", "unsupported_parameter")

    def seeds(self, count: int) -> list[int]:
        given = self.row_seeds
        if given is None:
            return super().seeds(count)
        if len(given) != count:
            message = f"row_seeds has {len(given)} seeds for {count} completions"
            raise APIError(400, message, "row_seeds", "invalid_value")
        return given

    def prompts(self) -> list[str | list[int]]:
        """Each as a text or as ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt:
            raise APIError(400, "prompt is empty", "prompt")
        return [_clean(p) if isinstance(p, str) else p for p in prompt]


class _Checked(Protocol):
    @classmethod
    def model_validate(cls, obj: Any) -> Self: ...
    def refuse_unsupported(self) -> None: ...


R = TypeVar("R", bound=_Checked)


def parse(kind: type[R], body: bytes) -> R:
    """The request in a body.

    Raises:
        APIError: 400, naming what is wrong.
    """
    try:
        data = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise APIError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise APIError(400, "the body is not a JSON object", code="invalid_json")
    if len(data) > MAX_FIELDS:
        raise APIError(400, f"the body has {len(data)} fields", code="unknown_parameter")
    try:
        request = kind.model_validate(data)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise APIError(400, "the body is nested too deeply", code="invalid_json") from error
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        path = [str(part) for part in first["loc"]]
        param = path[0] if path else None
        if first["type"] == "extra_forbidden":
            message = f"unknown parameter {'.'.join(path)!r}"
            raise APIError(400, message, ".".join(path), "unknown_parameter") from error
        raise APIError(400, f"{param}: {first['msg']}", param, "invalid_value") from error
    request.refuse_unsupported()
    return request


def sampling_of(request: _Request, max_new_tokens: int) -> Sampling:
    """How a request wants its tokens drawn.

    Raises:
        APIError: 400, naming the field that is out of range.
    """

    def given(name: str, default: Any) -> Any:
        value = getattr(request, name)
        return default if value is None else value

    try:
        return Sampling(
            temperature=given("temperature", 1.0),
            top_p=request.top_p,
            top_k=request.top_k if request.top_k not in (None, 0, -1) else None,
            min_p=request.min_p,
            repetition_penalty=given("repetition_penalty", 1.0),
            frequency_penalty=given("frequency_penalty", 0.0),
            presence_penalty=given("presence_penalty", 0.0),
            stop=request.stops,
            max_new_tokens=max_new_tokens,
            min_new_tokens=given("min_tokens", 0),
        )
    except ValueError as error:
        message = str(error).removeprefix("sampling.")
        param = message.split(" ")[0].replace("_new_tokens", "_tokens")
        raise APIError(400, message, param, "invalid_value") from error


def fresh_seed() -> int:
    """A seed for who gives none."""
    return int.from_bytes(os.urandom(8), "little", signed=True)
