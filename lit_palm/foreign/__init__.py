"""What other tools wrote, read as if it were a checkpoint of ours: Hugging Face folders and hub names, GGUF files,
adapters of `peft`.

    header = foreign_header("path/to/Llama-3.2-1B")     # the `lit_palm` entry that a checkpoint of it would have
    weights = foreign_weights("path/to/Llama-3.2-1B")   # by name, each read when it is asked for

Nothing that is read can run code: weights come from safetensors and GGUF files, and the Python files that some folders
bring are left alone unless the environment says LIT_PALM_REMOTE_CODE=1.
"""

from lit_palm.foreign.folders import fetch, foreign_header, foreign_weights, is_foreign
from lit_palm.foreign.peft_folders import adapter_base, adapter_entry, adapter_weights, is_adapter

__all__ = [
    "adapter_base",
    "adapter_entry",
    "adapter_weights",
    "fetch",
    "foreign_header",
    "foreign_weights",
    "is_adapter",
    "is_foreign",
]
