"""A small data set."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_data import write_small


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("fashion"))
