"""A classifier of `transformers` that reads text with a tokeniser of its own, as a reward."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_palm.rollout.rewards.base import NetworkLoader, Reward, RewardBatch

__all__ = ["SequenceClassifier"]

_Reads = Literal["text", "pair", "chat"]
_Gives = Literal["logit", "log_probability", "probability"]


class SequenceClassifier(Reward):
    """Scores the text of completions with any `AutoModelForSequenceClassification`, an encoder's too.

    For published reward models whose tokeniser is not the policy's (a DeBERTa over a Llama), and for classifiers
    (sentiment, toxicity). A reward model that shares the policy's tokeniser is a `RewardModel`.

    Args:
        model: a folder with safetensors, or a hub name; code of its own is not run.
        reads: `text`: prompt and completion as one text; `pair`: as two segments; `chat`: as a user's and an
            assistant's message through the classifier's chat template.
        label: name or number of the class that is wanted; null where the model gives one score.
        gives: of that class the `logit`, the `log_probability` or the `probability`; one score is its `logit`.
        max_length: longest text in tokens, cut from the left; null: what the model takes.
        batch_size: texts in one forward pass.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged.

    Raises:
        ValueError: an argument is out of its range; in `build`, when the model cannot be read or lacks the label.
    """

    def __init__(
        self,
        model: str,
        reads: _Reads = "text",
        label: str | int | None = None,
        gives: _Gives = "logit",
        max_length: int | None = None,
        batch_size: int = 32,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if reads not in ("text", "pair", "chat"):
            raise ValueError(f"reads of SequenceClassifier is {reads!r}: choose text, pair or chat")
        if gives not in ("logit", "log_probability", "probability"):
            raise ValueError(f"gives of SequenceClassifier is {gives!r}: choose logit, log_probability or probability")
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise ValueError(f"batch_size and max_length of SequenceClassifier {model!r} must be at least 1")
        self.model, self.reads, self.label, self.gives = model, reads, label, gives
        self.max_length, self.batch_size = max_length, batch_size
        self.tokenizer: Any = None
        self.column = 0

    def build(self, load: NetworkLoader) -> nn.Module:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
            network: Any = AutoModelForSequenceClassification.from_pretrained(
                self.model, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            )
        except Exception as error:
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"model of SequenceClassifier: {self.model!r} is no folder or hub name of a sequence classifier with "
                f"safetensors and a tokeniser ({why})"
            ) from error
        if self.reads == "chat" and not self.tokenizer.chat_template:
            raise ValueError(f"reads of SequenceClassifier is chat, and {self.model!r} has no chat template: use text")
        self.column = self._column(network.config)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        network.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.truncation_side = "left"
        longest = int(getattr(network.config, "max_position_embeddings", None) or 2**30)
        self.length = min(self.max_length or longest, longest, int(self.tokenizer.model_max_length))
        built: nn.Module = network
        return built

    def _column(self, config: Any) -> int:
        names = {number: str(config.id2label.get(number, number)) for number in range(config.num_labels)}
        if self.label is None:
            if len(names) > 1:
                raise ValueError(
                    f"label of SequenceClassifier: {self.model!r} knows {', '.join(names.values())}: say which to use"
                )
            if self.gives != "logit":
                raise ValueError(f"gives of SequenceClassifier: {self.model!r} gives one score, a logit")
            return 0
        found = [n for n, text in names.items() if self.label in (n, text) or str(self.label) == str(n)]
        if not found:
            raise ValueError(
                f"label of SequenceClassifier is {self.label!r}: {self.model!r} knows {', '.join(names.values())}"
            )
        return found[0]

    @torch.no_grad()
    def __call__(self, batch: RewardBatch) -> Tensor:
        """Scores [B] in float32; dropout is off."""
        network = self.network
        assert network is not None, "the host sets reward.network to what build() returned"
        device = next(network.parameters()).device
        training, scores = network.training, torch.zeros(len(batch), dtype=torch.float32)
        network.eval()
        try:
            order = sorted(range(len(batch)), key=lambda i: len(batch.prompts[i]) + len(batch.completions[i]))
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                encoded = self._encode([batch.prompts[i] for i in rows], [batch.completions[i] for i in rows])
                logits = network(**encoded.to(device)).logits.float().cpu()
                scores[rows] = self._score(logits)
        finally:
            network.train(training)
        return scores

    def _encode(self, prompts: list[str], completions: list[str]) -> Any:
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": self.length}
        options["return_tensors"] = "pt"
        if self.reads == "pair":
            return self.tokenizer(prompts, completions, **options)
        if self.reads == "text":
            return self.tokenizer([p + c for p, c in zip(prompts, completions, strict=True)], **options)
        turns = [
            [{"role": "user", "content": p}, {"role": "assistant", "content": c}]
            for p, c in zip(prompts, completions, strict=True)
        ]
        texts = self.tokenizer.apply_chat_template(turns, tokenize=False)
        return self.tokenizer(texts, add_special_tokens=False, **options)

    def _score(self, logits: Tensor) -> Tensor:
        if self.gives == "logit":
            return logits[:, self.column]
        log_p = logits.log_softmax(1)[:, self.column]
        return log_p if self.gives == "log_probability" else log_p.exp()
