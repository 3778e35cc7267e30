"""One GGUF file that llama.cpp runs: a PaLM as its architecture `command-r`, the tokeniser included.

The format and the names are the `gguf` package's; what each value means is llama.cpp's (src/llama-model.cpp and
src/llama-vocab.cpp). Its command-r asks for more than PaLM does, so other shapes are refused by name:
- heads * head_dim is d_model, since it sizes queries and the attention's output by d_model;
- q/k norms are there from 64 blocks on and not below, because it tells Command-R+ from Command-R by that;
- the tokeniser is byte-level BPE whose words are split as one of llama.cpp's own pre-tokenisers does.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_palm.convert.tokenizer_files import exported_template, tokenizers_backend
from lit_palm.models.palm import PaLMConfig

if TYPE_CHECKING:
    from lit_palm.convert.exporting import Exported

__all__ = ["pre_tokenizer_of", "write_gguf"]

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MANY_BLOCKS = 64

# how llama.cpp calls the ways to cut a text into words before bytes are merged, by their patterns in tokenizer.json
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}


def pre_tokenizer_of(backend: Any, where: str) -> str:
    """What llama.cpp calls the pre-tokeniser of a `tokenizers.Tokenizer`.

    Raises:
        ValueError: the tokeniser is no byte-level BPE, or cuts words in a way that llama.cpp does not know.
    """
    found = json.loads(backend.to_str())
    if found["model"]["type"] != "BPE" or found["model"].get("byte_fallback"):
        kind = "BPE with byte fallback" if found["model"]["type"] == "BPE" else found["model"]["type"]
        raise ValueError(f"{where}: its tokeniser is {kind}, and only byte-level BPE can be written as GGUF here")
    if found.get("normalizer") not in (None, {"type": "NFC"}):  # composed text is what nearly all text is
        raise ValueError(
            f"{where}: its tokeniser changes texts ({found['normalizer']['type']}), which llama.cpp does not"
        )
    name = _known_pre_tokenizer(found)
    if name is None or bool(found["model"].get("ignore_merges")) is not (name == "llama-bpe"):
        stages = found.get("pre_tokenizer") or {}
        kinds = ", ".join(part.get("type", "none") for part in stages.get("pretokenizers", [stages]))
        raise ValueError(
            f"{where}: its tokeniser cuts texts into words ({kinds}) as no pre-tokeniser of llama.cpp that is known "
            "here: export a huggingface folder and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    return name


def _known_pre_tokenizer(found: dict[str, Any]) -> str | None:
    """The name for the stages that a tokenizer.json describes; None where there is none."""
    stages = found.get("pre_tokenizer") or {}
    *before, last = stages.get("pretokenizers", [stages])
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(before) > 1:
        return None
    own = bool(last.get("use_regex", True))  # GPT-2's pattern, in the stage itself
    if not before:
        return "gpt-2" if own or not found["model"]["merges"] else None  # without merges words may end anywhere
    if own:
        return "command-r" if before[0] == {"type": "Digits", "individual_digits": True} else None
    if before[0].get("type") != "Split" or before[0].get("behavior") != "Isolated":
        return None
    return _PATTERNS.get(str((before[0].get("pattern") or {}).get("Regex")))


def write_gguf(exported: Exported, target: str) -> None:
    """Write the file; one tensor is in memory at a time, and the file appears when it is whole.

    Args:
        exported: a language model.
        target: a name that ends in `.gguf`.

    Raises:
        ValueError: the network or the tokeniser has what llama.cpp does not run, or the package `gguf` is missing.
    """
    path = exported.checkpoint.path
    if not target.endswith(".gguf"):
        raise ValueError(f"{target}: GGUF is one file; give it a name that ends in .gguf")
    if os.path.exists(target) and not _is_gguf(target):
        raise ValueError(f"{target}: is there, and no GGUF file; name another")
    config = exported.config
    if exported.weights is None or not isinstance(config, PaLMConfig):
        raise ValueError(
            f"{path}: its network is a {exported.architecture['model_type']} of transformers: export a huggingface "
            "folder and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    _check_shape(exported, config)
    try:
        import gguf
    except ImportError as error:
        raise ValueError("writing GGUF files takes a package: pip install 'lit-palm[gguf]'") from error
    writer = gguf.GGUFWriter(None, "command-r")
    _describe(writer, gguf, exported, config)
    _add_tokenizer(writer, gguf, exported, config)
    recipes = exported.weights.recipes
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    for name, recipe in recipes.items():
        flat = len(recipe.shape) == 1 or "_norm." in name  # llama.cpp computes norms in float32
        kind = gguf.GGMLQuantizationType["F32" if flat else types.get(recipe.dtype, "F32")]
        size = torch.Size(recipe.shape).numel() * (2 if kind.name in ("F16", "BF16") else 4)
        # the shape is told in elements: the package takes that of a type which is not uint8 as it is
        writer.add_tensor_info(_renamed(name), recipe.shape, torch.empty(0).numpy().dtype, size, raw_dtype=kind)
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    new = os.path.join(os.path.dirname(os.path.abspath(target)), f".{os.path.basename(target)}.tmp")
    kinds = {name: info.dtype.name for tensors in writer.tensors for name, info in tensors.items()}
    try:
        writer.write_header_to_file(new)  # type: ignore[arg-type]
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, recipe in recipes.items():  # as stored: norms that stay float32 are not rounded on the way
            writer.write_tensor_data(_as_bytes(recipe.make(), kinds[_renamed(name)]))
        writer.close()
        os.replace(new, target)
    finally:
        writer.close()
        if os.path.exists(new):
            os.unlink(new)


def _is_gguf(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _as_bytes(tensor: Tensor, kind: str) -> Any:
    wide = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    return tensor.detach().to(wide).contiguous().reshape(-1).view(torch.uint8).cpu().numpy()


def _renamed(name: str) -> str:
    stem = name.removesuffix(".weight")
    block = re.match(r"model\.layers\.(\d+)\.(.*)", stem)
    return f"blk.{block[1]}.{_NAMES[block[2]]}.weight" if block else f"{_NAMES[stem]}.weight"


def _check_shape(exported: Exported, config: PaLMConfig) -> None:
    path = exported.checkpoint.path
    way_out = "export a huggingface folder, which transformers runs"
    if "score.weight" in (exported.weights or {}):
        raise ValueError(f"{path}: llama.cpp's command-r has no scalar head, so a reward model stays with transformers")
    if config.num_heads * config.head_dim != config.d_model:
        raise ValueError(
            f"{path}: {config.num_heads} heads of {config.head_dim} are {config.num_heads * config.head_dim} wide, and "
            f"llama.cpp's command-r asks for d_model ({config.d_model}): {way_out}"
        )
    normed = config.qk_norm == "layer"
    if normed and config.num_layers < _MANY_BLOCKS:
        raise ValueError(
            f"{path}: {config.num_layers} blocks with qk_norm, and llama.cpp's command-r reads q/k norms only from "
            f"{_MANY_BLOCKS} blocks on: {way_out}"
        )
    if not normed and config.num_layers >= _MANY_BLOCKS:
        raise ValueError(
            f"{path}: {config.num_layers} blocks without qk_norm, and llama.cpp's command-r asks for q/k norms from "
            f"{_MANY_BLOCKS} blocks on: {way_out}"
        )


def _describe(writer: Any, gguf: Any, exported: Exported, config: PaLMConfig) -> None:
    architecture = exported.architecture
    writer.add_type("model")
    writer.add_name(os.path.basename(exported.checkpoint.path.rstrip("/")))
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(architecture["intermediate_size"])
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_logit_scale(architecture["logit_scale"])
    writer.add_vocab_size(config.vocab_size)
    kinds = {"float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[kinds.get(architecture["torch_dtype"], "ALL_F32")])


def _add_tokenizer(writer: Any, gguf: Any, exported: Exported, config: PaLMConfig) -> None:
    tokenizer, path = exported.tokenizer, exported.checkpoint.path
    backend = tokenizers_backend(tokenizer, path)
    pre = pre_tokenizer_of(backend, path)
    added = backend.get_added_tokens_decoder()
    size = config.vocab_size or 0
    texts = [f"<unused {i}>" for i in range(size)]  # where the network has more ids than the tokeniser
    kinds = [gguf.TokenType.UNUSED] * size
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        texts[index], kinds[index] = token, gguf.TokenType.NORMAL
        if index in added:
            kinds[index] = gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in json.loads(backend.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    writer.add_token_types([int(kind) for kind in kinds])
    # llama.cpp asks for a list, and GGUF has no empty one: two special tokens never stand side by side as characters
    writer.add_token_merges(merges or [f"{tokenizer.token(tokenizer.pad_id)} {tokenizer.token(tokenizer.eos_id)}"])
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)
    template = exported_template(tokenizer)
    if template:
        writer.add_chat_template(_without_generation(template))


def _without_generation(template: str) -> str:
    """The template without the tags that mark what the assistant wrote, which llama.cpp does not know."""
    opened = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", opened)
