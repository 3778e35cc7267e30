"""Any fast tokenizer of `transformers`, described by its own JSON once it has been read."""

from __future__ import annotations

from typing import Any

from lit_palm.data.templates import PLAIN_TEMPLATE
from lit_palm.data.tokenizer_backed import BackedTokenizer

__all__ = ["HFTokenizer"]

# what a tokenizer.json alone is taken to end its texts with: the first of these that it knows
_USUAL_EOS = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|END_OF_TURN_TOKEN|>")


class HFTokenizer(BackedTokenizer):
    """Any fast tokenizer of `transformers`; nothing is read before it is first used.

    A tokenizer without a padding token pads with another id (its unknown token, else any that is not EOS): batches
    carry explicit masks, and padding must never look like EOS.

    Args:
        name: hub name, folder, or `tokenizer.json`.
        eos_token: the token that ends documents and completions; None takes the tokenizer's own.
        bos_token: the token that begins documents and prompts; None takes the tokenizer's own if the tokenizer itself
            puts one in front of a text, as Llama's does and GPT-2's does not. Empty: no such token.
        chat_template: Jinja text for messages; None takes the tokenizer's own, or a plain one.
    """

    def __init__(
        self,
        name: str,
        eos_token: str | None = None,
        bos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.name = name
        self.eos_token = eos_token
        self.bos_token = bos_token
        self.bos_text = ""  # what templates know as bos_token, also where text does not begin with it
        self._template = chat_template
        self._backend = None

    def load(self) -> None:
        """Read the tokenizer now rather than at its first use.

        Raises:
            ValueError: when it cannot be found, is not a fast tokenizer, or has no end-of-text token.
        """
        if self._backend is not None:
            return
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(self.name, trust_remote_code=False)
        except Exception as error:
            raise ValueError(
                f"there is no tokenizer {self.name!r}: it is no file or folder here, and the hub did not provide it"
                f" ({type(error).__name__}: {error})"
            ) from error
        self._take(loaded)

    @classmethod
    def from_transformers(cls, loaded: Any, name: str) -> HFTokenizer:
        """A tokenizer that `transformers` has loaded.

        Raises:
            ValueError: when it is not a fast tokenizer, or has no end-of-text token.
        """
        tokenizer = cls(name)
        tokenizer._take(loaded)
        return tokenizer

    def _take(self, loaded: Any) -> None:
        if not getattr(loaded, "is_fast", False):
            raise ValueError(
                f"the tokenizer {self.name!r} has no tokenizer.json ({type(loaded).__name__}); convert it to a fast"
                " tokenizer first"
            )
        adds_bos = loaded("a")["input_ids"][:1] == [loaded.bos_token_id] and loaded.bos_token_id is not None
        self.bos_text = loaded.bos_token or ""
        self._finish(
            loaded.backend_tokenizer,
            eos=self.eos_token or loaded.eos_token,
            bos=self.bos_token if self.bos_token is not None else (loaded.bos_token if adds_bos else ""),
            pad=loaded.pad_token,
            unk=loaded.unk_token,
            template=self._template or loaded.chat_template,
        )

    def _finish(
        self, backend: Any, *, eos: str | None, bos: str | None, pad: str | None, unk: str | None, template: Any
    ) -> None:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(backend.to_str())  # our own copy: the settings below must not leak to its owner
        backend.no_truncation()
        backend.no_padding()
        if not eos or backend.token_to_id(eos) is None:
            raise ValueError(
                f"the tokenizer {self.name!r} has {f'no token {eos!r}' if eos else 'no end-of-text token'}; set"
                " tokenizer.init_args.eos_token to one of its tokens"
            )
        if bos and backend.token_to_id(bos) is None:
            raise ValueError(f"the tokenizer {self.name!r} has no token {bos!r} (tokenizer.init_args.bos_token)")
        for token in filter(None, (eos, bos)):
            backend.add_special_tokens([token])  # an existing token keeps its id and becomes special
        self._backend = backend
        self._eos = int(backend.token_to_id(eos))
        self._bos = backend.token_to_id(bos) if bos else None
        ids = (backend.token_to_id(token) for token in (pad, unk) if token)
        self._pad = next((i for i in ids if i is not None and i != self._eos), 0 if self._eos != 0 else 1)
        self._size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        if isinstance(template, dict):  # several named templates
            template = template.get("default")
        self._template = template if isinstance(template, str) else PLAIN_TEMPLATE

    @classmethod
    def from_json(cls, text: str, name: str) -> HFTokenizer:
        """A tokenizer from the text of a `tokenizer.json`; it ends texts with the first usual token it knows.

        Raises:
            ValueError: when it is broken or knows none of the usual end tokens.
        """
        from tokenizers import Tokenizer as Backend

        tokenizer = cls(name)
        try:
            backend = Backend.from_str(text)
        except Exception as error:
            raise ValueError(f"{name!r} is not a tokenizer.json: {error}") from error
        known = [token for token in _USUAL_EOS if backend.token_to_id(token) is not None]
        tokenizer._finish(backend, eos=known[0] if known else None, bos="", pad="<pad>", unk="<unk>", template=None)
        return tokenizer

    @property
    def backend(self) -> Any:
        self.load()
        return self._backend

    def _get(self, name: str) -> Any:
        self.load()
        return getattr(self, name)

    vocab_size = property(lambda self: self._get("_size"))  # type: ignore[assignment]
    pad_id = property(lambda self: self._get("_pad"))  # type: ignore[assignment]
    eos_id = property(lambda self: self._get("_eos"))  # type: ignore[assignment]
    bos_id = property(lambda self: self._get("_bos"))  # type: ignore[assignment]
    chat_template = property(lambda self: self._get("_template"))  # type: ignore[assignment]

    @property
    def template_tokens(self) -> dict[str, str]:
        return {"bos_token": self.bos_text or self.token(self.bos_id), "eos_token": self.token(self.eos_id)}

    def to_dict(self) -> dict[str, Any]:
        return {
            "class_path": "lit_palm.data.tokenizers.HFTokenizer",
            "json": self.backend.to_str(),
            "eos_token": self.backend.id_to_token(self.eos_id),
            "bos_token": None if self.bos_id is None else self.backend.id_to_token(self.bos_id),
            "pad_token": self.backend.id_to_token(self.pad_id),
            "bos_text": self.bos_text,
            "chat_template": self.chat_template,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> HFTokenizer:
        from tokenizers import Tokenizer as Backend

        tokenizer = cls("saved tokenizer", chat_template=data["chat_template"])
        tokenizer.bos_text = data["bos_text"]
        tokenizer._finish(
            Backend.from_str(data["json"]),
            eos=data["eos_token"],
            bos=data["bos_token"],
            pad=data["pad_token"],
            unk=None,
            template=data["chat_template"],
        )
        return tokenizer
