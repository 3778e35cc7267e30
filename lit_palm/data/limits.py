"""What a data module knows of the run it is in: the limits of the network that trains on it, and its rank."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningDataModule

__all__ = ["LimitedData"]


class LimitedData(LightningDataModule):
    """A data module that holds its rows to what the network can take; without a Trainer there are no limits.

    Attributes:
        tokenizer: a ready `Tokenizer` after `setup`.
    """

    tokenizer: Any
    bound: Any = None
    """The LightningModule that `bind` was told of."""

    def bind(self, module: Any) -> None:
        """Say which LightningModule the data are for, where no Trainer does."""
        self.bound = module

    def network_limit(self, name: str) -> int | None:
        """`context_length` or `vocab_size` of the module that will train on this data, None where it does not say."""
        value = getattr(self._module, name, None)
        return value if isinstance(value, int) else None

    def check_length(self, length: int, key: str) -> None:
        """Refuse rows that are longer than the network's context.

        Raises:
            ValueError: naming the argument.
        """
        context = self.network_limit("context_length")
        if context is not None and length > context:
            raise ValueError(f"data.{key} is {length}, but the network's context is {context} tokens; lower data.{key}")

    def _check_network(self) -> None:
        known = self.network_limit("vocab_size")
        if known is not None and self.tokenizer.vocab_size > known:
            raise ValueError(
                f"the tokenizer has {self.tokenizer.vocab_size} ids, the network's vocab_size is {known}: a token id"
                " would be outside the vocabulary; take the tokenizer the network was trained with, or leave a new"
                " network's vocab_size out to follow the tokenizer"
            )

    @property
    def _module(self) -> Any:
        return self.trainer.lightning_module if self.trainer is not None else self.bound

    def _ranks(self) -> tuple[int, int]:
        # the data-parallel rank, whatever the strategy
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)
