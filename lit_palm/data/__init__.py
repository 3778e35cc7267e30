"""Data: LightningDataModules for text, demonstrations, preferences and prompts; tokenizers and chat templates."""

from lit_palm.data.base import TokenizedData
from lit_palm.data.demonstrations import DemonstrationData
from lit_palm.data.preferences import PreferenceData
from lit_palm.data.prompts import PromptData
from lit_palm.data.readers import Reader
from lit_palm.data.stream_sources import TextSource
from lit_palm.data.streaming import StreamingTextData
from lit_palm.data.text import TextData
from lit_palm.data.tokenizers import BPETokenizer, ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "DemonstrationData",
    "HFTokenizer",
    "PreferenceData",
    "PromptData",
    "Reader",
    "StreamingTextData",
    "TextData",
    "TextSource",
    "TokenizedData",
    "Tokenizer",
    "load_tokenizer",
]
