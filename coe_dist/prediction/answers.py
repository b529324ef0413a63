"""Chunks of files -> one row a file, in order; the next chunks are decoded while the model answers one.

A chunk is `batch` files that follow each other in the listing, and the readable ones of it are one batch of the model:
whoever works on a chunk, and in whatever order, its answers are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from coe_dist.inference import CollaborationOfExperts
from coe_dist.prediction.decode import decode
from coe_dist.prediction.files import Broken
from coe_dist.preparation import Pixels

_AHEAD = 2  # chunks decoded, or being decoded, while the model is at work


class Prediction(NamedTuple):
    """classes and probabilities: the `top` most probable, falling; expert None: early exit; macs: spent on it."""

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    expert: int | None
    macs: int


Row = Prediction | Broken


def chunks_of(files: Sequence[str], batch: int) -> Iterator[Sequence[str]]:
    return (files[first : first + batch] for first in range(0, len(files), batch))


def predict_files(
    model: CollaborationOfExperts,
    files: Sequence[str],
    *,
    batch: int,
    top: int,
    threads: int,
    device: torch.device,
) -> Iterator[list[Row]]:
    """The rows of each chunk of `batch` files, all in the order of `files`; `threads` decode."""
    model = model.to(device)
    with ThreadPoolExecutor(threads, "decode") as pool:
        try:
            chunks = (
                (chunk, [pool.submit(decode, file, model.preparation) for file in chunk])
                for chunk in chunks_of(files, batch)
            )
            waiting: deque[tuple[Sequence[str], list[Future[Pixels | Broken]]]] = deque(islice(chunks, 1 + _AHEAD))
            while waiting:
                chunk, futures = waiting.popleft()
                decoded = [future.result() for future in futures]
                waiting.extend(islice(chunks, 1))
                yield answer(model, chunk, decoded, top=top, device=device)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def answer(
    model: CollaborationOfExperts,
    files: Sequence[str],
    decoded: Sequence[Pixels | Broken],
    *,
    top: int,
    device: torch.device,
) -> list[Row]:
    """One row for each file, from one batch of the model; `decoded` as decode gives it."""
    readable = [file for file, pixels in zip(files, decoded, strict=True) if not isinstance(pixels, Broken)]
    images = [pixels for pixels in decoded if not isinstance(pixels, Broken)]
    rows: Iterator[Row] = iter(())
    if images:
        probabilities_NC, expert_N, macs_N = model(torch.from_numpy(np.stack(images)).to(device))
        # a stable sort, so that of equally probable classes the first is named, as argmax does
        sorted_NC, classes_NC = probabilities_NC.sort(dim=1, descending=True, stable=True)
        rows = (
            Prediction(
                file, tuple(model.classes[c] for c in classes), tuple(values), None if expert < 0 else expert, macs
            )
            for file, classes, values, expert, macs in zip(
                readable,
                classes_NC[:, :top].tolist(),
                sorted_NC[:, :top].tolist(),
                expert_N.tolist(),
                macs_N.tolist(),
                strict=True,
            )
        )
    return [pixels if isinstance(pixels, Broken) else next(rows) for pixels in decoded]
