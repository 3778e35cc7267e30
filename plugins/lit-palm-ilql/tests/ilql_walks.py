"""Random walks on a graph (trlX's `randomwalks`): the shortest way to node a has to be put together from other walks.

Every walk goes on to a random neighbour until it meets node a or has ten nodes. A walk's rating says how near its
length is to that of the shortest one from where it begins. Whoever imitates walks at random; whoever learns what a step
is worth takes the shortest way.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

NODES, LONGEST = 21, 10


class Graph:
    """A directed graph of 21 nodes, of which node 0 is the goal, with about two edges from each.

    Args:
        seed: of the graph and the walks.
    """

    def __init__(self, seed: int = 1002) -> None:
        self.random = np.random.RandomState(seed)
        while True:
            self.edges = self.random.rand(NODES, NODES) > 0.9
            np.fill_diagonal(self.edges, False)
            if self.edges.any(1).all():
                break
        self.edges[0] = False
        self.shortest = np.full(NODES, LONGEST)  # in nodes, the first and the last one counted
        self.shortest[0] = 1
        for length in range(2, LONGEST):
            reached = self.edges[:, self.shortest == length - 1].any(1)
            self.shortest[reached & (self.shortest == LONGEST)] = length

    def walk(self) -> str:
        """A random walk from a random node, a letter a node."""
        nodes = [int(self.random.randint(1, NODES))]
        while nodes[-1] != 0 and len(nodes) < LONGEST:
            nodes.append(int(self.random.choice(np.nonzero(self.edges[nodes[-1]])[0])))
        return "".join(chr(ord("a") + node) for node in nodes)

    def optimality(self, walk: str) -> float:
        """1 for a shortest walk to the goal, 0 for one that does not get there in ten nodes or leaves the edges."""
        nodes = [ord(letter) - ord("a") for letter in walk]
        there = nodes[-1] == 0 and len(nodes) <= LONGEST and all(0 <= node < NODES for node in nodes)
        if not there or not all(self.edges[a, b] for a, b in pairwise(nodes)):
            return 0.0
        return float((LONGEST - len(nodes)) / (LONGEST - self.shortest[nodes[0]]))

    def score(self, prompts: list[str], completions: list[str]) -> list[float]:
        """The reward."""
        return [self.optimality(prompt + rest) for prompt, rest in zip(prompts, completions, strict=True)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as jsonl; the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
