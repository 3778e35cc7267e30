"""A cache of tokenised data that no other test sees, one thread, and a quiet Lightning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import make_stages


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Lightning's notes (no logger, few batches, `max_epochs` reached) are not what these tests are about
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what several tests read and none changes."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture(scope="session")
def stages(session_folder: Path) -> dict[str, Path]:
    """A checkpoint of every stage by name: `language_model`, `reward_model`, `policy`."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("LIT_PALM_CACHE", str(session_folder / "cache"))
        warnings.filterwarnings("ignore", module="lightning")
        return make_stages(session_folder)
