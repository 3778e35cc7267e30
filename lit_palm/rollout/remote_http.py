"""JSON over HTTP with the standard library: one request, tried again where that can help, one clear error at the end.

    client = Client("http://127.0.0.1:8000/v1", api_key=None, timeout=600, retries=6)
    answer = client.post("/v1/completions", {"prompt": [1, 2]})

Proxies that the environment names are not used: an engine is a machine of one's own.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import ssl
import threading
import time
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Client", "EngineError"]

FULL = 429
"""The status of a server with too much to do."""
NOT_READY = (502, 503, 504)
"""Statuses that pass: the server is loading, or a proxy does not reach it."""
MAX_BODY = 2**30
"""Most bytes of an answer that are read."""
LONGEST_PAUSE = 30.0


class EngineError(RuntimeError):
    """A remote engine cannot be reached, or does not answer as it must; names the URL and the way out."""


class Client:
    """Asks one server; several threads may.

    Args:
        url: its address, as `http://127.0.0.1:8000/v1`; the path counts for nothing but messages.
        api_key: sent as `Authorization: Bearer KEY`; None: not.
        timeout: seconds that an answer may take.
        retries: how often a request is tried again after the connection failed or the server was not ready; pauses
            double from half a second up to half a minute, give or take a quarter. One that must queue (HTTP 429) is
            tried for `timeout` seconds instead: the server is there, and works.

    Raises:
        ValueError: the URL is none of HTTP.
    """

    def __init__(self, url: str, api_key: str | None, timeout: float, retries: int) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.username:
            raise ValueError(f"engine.url is {url!r}: write it as http://127.0.0.1:8000/v1, or with https")
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, port
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._stopped = threading.Event()
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """Nobody waits any more: close what is open, wait for no pause, and try nothing again."""
        self._stopped.set()
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    with contextlib.suppress(OSError):
                        connection.sock.shutdown(socket.SHUT_RDWR)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The parsed answer to a POST; see `ask`."""
        return self.ask("POST", path, body)

    def get(self, path: str) -> Any:
        """The parsed answer to a GET; see `ask`."""
        return self.ask("GET", path, None)

    def ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """What the server answers: JSON, or None when it answers nothing.

        Raises:
            EngineError: it refuses the request, or every try failed.
        """
        data = None if body is None else json.dumps(body).encode()
        why, after, failed, queued = "", None, 0, 0
        patience = time.monotonic() + self.timeout
        while failed <= self.retries:
            if self._stopped.wait(self._pause(failed + queued, after) if failed + queued else 0):
                raise EngineError(f"{self.url}: {method} {path} was cancelled{why and f' after {why}'}")
            after = None
            failed += 1
            try:
                status, after, text = self._once(method, path, data)
            except TimeoutError:
                why = f"no answer within {self.timeout:g} s (engine.timeout)"
                continue
            except ssl.SSLCertVerificationError as error:
                raise EngineError(f"{self.url}: its certificate is not trusted ({error.verify_message})") from error
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {str(error).strip() or 'the connection was closed'}"
                continue
            if status in (FULL, *NOT_READY):
                why = f"HTTP {status}: {_message(text)}"
                if status == FULL and time.monotonic() < patience:
                    failed, queued = failed - 1, queued + 1
                continue
            if not 200 <= status < 300:
                raise EngineError(self._refused(method, path, status, text))
            return self._parsed(path, text)
        raise EngineError(
            f"{self.url}: {method} {path} was given up after {failed + queued} attempts ({why}): is the server "
            "running and reachable from here? Start it again and go on from the last checkpoint with --ckpt_path"
        )

    def _pause(self, attempt: int, after: str | None) -> float:
        """Seconds before an attempt; the server may name them."""
        pause = min(0.5 * 2 ** min(attempt - 1, 10), LONGEST_PAUSE)
        if after is not None and after.isdigit():
            pause = max(pause, min(float(after), LONGEST_PAUSE))
        return pause * random.uniform(0.75, 1.25)

    def _once(self, method: str, path: str, data: bytes | None) -> tuple[int, str | None, bytes]:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self.timeout)
        with self._lock:
            self._open.add(connection)
        try:
            connection.connect()
            if self._stopped.is_set():  # before there was anything to close
                raise EngineError(f"{self.url}: {method} {path} was cancelled")
            connection.request(method, path, body=data, headers=self._headers)
            answer = connection.getresponse()
            text = answer.read(MAX_BODY + 1)
            if len(text) > MAX_BODY:
                raise EngineError(f"{self.url}: the answer to {path} is larger than {MAX_BODY} bytes")
            return answer.status, answer.getheader("Retry-After"), text
        except socket.gaierror as error:
            raise EngineError(f"{self.url}: there is no such host ({error.strerror}): correct engine.url") from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _refused(self, method: str, path: str, status: int, text: bytes) -> str:
        hint = {
            401: ": set the environment variable that engine.api_key_variable names to the server's key",
            403: ": set the environment variable that engine.api_key_variable names to the server's key",
            404: ": check engine.url, engine.model and engine.server",
            405: ": check engine.url and engine.server",
        }.get(status, "")
        return f"{self.url}: {method} {path} was refused with HTTP {status} ({_message(text)}){hint}"

    def _parsed(self, path: str, text: bytes) -> Any:
        if not text.strip():
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EngineError(
                f"{self.url}: the answer to {path} is not JSON ({_message(text)}): check engine.url"
            ) from error


def _message(text: bytes) -> str:
    """What an error's body says, on one line."""
    try:
        found = json.loads(text)
        for key in ("error", "message", "detail"):
            if isinstance(found, dict) and key in found:
                found = found[key]
        said = found if isinstance(found, str) else json.dumps(found)
    except (ValueError, RecursionError):
        said = text.decode("utf-8", "replace")
    said = " ".join(said.split())
    return said if len(said) <= 300 else said[:300] + " ..."
