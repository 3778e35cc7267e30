"""Run by test_sharded_families.py on two processes as a program: command lines of lit-palm, one after the other.

torchrun --nproc-per-node 2 -m tests.foreign.two_ranks COMMANDS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lit_palm.cli import main

if __name__ == "__main__":
    for command in json.loads(Path(sys.argv[1]).read_text()):
        if status := main(command):
            sys.exit(status)
