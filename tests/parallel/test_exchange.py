from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks


@pytest.mark.parametrize("world_size", [2, 4])
def test_exchange_over_processes(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, "parallel.exchange_cases:run", tmp_path)
