"""The server: LitServe's, with the network in a thread instead of processes of its own.

LitServe gives the application, its endpoints (`/health`, `/info`, those of a `LitSpec`) and middlewares. Its inference
workers are not used, because three things that a server of token streams owes its clients do not pass through them:

- a client that leaves must free its row. Requests reach a worker process through a queue that nothing can be taken out
  of again; a stream would run on to its last token for nobody.
- all rows advance together, so a step of 64 streams is 64 messages through a queue kept by a third process, each with a
  wake-up of its own. Here a step is one call.
- SIGTERM must let streams end. `LitServer.run` closes the workers' queues before the connections that wait for them.

The continuous-batching engine is one Python object that releases the interpreter's lock in every operation of torch, so
a thread serves as well as a process. What `LitServer` offers for changing this is used: the lifespan, the authorisation
and the status of its workers, which `/health` reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from litserve import LitAPI, LitServer
from litserve.utils import WorkerSetupStatus
from starlette.exceptions import HTTPException

from lit_palm.serve.command import LOOPBACK
from lit_palm.serve.protocol import APIError
from lit_palm.serve.routes import OpenAIRoutes

__all__ = ["PalmServer"]

log = logging.getLogger(__name__)


class PalmAPI(LitAPI):
    """What LitServe knows of the network: whether it is well."""

    def __init__(self, spec: OpenAIRoutes) -> None:
        super().__init__(spec=spec, stream=True)
        self.worker = spec.worker

    def health(self) -> bool:
        """True when requests are taken."""
        return self.worker.state == "ready"


class Guard:
    """The outermost layer: who may ask, and how much. It answers before a body is read.

    Args:
        app: what it stands before.
        api_key: that requests must bring as `Authorization: Bearer KEY`; None: none is needed.
        max_body: most bytes of a body.
    """

    def __init__(self, app: Any, api_key: str | None, max_body: int) -> None:
        self.app, self.max_body = app, max_body
        self.api_key = api_key.encode() if api_key else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        error = self.refuse(scope["path"], headers)
        if error is not None:
            await _refusal(error)(scope, receive, send)
            return
        total = 0

        async def counted() -> Any:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.max_body:
                raise self.too_large()
            return message

        await self.app(scope, counted, send)

    def refuse(self, path: str, headers: dict[bytes, bytes]) -> APIError | None:
        """Why a request is not let in; None: it is."""
        if self.api_key is not None and path != "/health":
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.api_key):
                return APIError(
                    401, "incorrect API key", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            return self.too_large()
        return None

    def too_large(self) -> APIError:
        """For a body over the limit."""
        # what is left of the body is not read, so the connection cannot be used again
        return APIError(
            413,
            f"the body is larger than {self.max_body} bytes",
            code="request_too_large",
            headers={"Connection": "close"},
        )


class PalmServer(LitServer):
    """LitServe's application around a `Worker`.

    Args:
        routes: what is served.
        api_key: that requests must bring; None: none is needed.
        max_body: most bytes of a body.
        drain_seconds: how long streams may go on after SIGTERM or SIGINT.
    """

    def __init__(self, routes: OpenAIRoutes, api_key: str | None, max_body: int, drain_seconds: float) -> None:
        self.worker, self.drain_seconds, self.open = routes.worker, drain_seconds, api_key is None
        self.workers_setup_status = {"engine": WorkerSetupStatus.STARTING}
        super().__init__(
            PalmAPI(routes),
            devices=1,
            timeout=False,
            middlewares=[(Guard, {"api_key": api_key, "max_body": max_body})],
            model_metadata={"id": routes.model},
            disable_openapi_url=True,  # its pages load scripts from elsewhere
        )
        self.app.add_exception_handler(APIError, _api_error)
        self.app.add_exception_handler(HTTPException, _http_error)
        self.app.add_exception_handler(Exception, _unexpected)

    def setup_auth(self, lit_api: LitAPI | None = None) -> Callable[[], None]:
        """Nothing more than what `Guard` has asked for."""
        return lambda: None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """The worker's life, in place of the queues of worker processes."""
        self.worker.start()
        watch = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.to_thread(self.worker.stop)

    async def _watch(self) -> None:
        """Tell LitServe when the worker is ready."""
        while self.worker.state == "loading":
            await asyncio.sleep(0.02)
        ready = self.worker.state != "failed"
        self.workers_setup_status["engine"] = WorkerSetupStatus.READY if ready else WorkerSetupStatus.ERROR
        if ready:
            print(self.greeting, file=sys.stderr, flush=True)

    def run(self, host: str = "127.0.0.1", port: int = 8000, **options: Any) -> None:  # type: ignore[override]
        """Serve until SIGTERM or SIGINT.

        Args:
            host: to listen at.
            port: to listen at; 0: any that is free.
            options: for uvicorn.

        Raises:
            ValueError: the address cannot be listened at.
        """
        listener = _listen(host, port)
        if self.open and host not in LOOPBACK:
            print(f"lit-palm: warning: whoever reaches {host} may ask: give --api_key", file=sys.stderr)
        name = f"[{host}]" if ":" in host else host
        self.greeting = f"serving {self.model_metadata['id']} at http://{name}:{listener.getsockname()[1]}/v1"
        config = uvicorn.Config(
            self.app,
            log_level="warning",
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=5,  # after `drain_seconds`, for what does not end by itself
            server_header=False,
            **options,
        )
        self.http = _Uvicorn(config, self)
        self.http.run(sockets=[listener])
        if self.worker.failure is not None:
            raise self.worker.failure


class _Uvicorn(uvicorn.Server):
    """Lets streams end before it does, while `/health` says that no more are taken."""

    def __init__(self, config: uvicorn.Config, server: PalmServer) -> None:
        super().__init__(config)
        self.worker, self.drain_seconds = server.worker, server.drain_seconds
        self.deadline: float | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without raising the signal again at the end: having drained is a success."""
        if threading.current_thread() is not threading.main_thread():  # which alone gets signals
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal lets streams end, a second one ends them."""
        now = time.monotonic()
        self.deadline = now + self.drain_seconds if self.deadline is None else now
        if self.worker.state == "ready":
            self.worker.state = "draining"

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: whether to end."""
        if self.worker.state == "failed":
            self.should_exit = True
        if self.deadline is not None and not self.should_exit:
            over = time.monotonic() > self.deadline
            if over:
                for stream in list(self.worker.streams):
                    self.worker.close(stream)
            self.should_exit = over or not self.worker.num_rows
        return await super().on_tick(counter)


def _listen(host: str, port: int) -> socket.socket:
    """A socket at this address.

    Raises:
        ValueError: there can be none.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen at {host}:{port} ({error}): choose another --port or --host") from error
    return listener


def _refusal(error: APIError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return _refusal(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not for {request.url.path}"}
    return _refusal(APIError(error.status_code, what.get(error.status_code, str(error.detail))))


async def _unexpected(request: Request, error: Exception) -> Response:
    return _refusal(APIError(500, "internal error", code="internal_error"))
