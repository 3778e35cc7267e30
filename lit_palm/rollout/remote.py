"""Completions from a server of OpenAI's `/v1/completions`: `lit-palm serve`, vLLM or SGLang.

    model.engine: {class_path: RemoteEngine, init_args: {url: http://127.0.0.1:8000/v1, weights_dir: runs/weights}}

Prompts go as token ids, and ids with their log-probabilities come back; nothing is decoded and encoded again. Before
completions are asked for, the policy's weights as they are then are written to a folder that trainer and server both
see, and the server is told to load them.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lit_palm.models.base import Network
from lit_palm.rollout.engine_base import Engine, Generation, WeightsLayout, check_limits, check_request
from lit_palm.rollout.remote_http import Client, EngineError
from lit_palm.rollout.remote_servers import SERVERS, LogProbs, ServerName
from lit_palm.rollout.sampling import Sampling

__all__ = ["EngineError", "RemoteEngine"]

# ids, log-probabilities, how it ended
_Row = tuple[list[int], list[float], str]


class RemoteEngine(Engine):
    """Samples on a server, from weights that are handed over on disk.

    Several processes ask for the rows of their own; the first hands over the weights. With `server: lit-palm`
    completions are those of the built-in engines for the same seeds, up to rounding.

    Args:
        url: of the server, as http://127.0.0.1:8000/v1.
        weights_dir: a folder that the server can read under the same path.
        server: what it is: `lit-palm`, `vllm` or `sglang`.
        model: its name there; None: the only one that there is.
        logprobs: what the server's log-probabilities are; None: what that kind of server gives unless started
            otherwise. vLLM's are `raw` (of a temperature of 1); started with --logprobs-mode processed_logprobs,
            `processed`.
        concurrency: most completions under way at once; the server may queue them.
        timeout: seconds that an answer may take.
        retries: how often a request is tried again when the server cannot be reached or is busy; six times is half a
            minute.
        api_key_variable: environment variable that holds the server's key, if it wants one.

    Raises:
        ValueError: an argument is out of its range.
    """

    apart: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        weights_dir: str,
        server: ServerName = "lit-palm",
        model: str | None = None,
        logprobs: LogProbs | None = None,
        concurrency: int = 256,
        timeout: float = 600.0,
        retries: int = 6,
        api_key_variable: str = "LIT_PALM_ENGINE_KEY",
    ) -> None:
        if server not in SERVERS:
            raise ValueError(f"engine.server is {server!r}: choose {', '.join(SERVERS)}")
        if logprobs is not None and logprobs not in get_args(LogProbs):
            raise ValueError(f"engine.logprobs is {logprobs!r}: choose {', '.join(get_args(LogProbs))}")
        check_limits(concurrency=concurrency)
        if not timeout > 0 or retries < 0:
            raise ValueError(f"engine.timeout {timeout} must be positive, and engine.retries {retries} at least 0")
        self.url, self.server, self.model, self.weights_dir = url, server, model, weights_dir
        self.logprobs, self.concurrency, self.timeout, self.retries = logprobs, concurrency, timeout, retries
        self.api_key_variable = api_key_variable
        self.version: str | None = None
        """Names the weights that the server must have."""
        self._kind = SERVERS[server]()
        self._client()  # a wrong URL is an error now
        self._name = model
        self._running: Client | None = None
        self._lock = threading.Lock()

    def _client(self) -> Client:
        return Client(self.url, os.environ.get(self.api_key_variable), self.timeout, self.retries)

    # ------------------------------------------------------------------ before anything is sampled

    def check(self, sampling: Sampling) -> None:
        """Refuse settings under which the server's log-probabilities are not those that training computes.

        Raises:
            ValueError: naming the way out.
        """
        given = self.logprobs or self._kind.logprobs
        if given == "raw" and sampling.temperature not in (0.0, 1.0):
            way_out = (
                "start vLLM with --logprobs-mode processed_logprobs and set engine.logprobs to processed"
                if self.server == "vllm"
                else "set engine.logprobs to what the server gives"
            )
            raise ValueError(
                f"sampling.temperature is {sampling.temperature}, and the server's log-probabilities are those of a "
                f"temperature of 1 (engine.logprobs: raw): {way_out}, or sample at 1"
            )
        if given == "processed" and sampling.filtered and not sampling.greedy:
            raise ValueError(
                "the server's log-probabilities are those after top_k, top_p, min_p and penalties (engine.logprobs: "
                "processed), which training does not compute: leave those out of sampling, or start the server with "
                "raw ones and sample at a temperature of 1"
            )

    def update(self, version: str, write: Callable[[str, WeightsLayout], None] | None) -> None:
        """Write the weights below `weights_dir`, have the server load them, and remove the files."""
        self.version = version
        if write is None:
            return
        folder = Path(self.weights_dir).absolute() / version
        try:
            write(str(folder), self._kind.layout)
            self._kind.load(self._client(), str(folder), version)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def cancel(self) -> None:
        """Have a call of `generate` in another thread end soon, with an error."""
        with self._lock:
            if self._running is not None:
                self._running.stop()

    # ------------------------------------------------------------------ sampling

    def generate(
        self,
        network: Network,
        prompts: Sequence[Tensor],
        sampling: Sampling,
        seeds: Tensor,
        *,
        pad_id: int,
        eos_id: int | None,
        decode: Callable[[list[int]], str] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Generation:
        """Sample one completion a prompt; see `Engine.generate`. The network tells its limits and is not run.

        Tokens are reported to `on_token` when all rows have ended.

        Raises:
            EngineError: the server cannot be reached, refuses, or answers with something else than was asked for.
        """
        assert len(seeds) == len(prompts), "one seed a prompt"
        self.check(sampling)
        check_request(network, prompts, sampling, decode)
        client = self._client()
        with self._lock:
            self._running = client
        name = self._name = self._name or self._only_model(client)
        # rows of one request are like each other in length, and so end at about the same time
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        size = min(self._kind.rows, self.concurrency)
        rows: dict[int, _Row] = {}

        def ask(part: list[int]) -> None:
            body = {
                "model": name,
                "prompt": [prompts[row].tolist() for row in part],
                **self._kind.body(sampling, [int(seeds[row]) for row in part], eos_id),
            }
            answer = client.post("/v1/completions", body)
            rows.update(zip(part, self._rows(answer, len(part), sampling, network, eos_id), strict=True))

        with ThreadPoolExecutor(self.concurrency // size, thread_name_prefix="lit-palm-remote") as pool:
            asked = [pool.submit(ask, order[i : i + size]) for i in range(0, len(order), size)]
            try:
                done, _ = wait(asked, return_when=FIRST_EXCEPTION)
            finally:  # of one that failed, or when this thread is interrupted: nobody needs the others
                if len(rows) < len(prompts):
                    client.stop()
                    pool.shutdown(wait=False, cancel_futures=True)
            for future in done:  # the failure itself, not what was cancelled because of it
                future.result()
        if on_token is not None:
            for row in range(len(prompts)):
                for token in rows[row][0]:
                    on_token(row, token)
        ordered = [rows[row] for row in range(len(prompts))]
        return Generation(
            completions=[torch.tensor(ids, dtype=torch.long) for ids, _, _ in ordered],
            logps=[torch.tensor(logps, dtype=torch.float32) for _, logps, _ in ordered],
            ended=[reason != "length" for _, _, reason in ordered],
            finish_reason=[reason for _, _, reason in ordered],
        )

    def _only_model(self, client: Client) -> str:
        answer = client.get("/v1/models")
        try:
            names = [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError) as error:
            raise EngineError(f"{self.url}: /v1/models answers {str(answer)[:200]}: check engine.url") from error
        if len(names) != 1:
            raise EngineError(f"{self.url}: has the models {', '.join(names)}: say which with engine.model")
        return names[0]

    # ------------------------------------------------------------------ what comes back

    def _rows(self, answer: Any, count: int, sampling: Sampling, network: Network, eos_id: int | None) -> list[_Row]:
        """The rows of an answer, in the order of the prompts.

        Raises:
            EngineError: it is not what was asked for.
        """
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            numbers = [int(choice["index"]) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise self._wrong(f"has no choices with an index: {str(answer)[:200]}") from error
        if numbers != list(range(count)):
            raise self._wrong(f"has {len(numbers)} choices for {count} prompts")
        told = answer.get("weights_version")
        if self.version is not None and self.server == "lit-palm" and told != self.version:
            raise EngineError(
                f"{self.url}: completions come from the weights {told!r}, the trainer handed over {self.version!r}: "
                "the server was started again, or another trainer uses it. Give each trainer a server of its own, and "
                "go on from the last checkpoint with --ckpt_path"
            )
        return [self._row(choice, sampling, network.config.vocab_size, eos_id) for choice in choices]

    def _row(self, choice: dict[str, Any], sampling: Sampling, vocab_size: int | None, eos_id: int | None) -> _Row:
        ids, told = choice.get("token_ids"), choice.get("logprobs") or {}
        logps = told.get("token_logprobs") if isinstance(told, dict) else None
        if not isinstance(ids, list) or not all(type(i) is int for i in ids):
            raise self._wrong(
                "has no token_ids, which completions cannot be trained on without: use a version that knows "
                "return_token_ids"
            )
        if not isinstance(logps, list):
            raise self._wrong("has no log-probabilities: was the server started without them?")
        if not ids or len(ids) > sampling.max_new_tokens:
            raise self._wrong(f"has {len(ids)} tokens, 1 to {sampling.max_new_tokens} were asked for")
        if len(logps) != len(ids):
            raise self._wrong(f"has {len(logps)} log-probabilities for {len(ids)} tokens")
        if vocab_size is not None and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise self._wrong(
                f"has token ids from {min(ids)} to {max(ids)}, the network has 0 to {vocab_size - 1}: the server has "
                "another model"
            )
        numbers = [float(x) if isinstance(x, int | float) and not isinstance(x, bool) else math.nan for x in logps]
        if not all(math.isfinite(x) and x <= 1e-3 for x in numbers):
            raise self._wrong("has log-probabilities that are none: are the server's weights finite?")
        return ids, numbers, self._reason(choice, ids, sampling, eos_id)

    def _reason(self, choice: dict[str, Any], ids: list[int], sampling: Sampling, eos_id: int | None) -> str:
        said = choice.get("finish_reason")
        if said == "length":
            if len(ids) < sampling.max_new_tokens:
                raise self._wrong(f"ran out of room after {len(ids)} tokens: raise the server's context length")
            return "length"
        if said != "stop":
            raise self._wrong(f"ended with {said!r}: the server gave the request up")
        if eos_id is not None and ids[-1] == eos_id:
            return "eos"
        if sampling.stop:
            return "stop"
        raise self._wrong(
            f"ended with token {ids[-1]}, where the tokeniser's EOS is {eos_id}: the server has another model or "
            "another tokeniser"
        )

    def _wrong(self, what: str) -> EngineError:
        return EngineError(f"{self.url}: an answer {what}")
