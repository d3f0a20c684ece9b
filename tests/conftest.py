"""What every test runs under: no network, one thread, the data packs where they are."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Small nets are no faster on more threads, and sums keep their order."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def few_collections() -> Iterator[None]:
    """A run collects garbage after each stage: spare it all that was there before."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real pictures and small weights."""
    from flowkit.data import data_folder

    folder = data_folder()
    if not (folder / "weights").is_dir():
        pytest.skip(f"no data packs in {folder}; set FLOWKIT_DATA to their folder")
    return folder
