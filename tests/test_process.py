"""What `lit-palm` settles for its process before torch is loaded, unless the user has said it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os, sys

class Watch:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(*(os.environ.get(name) for name in NAMES))

sys.meta_path.insert(0, Watch())
from lit_palm.cli import main
main(["fit", "--help"])
"""
NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

FAULTS = """
import resource, statistics
from lit_palm.process import prepare_process
prepare_process()
import torch

def pages():
    '''Tensors of 64 and 40 MB come and go, as in a step.'''
    first = torch.ones(2**24)
    small, second = first[:1000] * 2, torch.ones(10 * 2**20)
    del first
    third = torch.ones(2**24)
    del small, second, third
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

counts = [pages() for _ in range(24)]
# of most steps: where its small blocks come to lie, the heap may still grow once by a tensor
print(int(statistics.median(b - a for a, b in zip(counts, counts[1:]))))
"""


def output(script: str, own: dict[str, str]) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in NAMES and not k.startswith("MALLOC_")} | own
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.stdout.splitlines()[0]


@pytest.mark.parametrize(
    "own, found",
    [
        ({}, "3000 None 64 64"),
        ({"GOMP_SPINCOUNT": "7", "LRU_CACHE_CAPACITY": "9"}, "7 None 64 9"),
        ({"OMP_WAIT_POLICY": "PASSIVE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}, "None PASSIVE 0 64"),
    ],
)
def test_threads_spin_for_a_while_and_code_is_kept_for_64_shapes(own: dict[str, str], found: str) -> None:
    assert output(SCRIPT.replace("NAMES", repr(NAMES)), own) == found


@pytest.mark.skipif(not os.path.exists("/lib64/ld-linux-x86-64.so.2"), reason="glibc's malloc on 4 kB pages")
def test_memory_of_large_tensors_is_paged_in_once() -> None:
    kept, given_back = (int(output(FAULTS, own)) for own in ({}, {"MALLOC_ARENA_MAX": "1"}))
    assert kept < 1000, "64 MB are 16,384 pages"
    assert given_back == 0 or kept < given_back / 10  # 0 of a kernel that gives it huge pages
