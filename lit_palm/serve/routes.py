"""OpenAI's routes as a LitServe specification: which paths there are and what each of them does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from litserve.specs.base import LitSpec

from lit_palm.data.templates import encode_chat
from lit_palm.data.tokenizers import Tokenizer, tokenizer_from_dict
from lit_palm.serve.protocol import APIError, ChatRequest, CompletionRequest, parse, sampling_of
from lit_palm.serve.replies import Reply, sse
from lit_palm.serve.updates import UpdateRequest, folder_below, load_weights
from lit_palm.serve.worker import Event, Row, Stream, Worker

__all__ = ["Limits", "OpenAIRoutes"]


@dataclass
class Limits:
    """What a request may ask for."""

    max_length: int
    """Most tokens of prompt and completion together."""
    max_tokens: int | None = None
    """Most new tokens; None: what `max_length` leaves."""
    vocab_size: int | None = None
    """Ids of the network."""


class OpenAIRoutes(LitSpec):
    """`/v1/models`, `/v1/chat/completions` and `/v1/completions`.

    Args:
        worker: what runs the network.
        tokenizer: of the network.
        model: its name for clients.
        limits: what a request may ask for.
        weight_updates: folder below which new weights are taken from; None: none are.
    """

    def __init__(
        self, worker: Worker, tokenizer: Tokenizer, model: str, limits: Limits, weight_updates: str | None = None
    ) -> None:
        super().__init__()
        self.weight_updates = weight_updates
        self.worker, self.tokenizer, self.model, self.limits = worker, tokenizer, model, limits
        self.api_path = "/v1/chat/completions"
        self.created = int(time.time())
        # A tokenizer that encodes must not be used by another thread meanwhile: encoding text literally is a setting of
        # it. So one copy encodes, in a thread of its own that also keeps long texts off the event loop; others decode.
        self._encoder = tokenizer_from_dict(tokenizer.to_dict())
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="lit-palm-encoder")
        self.add_endpoint("/v1/models", self.models, ["GET"])
        self.add_endpoint("/v1/models/{model:path}", self.one_model, ["GET"])
        self.add_endpoint("/v1/chat/completions", self.chat_completions, ["POST"])
        self.add_endpoint("/v1/completions", self.completions, ["POST"])
        if weight_updates is not None:
            self.add_endpoint("/update_weights_from_disk", self.update_weights, ["POST"])

    @property
    def stream(self) -> bool:
        """Answers may be streams, so LitServe compresses none of them."""
        return True

    # ------------------------------------------------------------------------------ endpoints

    async def models(self) -> Response:
        """The one model there is."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, model: str) -> Response:
        """What is known of it."""
        self._check_model(model)
        return JSONResponse(self._model())

    async def chat_completions(self, request: Request) -> Response:
        """A turn of the assistant."""
        body = parse(ChatRequest, await self._body(request))
        self._check_model(body.model)
        messages = body.chat()
        try:
            ids = await self._encode(lambda t: encode_chat(t, messages, add_generation_prompt=True)[0])
        except ValueError as error:
            raise APIError(400, str(error), "messages", "invalid_template_input") from error
        top = (body.top_logprobs or 0) if body.logprobs else None
        limit = body.max_completion_tokens or body.max_tokens
        return await self._answer(request, body, "chat", [ids], [""], limit, None, top)

    async def completions(self, request: Request) -> Response:
        """What follows a text."""
        body = parse(CompletionRequest, await self._body(request))
        self._check_model(body.model)
        prompts = body.prompts()

        def encode(tokenizer: Tokenizer) -> list[list[int]]:
            return [tokenizer.prefix + tokenizer.encode(p) if isinstance(p, str) else p for p in prompts]

        ids = await self._encode(encode)
        texts = (
            [p if isinstance(p, str) else self.tokenizer.decode(p) for p in prompts] if body.echo else [""] * len(ids)
        )
        return await self._answer(request, body, "text", ids, texts, body.max_tokens, 16, body.logprobs)

    async def update_weights(self, request: Request) -> Response:
        """Take the weights in a folder; answered when completions come from them."""
        assert self.weight_updates is not None
        body = parse(UpdateRequest, await self._body(request))
        folder = folder_below(self.weight_updates, body.model_path)
        await self.worker.update(body.weight_version, lambda network: load_weights(network, folder))
        return JSONResponse({"success": True, "message": "", "weight_version": body.weight_version})

    # ------------------------------------------------------------------------------ from request to answer

    async def _answer(
        self,
        request: Request,
        body: ChatRequest | CompletionRequest,
        kind: str,
        prompts: list[list[int]],
        echo: list[str],
        wanted: int | None,
        default: int | None,
        num_top: int | None,
    ) -> Response:
        count = body.n or 1
        longest = max(len(ids) for ids in prompts)
        sampling = sampling_of(body, self._max_new(prompts, wanted, default, longest, kind))
        seeds = body.seeds(len(prompts) * count)
        rows = [
            Row(ids, sampling, seeds[p * count + i], num_top or 0)
            for p, ids in enumerate(prompts)
            for i in range(count)
        ]
        reply = Reply(
            kind,
            self.model,
            self.tokenizer,
            sampling.stop,
            len(rows),
            sum(map(len, prompts)),
            num_top,
            [text for text in echo for _ in range(count)],
            bool(body.return_token_ids),
            None if self.weight_updates is None else lambda: stream.version,
        )
        stream = self._open(rows)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            chunks = self._stream(stream, reply, usage)
            return _Streamed(
                chunks,
                lambda: self.worker.close(stream),
                media_type="text/event-stream; charset=utf-8",
                headers=headers,
            )
        return await self._whole(request, stream, reply)

    async def _stream(self, stream: Stream, reply: Reply, usage: bool) -> AsyncIterator[bytes]:
        """The chunks of an answer; what one step has drawn for it goes out as one piece."""
        left = len(stream.rows)
        opening = b"".join(map(sse, reply.opening()))
        if opening:
            yield opening
        while left:
            events = await stream.next()
            left -= sum(event.token is None for event in events)
            fault = _fault(events)
            if fault is not None:
                yield sse(fault.body())
                return
            made = b"".join(map(sse, reply.chunks(events)))
            if made:
                yield made
        yield (sse(reply.closing()) if usage else b"") + sse("[DONE]")

    async def _whole(self, request: Request, stream: Stream, reply: Reply) -> Response:
        """The answer at once, unless the client goes first."""
        gone = asyncio.ensure_future(_disconnected(request))
        events: list[Event] = []
        try:
            left = len(stream.rows)
            while left:
                more = asyncio.ensure_future(stream.next())
                await asyncio.wait((gone, more), return_when=asyncio.FIRST_COMPLETED)
                if not more.done():
                    more.cancel()
                    return Response(status_code=499)  # nobody reads it
                new = more.result()
                left -= sum(event.token is None for event in new)
                fault = _fault(new)
                if fault is not None:
                    raise fault
                events += new
        finally:
            gone.cancel()
            self.worker.close(stream)
        return JSONResponse(reply.whole(events))

    # ------------------------------------------------------------------------------ checks

    async def _body(self, request: Request) -> bytes:
        """The bytes of a request that may be read now.

        Raises:
            APIError: 503 before the network is loaded and while the server ends, 415 for another kind of body.
        """
        if self.worker.state != "ready":
            why = {"loading": "the network is being loaded", "draining": "the server is shutting down"}
            message = why.get(self.worker.state, "the network could not be loaded")
            raise APIError(503, message, code=self.worker.state, headers={"Retry-After": "2"})
        # a web page may send any other type to a server on this machine without asking
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise APIError(415, "the content type must be application/json", code="unsupported_media_type")
        return await request.body()

    def _check_model(self, name: str) -> None:
        if name != self.model:
            raise APIError(
                404, f"there is no model {name!r} here: this server has {self.model!r}", "model", "model_not_found"
            )

    def _max_new(
        self, prompts: list[list[int]], wanted: int | None, default: int | None, longest: int, kind: str
    ) -> int:
        """How many tokens may be drawn.

        Raises:
            APIError: 400, when prompt and completion are longer than the network or the server allows.
        """
        param = "messages" if kind == "chat" else "prompt"
        size = self.limits.vocab_size
        for ids in prompts:
            if not ids:
                raise APIError(400, "a prompt has no tokens", param, "invalid_value")
            if size is not None and not 0 <= min(ids) <= max(ids) < size:
                raise APIError(400, f"a prompt has token ids outside 0 to {size - 1}", param, "invalid_value")
        room, most = self.limits.max_length - longest, self.limits.max_tokens
        if wanted is None:
            wanted = max(1, min(room, *(x for x in (default, most) if x is not None), room))
        elif most is not None and wanted > most:
            raise APIError(
                400, f"max_tokens is {wanted}: this server writes at most {most}", "max_tokens", "invalid_value"
            )
        if wanted > room:
            raise APIError(
                400,
                f"this model's maximum context length is {self.limits.max_length} tokens, but {longest} of the prompt "
                f"and {wanted} of the completion were asked for",
                param if room < 1 else "max_tokens",
                "context_length_exceeded",
            )
        return wanted

    def _open(self, rows: list[Row]) -> Stream:
        """Start rows.

        Raises:
            APIError: 429, when too many run and wait already.
        """
        worker = self.worker
        if len(rows) > worker.max_rows:
            raise APIError(
                400,
                f"{len(rows)} completions at once are more than this server's {worker.max_rows}",
                "n",
                "invalid_value",
            )
        if worker.num_rows + len(rows) > worker.max_rows:
            raise APIError(
                429,
                f"{worker.num_rows} completions run and wait already",
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        return worker.open(rows)

    async def _encode(self, encode: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, encode, self._encoder)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.model,
            "object": "model",
            "created": self.created,
            "owned_by": "lit-palm",
            "max_model_len": self.limits.max_length,
            **({} if self.weight_updates is None else {"weights_version": self.worker.version}),
        }

    def decode_request(self, request: Any, context_kwargs: Any = None) -> Any:
        """Unused: requests do not travel to a process of LitServe's."""
        raise NotImplementedError

    def encode_response(self, output: Any, context_kwargs: Any = None) -> Any:
        """Unused, as `decode_request`."""
        raise NotImplementedError


class _Streamed(StreamingResponse):
    """A stream that tells when it is over, also when its client went before the first chunk."""

    def __init__(self, chunks: AsyncIterator[bytes], close: Callable[[], None], **options: Any) -> None:
        super().__init__(chunks, **options)
        self.close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.close()


def _fault(events: list[Event]) -> APIError | None:
    """What a row ended with that is no completion."""
    for event in events:
        if event.token is None and event.reason == "cancelled":
            return APIError(503, event.error or "the server is shutting down", code="draining")
        if event.token is None and event.reason == "error":
            return APIError(500, event.error or "the completion failed", code="internal_error")
    return None


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone; its request has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
