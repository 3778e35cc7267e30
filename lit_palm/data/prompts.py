"""Prompts that a policy learns to answer.

    data = PromptData(train="prompts.jsonl", validation="held_out.jsonl", batch_size=128)

A row is a `prompt` (a string or messages; of `messages` the turns before the assistant's last), and any other columns:
these reach the rewards as they are, such as an `answer` to check against. While training, the policy makes its batches
itself: `train_dataloader` asks the LightningModule for its rollout loader and keeps that loader's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray

from lit_palm.data.base import Stage, TokenizedData
from lit_palm.data.cache import Columns, ColumnWriter
from lit_palm.data.conversations import Turn, encode_prompts, split_key, turn, turn_texts
from lit_palm.data.faults import count, counted, overlong_fault
from lit_palm.data.position import position
from lit_palm.data.sources import Row
from lit_palm.data.tokenizers import Tokenizer

__all__ = ["PromptData", "PromptRows"]


class _Prompt(NamedTuple):
    prompt: Turn
    columns: dict[str, Any]
    where: str


class PromptRows(Sequence[dict[str, Any]]):
    """Tokenised prompts, in the order of the data.

    Row i is a dict: `prompt_ids` LongTensor [n], `prompt` str (the text of the ids: for messages as the template wrote
    them), `columns` dict (every other column; the messages too, where the prompt is messages).

    Args:
        columns: from the cache.
        tokenizer: that made them.
        kept: [rows] which of them are used; None: all.
    """

    def __init__(self, columns: Columns, tokenizer: Tokenizer, kept: NDArray[np.int64] | None = None) -> None:
        self._kept = np.arange(len(columns.records)) if kept is None else kept
        self._tokens = columns.arrays["tokens"]
        self._offsets = np.concatenate([[0], np.cumsum(columns.arrays["lengths"])])
        self._records = columns.records
        self._names: list[str] = columns.meta["names"]
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[prompts] tokens of each."""
        return np.diff(self._offsets)[self._kept]

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = int(self._kept[index])
        ids = self._tokens[self._offsets[index] : self._offsets[index + 1]]
        record = self._records[index]
        return {
            "prompt_ids": torch.from_numpy(ids.astype(np.int64)),
            "prompt": record["prompt"],
            "columns": {name: record["columns"].get(name) for name in self._names},
        }

    def collate(self, rows: NDArray[np.int64], blank: bool = False) -> dict[str, Any]:
        """A batch of prompts.

        Args:
            rows: which rows.
            blank: a row that only fills a batch up: its `row` is -1, and it must count for nothing.

        Returns:
            prompt_ids list of LongTensor, prompts list of str, columns name -> list, row LongTensor [B] of global row
            numbers.
        """
        picked = [self[int(i)] for i in rows]
        return {
            "prompt_ids": [p["prompt_ids"] for p in picked],
            "prompts": [p["prompt"] for p in picked],
            "columns": {name: [p["columns"][name] for p in picked] for name in self._names},
            "row": torch.full((len(rows),), -1) if blank else torch.from_numpy(rows.astype(np.int64)),
        }


