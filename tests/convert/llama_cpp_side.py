"""Run by a Python that has `llama_cpp` and nothing of ours: what llama.cpp makes of a GGUF file, as JSON.

python llama_cpp_side.py MODEL.gguf < request.json      # {"texts": [...], "prompts": [[ids], ...], "new": 64}
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from llama_cpp import Llama

    request = json.load(sys.stdin)
    exact = {"type_k": 0, "type_v": 0}  # keys and values in float32: they are float16 unless told otherwise
    model = Llama(sys.argv[1], n_ctx=128, n_batch=128, n_threads=1, logits_all=True, verbose=False, **exact)
    ids = [model.tokenize(text.encode(), add_bos=True, special=False) for text in request["texts"]]
    greedy, logits = [], []
    for prompt in request["prompts"]:
        model.reset()
        model.eval(prompt)
        logits.append([float(x) for x in model.scores[len(prompt) - 1]])
        made: list[int] = []
        while len(made) < request["new"]:
            made.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(made[-1:])
        greedy.append(made)
    begins = model.metadata.get("tokenizer.ggml.add_bos_token")
    template = model.metadata.get("tokenizer.chat_template")
    json.dump({"ids": ids, "greedy": greedy, "logits": logits, "begins": begins, "template": template}, sys.stdout)


if __name__ == "__main__":
    main()
