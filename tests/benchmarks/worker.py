"""A process that runs sides: JSON lines on stdin, JSON lines on stdout, everything else on stderr.

    {"prepare": "slot", "call": "peers.language:train", "options": {...}}   -> {"ready": true}
    {"run": "slot"}                                                         -> {"cost": 1.25, "facts": {...}}
    {"drop": true}                                                          -> {"dropped": true}

A side is `function(**options)`; it returns what is to be timed, a callable. What that returns is facts (a dictionary,
or nothing); a fact `cost` takes the place of the seconds on the clock. An error is answered as {"error": "..."}, and
{"missing": "..."} where a package is not installed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TextIO

Work = Callable[[], dict[str, Any] | None]


def answer(request: dict[str, Any], slots: dict[str, Work]) -> dict[str, Any]:
    """What one request comes to."""
    if "prepare" in request:
        module, _, function = request["call"].partition(":")
        side = getattr(importlib.import_module(f"tests.benchmarks.{module}"), function)
        slots[request["prepare"]] = side(**request["options"])
        return {"ready": True}
    if "run" in request:
        work = slots[request["run"]]
        start = time.perf_counter()
        facts = dict(work() or {})
        seconds = time.perf_counter() - start
        return {"cost": facts.pop("cost", seconds), "facts": facts}
    for work in slots.values():
        getattr(work, "close", lambda: None)()
    slots.clear()
    gc.collect()
    return {"dropped": True}


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer until the requests end."""
    slots: dict[str, Work] = {}
    for line in requests:
        try:
            reply = answer(json.loads(line), slots)
        except ImportError as error:
            reply = {"missing": f"{error}"}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def main() -> None:
    """Keep stdout for answers: what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore")
    if os.environ.get("SIDE") == "ours":  # as by the command line, save how threads wait, which is the same for both
        from lit_palm.process import keep_code, keep_memory

        keep_code()
        keep_memory()
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with contextlib.suppress(KeyboardInterrupt):
        serve(sys.stdin, answers)
    answers.flush()
    os._exit(0)  # without waiting for training loops that stand still


if __name__ == "__main__":
    main()
