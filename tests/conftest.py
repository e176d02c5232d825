"""Fixtures shared by the tests."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported anywhere: the suite shares a small machine with its own worker processes.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRITON_INTERPRET", "1")
# torch.compile in this process: its pool would first start processes that import torch again.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from tests_support import write_shapes

# While the tests' libraries are imported, and as the process ends, there is no garbage among their objects to look for.
gc.disable()
atexit.register(gc.freeze)

# Unit tests that take half a minute or more, which begin with the slow folders: none is to be the last.
_LONG = {"test_annotate", "test_convert", "test_prepare", "test_prepare_faults", "test_training"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Distributed and end-to-end tests first, and what takes long among the others."""
    items.sort(key=lambda item: item.path.parent.name in ("kernels", "unit") and item.path.stem not in _LONG)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The key that signs run folders is the tests' own, not the user's."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="module", autouse=True)
def _environment(_state: None) -> Iterator[None]:
    """A training in this process leaves RANK and WORLD_SIZE, MLflow its store: not to the next file's tests."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shard set of write_shapes, made once."""
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set")


@pytest.fixture(scope="session")
def small_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 16x16 pixels, for trainings: half the time."""
    return write_shapes(tmp_path_factory.mktemp("small-shapes") / "set", size=16)
