"""A small data set, and one thread in the tests' own process too: more of them only wait for each other here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_data import write_small


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("fashion"))
