"""FFCV's writer, watched: a worker that raises, dies or stands still ends in an error instead of a hang (ffcv#1, #387).

1. Worker processes take chunks of (place, index), read `images[index]`, and append pages to the file (FFCV's code).
2. This process looks five times a second for a reported failure, a dead worker, or no progress for too long.
3. When all images are done it collects the allocation tables, still watching, and completes the file (FFCV's code).
4. The size is checked: on a full disk FFCV's unbuffered writes can come up short without an exception.
"""

from __future__ import annotations

import ctypes
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from coe_dist.data.checksums import CheckedSplit, ChecksummedField
from coe_dist.data.ffcv_binding import (
    DatasetWriter,
    IntField,
    MemoryAllocator,
    RGBImageField,
    worker_job_indexed_dataset,
)
from coe_dist.data.sources import SourceSplit
from coe_dist.errors import TrainingError

CHUNK = 32  # images a worker takes at a time: small, so that progress is seen often
SMALLEST_PAGE = 1 << 23
LARGEST_PAGE = 1 << 31


class WriterError(TrainingError):
    """The file could not be written: one line with the cause."""


def write_beton(
    path: Path,
    split: SourceSplit,
    *,
    jpeg_fraction: float = 0.0,
    jpeg_quality: int = 90,
    workers: int = 1,
    stall_seconds: float = 600.0,
    on_progress: Callable[[int], None] | None = None,
) -> list[int]:
    """Writes all images of a split, in order, to `path`. Which images become JPEG depends on their index alone; with
    one worker the file is the same byte for byte each time.

    Returns the CRC-32 of every image's stored bytes. Raises WriterError; the caller removes an unfinished file.
    """
    if split.largest * 3 > LARGEST_PAGE:
        raise WriterError(f"{path}: an image of {split.largest} pixels does not fit FFCV's pages; set max_resolution")
    page_size = max(SMALLEST_PAGE, 1 << (split.largest * 3 - 1).bit_length())
    mode = "raw" if jpeg_fraction == 0 else "jpg" if jpeg_fraction == 1 else "proportion"
    image = RGBImageField(write_mode=mode, jpeg_quality=jpeg_quality, compress_probability=jpeg_fraction)
    checked = ChecksummedField(image, len(split))
    writer = _WatchedWriter(path, {"image": image, "label": IntField()}, page_size, workers, stall_seconds, on_progress)
    try:
        writer.from_indexed_dataset(CheckedSplit(split, checked), chunksize=CHUNK)
    except OSError as error:
        raise WriterError(f"{path}: {error}") from error
    return list(checked.checksums_N)


class _WatchedWriter(DatasetWriter):  # type: ignore[misc]
    def __init__(
        self,
        path: Path,
        fields: dict[str, Any],
        page_size: int,
        workers: int,
        stall_seconds: float,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        super().__init__(str(path), fields, page_size=page_size, num_workers=workers)
        self._stall_seconds = stall_seconds
        self._on_progress = on_progress or (lambda done: None)

    def _write_common(
        self, num_samples: int, queue_content: Iterable[Any], work_fn: Any, extra_worker_args: Any
    ) -> None:
        """In place of FFCV's, which waits for the last image for ever."""
        context = get_context("fork")
        self.num_samples = num_samples
        self.prepare()
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        tasks, tables, failures = context.Queue(), context.Queue(), context.SimpleQueue()
        done = context.Value(ctypes.c_uint64, 0)
        arguments = (tasks, self.metadata_sm, self.metadata_type, self.fields, allocator, done, tables)
        workers = [
            context.Process(target=_work, args=(failures, *arguments, *extra_worker_args), daemon=True)
            for _ in range(self.num_workers)
        ]
        try:
            for worker in workers:  # before the queue starts its thread: forking a process with threads is fragile
                worker.start()
            for chunk in queue_content:
                tasks.put(chunk)
            for _ in workers:
                tasks.put(None)
            self._watch(workers, failures, done, num_samples)
            allocations: list[Any] = []
            for _ in workers:
                allocations.extend(self._table(workers, failures, tables))
            self.finalize(allocations)
            self._check_size(allocator)
        finally:
            for worker in workers:
                if worker.pid is not None:
                    worker.terminate()
                    worker.join()
            tasks.cancel_join_thread()
            self.metadata_sm.close()
            self.metadata_sm.unlink()

    def _watch(self, workers: Sequence[BaseProcess], failures: Any, done: Any, total: int) -> None:
        seen, moved = 0, time.monotonic()
        while seen < total:
            time.sleep(0.02 if total <= 10_000 else 0.2)
            if done.value != seen:
                seen, moved = int(done.value), time.monotonic()
                self._on_progress(seen)
            self._raise_failure(workers, failures)
            if time.monotonic() - moved > self._stall_seconds:
                raise WriterError(
                    f"{self.fname}: no progress for {self._stall_seconds:g} s after {seen} of {total} images"
                )

    def _table(self, workers: Sequence[BaseProcess], failures: Any, tables: Any) -> list[Any]:
        deadline = time.monotonic() + self._stall_seconds
        while time.monotonic() < deadline:
            try:
                table: list[Any] = tables.get(timeout=0.2)
                return table
            except queue.Empty:
                self._raise_failure(workers, failures)
        raise WriterError(f"{self.fname}: a worker did not finish within {self._stall_seconds:g} s")

    def _raise_failure(self, workers: Sequence[BaseProcess], failures: Any) -> None:
        codes = [(worker.pid, worker.exitcode) for worker in workers if worker.exitcode]
        if not failures.empty():  # looked at after the exit codes: a worker tells its reason before it exits
            raise WriterError(f"{self.fname}: {failures.get()}")
        for pid, code in codes:
            raise WriterError(f"{self.fname}: writer process {pid} died with exit code {code}")

    def _check_size(self, allocator: Any) -> None:
        expected = allocator.offset + allocator.next_page_allocated.value * self.page_size
        if self.header["alloc_table_ptr"] != expected:
            raise WriterError(
                f"{self.fname}: {self.header['alloc_table_ptr']} bytes of data, not {expected}; is the disk full?"
            )


class _Reported:
    """The split as FFCV's worker sees it: failures are told at once, for the worker then waits for its page's turn."""

    def __init__(self, split: CheckedSplit, failures: Any) -> None:
        self._split, self._failures = split, failures

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.uint8], int]:
        try:
            item = self._split[int(index)]
        except BaseException as error:
            self._failures.put(_one_line(error))
            raise SystemExit(1) from error
        np.random.seed(int(index))  # FFCV draws from this stream whether the image becomes a JPEG
        return item


def _work(failures: Any, *arguments: Any) -> None:
    import cv2

    cv2.setNumThreads(0)  # OpenCV's thread pool does not survive the fork
    *rest, split = arguments
    try:
        worker_job_indexed_dataset(*rest, _Reported(split, failures))
    except Exception as error:
        failures.put(_one_line(error))
        raise SystemExit(1) from error


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
