"""`RemoteEngine` keeps to what every engine must, in front of a real `lit-palm serve`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lit_palm.rollout.engine import Engine
from lit_palm.rollout.remote import RemoteEngine
from lit_palm.testing import EngineConformance, tiny_network
from tests.serve.conftest import Server, write_checkpoint

pytest.importorskip("litserve")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Server]:
    sizes = vars(tiny_network().config)
    changes = {name: sizes[name] for name in ("d_model", "num_layers", "num_heads", "head_dim", "max_length")}
    path = write_checkpoint(tmp_path_factory.mktemp("served"), **changes)
    running = Server(path, "--weight_updates", str(folder), "--max_batch_size", "16")
    yield running
    running.kill()


class TestRemoteEngine(EngineConformance):
    @pytest.fixture
    def engine(self, server: Server, folder: Path) -> Callable[..., Engine]:
        return functools.partial(RemoteEngine, url=f"{server.url}/v1", weights_dir=str(folder), retries=0, timeout=60.0)
