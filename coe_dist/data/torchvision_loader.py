"""The same batches as the FFCV loader's, without FFCV: Pillow decodes, torchvision crops and resizes, in threads.

For machines where FFCV cannot be built; it reads the .beton files that were written elsewhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from coe_dist.data.augment import augmentation_key, placements, random_crops
from coe_dist.data.batches import Batch, SplitReader
from coe_dist.data.random_operations import apply_random_operations
from coe_dist.data.sidecar import check_labels
from coe_dist.data.stored import StoredImages
from coe_dist.errors import TrainingError
from coe_dist.preparation import centre_crops

AHEAD = 2  # batches decoded before they are asked for


class TorchvisionLoader(SplitReader):
    """See SplitReader."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._stored = StoredImages(self.beton)
        check_labels(self.beton, self.info, self._stored.labels_N)
        self._pool = ThreadPoolExecutor(self.threads, "decode")
        self._reading = 0  # the number of epochs started

    def close(self) -> None:
        self._reading += 1
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, epoch: int, batches: list[npt.NDArray[np.int64]]) -> Iterator[Batch]:
        self._reading += 1
        reading = self._reading
        waiting: deque[tuple[npt.NDArray[np.int64], list[Future[torch.Tensor]]]] = deque()
        coming = iter(batches)
        try:
            for _ in batches:
                while len(waiting) <= AHEAD and (ids_B := next(coming, None)) is not None:
                    waiting.append((ids_B, self._start(epoch, ids_B)))
                if self._reading != reading:
                    raise RuntimeError(f"{self.beton}: epoch {epoch} was ended by the start of another one")
                yield self._finished(epoch, *waiting.popleft())
        finally:
            for _, images in waiting:
                for image in images:
                    image.cancel()

    def _start(self, epoch: int, ids_B: npt.NDArray[np.int64]) -> list[Future[torch.Tensor]]:
        key = augmentation_key(self.seed, epoch)
        sizes_B2 = np.array([self._stored.size(i) for i in ids_B], np.int64).reshape(-1, 2)
        if self.augmentation is not None and self.augmentation.random_resized_crop:
            crops_B4 = random_crops(key, ids_B, sizes_B2[:, 0], sizes_B2[:, 1])
        elif self.info.shape == (self.resolution, self.resolution):
            crops_B4 = np.concatenate([sizes_B2 * 0, sizes_B2], axis=1)
        else:
            crops_B4 = centre_crops(sizes_B2[:, 0], sizes_B2[:, 1])
        place = zip(*(values.tolist() for values in placements(self.augmentation, key, ids_B)), strict=True)
        return [
            self._pool.submit(self._image, self.side_of(epoch), *parameters)
            for parameters in zip(ids_B.tolist(), crops_B4.tolist(), place, strict=True)
        ]

    def _finished(self, epoch: int, ids_B: npt.NDArray[np.int64], images: list[Future[torch.Tensor]]) -> Batch:
        if not len(ids_B):
            return self.empty(self.side_of(epoch))
        try:
            images_BCHW = torch.stack([image.result() for image in images])
        except Exception as error:
            raise TrainingError(f"{self.beton}: the data loader failed: {type(error).__name__}: {error}") from error
        apply_random_operations(self.augmentation, augmentation_key(self.seed, epoch), ids_B, images_BCHW.numpy())
        return Batch(images_BCHW, torch.from_numpy(self._stored.labels_N[ids_B]), torch.from_numpy(ids_B.copy()))

    def _image(self, pixels: int, index: int, crop: list[int], place: tuple[int, int, bool]) -> torch.Tensor:
        """uint8 [C,pixels,pixels]; crop (top, left, height, width), place (down, right, mirrored)."""
        down, right, mirrored = place
        side = [pixels, pixels]
        try:
            pixels_HW3 = self._stored.pixels(index)
        except ValueError as error:
            raise ValueError(f"image {index}: {error}") from error
        image_CHW: torch.Tensor = torch.from_numpy(np.array(pixels_HW3)).permute(2, 0, 1)[: self.info.channels]
        image_CHW = transforms.resized_crop(
            image_CHW, *crop, size=side, interpolation=InterpolationMode.BILINEAR, antialias=True
        )
        if down or right:
            margin = max(abs(down), abs(right))
            image_CHW = transforms.crop(transforms.pad(image_CHW, [margin]), margin - down, margin - right, *side)
        if mirrored:
            image_CHW = transforms.horizontal_flip(image_CHW)
        return image_CHW
