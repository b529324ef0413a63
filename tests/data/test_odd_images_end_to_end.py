"""Odd files written with FFCV for real and read back by the loader: the pixels that training sees."""

from pathlib import Path

import numpy as np
from noise_images import save_noise
from PIL import Image
from small_data import batches_of

from coe_dist.data.beton import write_file
from coe_dist.data.samples import read_samples
from coe_dist.data.sidecar import read_sidecar

SIDE = 40


def read_back(beton: Path, resolution: int) -> dict[str, np.ndarray]:
    """File name -> [3,resolution,resolution], without augmentation."""
    samples = read_samples(beton, read_sidecar(beton).count)
    assert samples is not None
    return {
        Path(samples[int(i)].file).name: image.numpy()
        for batch in batches_of(beton, resolution, 4)
        for i, image in zip(batch.ids_B, batch.images_BCHW, strict=True)
    }


def test_rotation_is_applied_once(tmp_path: Path) -> None:
    """Left half red, right half blue, and each of the eight ways a camera can note how it was held."""
    upright = np.zeros((SIDE, SIDE, 3), np.uint8)
    upright[:, : SIDE // 2, 0] = upright[:, SIDE // 2 :, 2] = 255
    upright[: SIDE // 2, :, 1] = 200  # and the upper half lighter, so that no two of the eight look alike
    turns = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),  # stored as the sensor saw it; shown turned by 270 degrees
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, 3),
    }
    for orientation, turned in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / "train" / "a" / f"{orientation}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(turned(upright))).save(path, quality=100, subsampling=0, exif=exif)
    for fraction in (0.0, 1.0):
        beton = tmp_path / f"{fraction}" / "train.beton"
        write_file(tmp_path / "train", beton, jpeg_fraction=fraction, jpeg_quality=100)
        found = read_back(beton, SIDE)
        assert len(found) == 8
        for name, image in found.items():
            different = np.abs(image.transpose(1, 2, 0).astype(int) - upright)
            quarters = [different[y : y + 12, x : x + 12] for y in (4, 24) for x in (4, 24)]  # away from the edges
            assert max(quarter.max() for quarter in quarters) < 12, name


def test_extreme_shapes_reach_the_network(tmp_path: Path) -> None:
    colour = (10, 200, 30)
    for width, height in ((1, 1), (1, 600), (600, 1), (20_000, 2)):
        path = tmp_path / "train" / "a" / f"{width}x{height}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (width, height), colour).save(path)
    save_noise(tmp_path / "train" / "b" / "plain.png", 50, 60, 0)
    for limit in (None, 500):
        beton = tmp_path / f"{limit}" / "train.beton"
        write_file(tmp_path / "train", beton, max_resolution=limit)
        found = read_back(beton, 32)
        assert len(found) == 5
        for name, image in found.items():
            assert image.shape == (3, 32, 32)
            if name != "plain.png":
                assert (image.transpose(1, 2, 0) == colour).all(), name
