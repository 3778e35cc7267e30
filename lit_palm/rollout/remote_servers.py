"""What servers of OpenAI's `/v1/completions` differ in: extra fields, what their log-probabilities are, new weights.

Three are known: `lit-palm serve`, vLLM and SGLang. A `Server` says how one row is asked for and what is told once new
weights lie in a folder; `RemoteEngine` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from lit_palm.rollout.engine_base import WeightsLayout
from lit_palm.rollout.remote_http import Client, EngineError
from lit_palm.rollout.sampling import Sampling

__all__ = ["SERVERS", "LogProbs", "Server", "ServerName"]

ServerName = Literal["lit-palm", "vllm", "sglang"]
LogProbs = Literal["tempered", "raw", "processed"]
"""Of which distribution: softmax(logits / temperature); softmax(logits); or that which is drawn from, after penalties,
temperature and filters."""


class Server(ABC):
    """One kind of server."""

    layout: ClassVar[WeightsLayout] = "huggingface"
    """How it reads weights."""
    logprobs: ClassVar[LogProbs] = "raw"
    """What its log-probabilities are unless it was started otherwise."""
    rows: ClassVar[int] = 1
    """Most completions that one request asks for: one where a request has one seed."""

    def body(self, sampling: Sampling, seeds: list[int], eos_id: int | None) -> dict[str, Any]:
        """The fields of a request beside model and prompt.

        Args:
            sampling: how to draw.
            seeds: one for each prompt of the request.
            eos_id: what ends a completion.
        """
        return {
            "max_tokens": sampling.max_new_tokens,
            "min_tokens": sampling.min_new_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
            "top_k": -1 if sampling.top_k is None else sampling.top_k,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "presence_penalty": sampling.presence_penalty,
            "stop": list(sampling.stop),
            "logprobs": 0,
            "return_token_ids": True,
            **self.own(seeds, eos_id),
        }

    @abstractmethod
    def own(self, seeds: list[int], eos_id: int | None) -> dict[str, Any]:
        """Fields that only this kind takes, the seeds among them."""

    @abstractmethod
    def load(self, client: Client, folder: str, version: str) -> None:
        """Have the server sample from the weights in a folder that it can read.

        Raises:
            EngineError: it does not.
        """


class LitPalmServer(Server):
    """`lit-palm serve CHECKPOINT --weight_updates DIR`. Rows bring their own seeds, so that its completions are those
    of the built-in engines."""

    layout = "lit-palm"
    logprobs = "tempered"
    rows = 16

    def own(self, seeds: list[int], eos_id: int | None) -> dict[str, Any]:
        return {"row_seeds": seeds}

    def load(self, client: Client, folder: str, version: str) -> None:
        answer = client.post("/update_weights_from_disk", {"model_path": folder, "weight_version": version})
        if not isinstance(answer, dict) or answer.get("weight_version") != version:
            raise EngineError(f"{client.url}: it was given the weights {version} and answers {answer!r}")


class VLLMServer(Server):
    """`VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER`, whose development routes can load weights (vLLM 0.15 or newer)."""

    def own(self, seeds: list[int], eos_id: int | None) -> dict[str, Any]:
        # the model's generation_config may name further ends, of which training knows nothing
        ends = {} if eos_id is None else {"stop_token_ids": [eos_id]}
        return {"seed": seeds[0], "ignore_eos": True, "include_stop_str_in_output": True, **ends}

    def load(self, client: Client, folder: str, version: str) -> None:
        arguments = {"weights_path": folder, "is_checkpoint_format": True}
        try:
            client.post("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
            forgot = client.post("/reset_prefix_cache", {})  # what it remembers of prompts is of the weights before
        except EngineError as error:
            raise EngineError(
                f"{error}; vLLM loads weights while it runs only when it was started with VLLM_SERVER_DEV_MODE=1"
            ) from error
        if isinstance(forgot, dict) and forgot.get("success") is False:  # newer versions tell
            raise EngineError(
                f"{client.url}: vLLM kept what it remembers of prompts, which is of the weights before, because "
                "requests are under way: give the trainer a server of its own"
            )


class SGLangServer(Server):
    """`python -m sglang.launch_server --model-path FOLDER`, new enough for `return_token_ids` (July 2026). It heeds
    seeds when started with --enable-deterministic-inference."""

    logprobs = "tempered"

    def own(self, seeds: list[int], eos_id: int | None) -> dict[str, Any]:
        ends = {"ignore_eos": True} if eos_id is None else {"stop_token_ids": [eos_id]}
        return {"seed": seeds[0] % 2**31, "no_stop_trim": True, **ends}

    def load(self, client: Client, folder: str, version: str) -> None:
        body = {"model_path": folder, "flush_cache": True, "weight_version": version}
        answer = client.post("/update_weights_from_disk", body)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            said = answer.get("message") if isinstance(answer, dict) else answer
            raise EngineError(f"{client.url}: SGLang did not take the weights in {folder}: {said}")


SERVERS: dict[str, type[Server]] = {"lit-palm": LitPalmServer, "vllm": VLLMServer, "sglang": SGLangServer}
