"""The loader's benchmark runs on its own images and has the promised form; nothing here looks at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coe_dist.bench.loader import CLASSES, benchmark_images
from coe_dist.bench.loader_parts import file_parts
from coe_dist.bench.loader_peers import torchvision_loader
from coe_dist.bench.run import run_bench, show
from coe_dist.data.synthetic import HEIGHT, WIDTH

FIGURES = {"seconds", "fastest_seconds", "spread", "cpu_seconds", "images_per_second", "cpu_seconds_per_1000"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark_images(24, tmp_path_factory.mktemp("images"))


def test_quick_run_has_every_peer_and_figure(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(json.dumps(run_bench("loader", quick=True)))
    assert record["name"] == "loader"
    assert record["versions"]["torchvision"] != "not installed"
    (measured,) = record["cases"]
    assert measured["case"].items() >= {"max_resolution": 500, "jpeg_fraction": 0.5, "images": 96}.items()
    ours = measured["ours"]
    assert ours.keys() == FIGURES | {"bytes_per_image", "parts"}
    assert 0 < ours["parts"]["jpeg_share"] < 1
    assert min(ours["parts"]["jpeg_ms"], ours["parts"]["resample_ms"], ours["cpu_seconds"]) > 0
    assert set(measured["peers"]) == {"torchvision", "torchvision_tensor"}
    for peer in measured["peers"].values():
        assert peer["ratio"] == peer["seconds"] / ours["seconds"]
        assert peer["cpu_ratio"] == peer["cpu_seconds"] / ours["cpu_seconds"]
        assert peer["images_per_second"] == 96 / peer["seconds"]
    show(record)
    assert "CPU" in capsys.readouterr().out


def test_images_are_made_once_alike_and_all_different(images: Path, tmp_path: Path) -> None:
    files = sorted(images.glob("train/*/*.JPEG"))
    assert len(files) == 24
    assert len(list(images.glob("val/*/*.JPEG"))) == CLASSES
    assert len({file.read_bytes() for file in files}) == 24
    for file in files:
        with Image.open(file) as image:
            assert WIDTH[0] <= image.width <= WIDTH[1]
            assert HEIGHT[0] <= image.height <= HEIGHT[1]
    written = [file.stat().st_mtime_ns for file in files]
    benchmark_images(24, images)
    assert [file.stat().st_mtime_ns for file in files] == written
    again = benchmark_images(24, tmp_path)
    assert (again / files[5].relative_to(images)).read_bytes() == files[5].read_bytes()


def test_images_have_a_natural_spectrum(images: Path) -> None:
    """Amplitude falls as 1/f: its logarithm over that of the frequency has a slope near -1."""
    slopes = []
    for file in sorted(images.glob("train/*/*.JPEG"))[:8]:
        pixels = np.asarray(Image.open(file).convert("L"), float)[:256, :256]
        window = np.hanning(256)[:, None] * np.hanning(256)
        amplitude = np.abs(np.fft.fft2((pixels - pixels.mean()) * window))
        frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.fftfreq(256)[None])
        chosen = (frequency > 0.02) & (frequency < 0.3)
        slopes.append(np.polyfit(np.log(frequency[chosen]), np.log(amplitude[chosen]), 1)[0])
    assert -1.3 < np.mean(slopes) < -0.7


@pytest.mark.parametrize("form", ["pil", "tensor"])
def test_the_peer_gives_every_image_once(images: Path, form: str) -> None:
    loader = torchvision_loader(images / "train", 32, 10, 1, form=form)
    batches = list(loader)
    assert [tuple(batch.shape) for batch, _ in batches] == [(10, 3, 32, 32)] * 2 + [(4, 3, 32, 32)]
    assert all(str(batch.dtype) == "torch.uint8" for batch, _ in batches)
    assert np.bincount(np.concatenate([labels for _, labels in batches])).tolist() == [6] * CLASSES
    assert min(file_parts(sorted(images.glob("train/*/*.JPEG"))[:4], 32).values()) > 0
