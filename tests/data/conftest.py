"""Small data sets, written once per test session with FFCV for real."""

from __future__ import annotations

from pathlib import Path

import pytest
from noise_images import save_noise

from coe_dist.data.beton import write_dataset

FASHION_COUNT = 203  # prime to most world sizes and batches


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    write_dataset("fashion-mnist", folder, limit=FASHION_COUNT)
    return folder


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train (2 classes of 12) and val (2 of 3), sizes from 40 to 71 pixels."""
    root = tmp_path_factory.mktemp("tree")
    for split, count in (("train", 12), ("val", 3)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                save_noise(root / split / name / f"{i}.png", 40 + 2 * i, 71 - 2 * i, 100 * label + i)
    return root