class PromptData(TokenizedData):
    """Prompts, with whatever else the rewards need to know about them.

    Validation, test and prediction batches are dicts: `prompt_ids` list of LongTensor, `prompts` list of str, `columns`
    name -> list, `row` LongTensor [B], the number of the row in the data (-1: a filler that counts for nothing).

    Args:
        max_prompt_length: longest prompt in tokens; None: shorter than the network's context.
        overlong: what to do with a longer one: stop with an error, or drop it. What was dropped is counted in a
            warning, with the first few places.
        kwargs: the arguments of `TokenizedData`; `batch_size` is used for evaluation only, since the policy says how
            many prompts it collects.
    """

    view = "prompts"

    def __init__(
        self, max_prompt_length: int | None = None, overlong: Literal["error", "drop"] = "error", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if max_prompt_length is not None and max_prompt_length < 1:
            raise ValueError(f"data.max_prompt_length is {max_prompt_length}; it must be at least 1")
        self.max_prompt_length = max_prompt_length
        self.overlong = overlong
        self._rollouts: Any = None
        self._rollout_state: dict[str, Any] = {}

    def prompts(self, stage: Stage = "train") -> PromptRows:
        """The prompts of a stage that `setup` made ready, as a sequence of rows."""
        return self._elements[stage]

    def train_dataloader(self) -> Any:
        """The policy's rollout loader."""
        module = self._module
        if not hasattr(module, "rollout_loader"):
            raise ValueError(
                "prompts are for training a policy, and this LightningModule makes no rollouts; train LitPolicy, or use"
                " DemonstrationData"
            )
        self._rollouts = module.rollout_loader(self.prompts("train"))
        if self._rollout_state:
            self._rollouts.restore(self._rollout_state)
            self._rollout_state = {}
        return self._rollouts

    def state_dict(self) -> dict[str, Any]:
        if self._rollouts is None:
            return {"rollouts": self._rollout_state}
        where = position(self.trainer) if self.trainer is not None else None
        if where is None or not where.begun:
            return {"rollouts": self._rollouts.snapshot()}
        # minibatches that were served, but are not in the weights: an exception or a step under way may be saving
        in_flight = 0 if where.over else max(self._rollouts.position - where.batch, 0)
        return {"rollouts": self._rollouts.snapshot(in_flight, over=where.over)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rollout_state = state_dict["rollouts"]
        if self._rollouts is not None and self._rollout_state:
            self._rollouts.restore(self._rollout_state)
            self._rollout_state = {}

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self.on_exception(None)

    def on_exception(self, exception: BaseException | None) -> None:
        """Nothing goes on being sampled for a run that is over."""
        if self._rollouts is not None:
            self._rollouts.close()

    def arguments(self) -> dict[str, Any]:
        return {}

    def parse(self, rows: Iterator[Row]) -> Iterator[tuple[str, _Prompt]]:
        for row in rows:
            prompt = turn(row, "prompt") if "messages" not in row.columns or "prompt" in row.columns else _before(row)
            name = "prompt" if "prompt" in row.columns else "messages"
            columns = {k: v for k, v in row.columns.items() if k != name or not isinstance(prompt, str)}
            yield row.group or split_key(prompt), _Prompt(prompt, columns, row.where)

    def texts(self, sample: _Prompt) -> Iterable[str]:
        return turn_texts(sample.prompt)

    def write(self, samples: list[_Prompt], tokenizer: Tokenizer, writer: ColumnWriter) -> None:
        names = writer.meta.setdefault("names", [])
        encoded = encode_prompts(tokenizer, [(s.prompt, s.where) for s in samples])
        for sample, ids in zip(samples, encoded, strict=True):
            text = sample.prompt
            if not isinstance(text, str):
                text = tokenizer.decode(ids[len(tokenizer.prefix) :], skip_special=False)
            writer.append("tokens", ids, np.int32)
            writer.append("lengths", [len(ids)], np.int64)
            writer.append_record({"prompt": text, "columns": sample.columns, "where": sample.where})
            names.extend(name for name in sample.columns if name not in names)

    def elements(self, columns: Columns, tokenizer: Tokenizer) -> PromptRows:
        lengths = np.asarray(columns.arrays["lengths"])
        longest = int(lengths.argmax())
        context = self.network_limit("context_length")
        room = self.max_prompt_length or (None if context is None else context - 1)
        kept = None
        if room is not None and lengths[longest] > room and self.overlong == "drop":
            kept = self._short(columns, lengths, room)
        elif room is not None and lengths[longest] > room:
            key = "data.max_prompt_length" if self.max_prompt_length else "the network's context, less one to answer,"
            raise ValueError(
                f"{columns.records[longest]['where']}: this prompt has {lengths[longest]} tokens, more than {key}"
                f" {room}; shorten it, raise the limit, or set data.overlong to drop"
            )
        if context is not None and room is not None and room >= context:
            self.check_length(room + 1, "max_prompt_length")
        return PromptRows(columns, tokenizer, kept)

    def _short(self, columns: Columns, lengths: NDArray[Any], room: int) -> NDArray[np.int64]:
        """The prompts that fit, with a warning about the others."""
        tally: dict[str, Any] = {}
        for row in np.flatnonzero(lengths > room):
            count(tally, overlong_fault(room), "dropped", columns.records[int(row)]["where"])
        (told,) = counted(tally)
        kept = np.flatnonzero(lengths <= room)
        if not len(kept):
            raise ValueError(f"no row is left of the data; {told}: correct the data or change the option")
        rank_zero_warn(f"the data has rows with faults\n  {told}")
        return kept


def _before(row: Row) -> Turn:
    messages = turn(row, "messages")
    assert not isinstance(messages, str)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ValueError(f"{row.where}: 'messages' holds nothing but what the assistant said, so there is no prompt")
    return messages
