"""The one place that imports FFCV 1.0.2, and undoes what its import does to the whole process.

FFCV sets torch's number of threads to 1 at import and to the loader's number at every epoch, from two threads. Our
pipeline brings its own threads and its own compiled kernel, so FFCV's compiler is switched off (it takes 14-24 s per
image pipeline) and its setting of thread counts is replaced by one that only notes the number. Its import compiles a
typed dictionary of two entries, several seconds in every process, which is read from Python alone: it gets a plain one.
"""

from __future__ import annotations

from typing import Any

import numba.typed
import torch

_threads, _typed_dict = torch.get_num_threads(), numba.typed.Dict
numba.typed.Dict = dict
from ffcv.fields import IntField, RGBImageField  # noqa: E402
from ffcv.libffcv import imdecode  # noqa: E402
from ffcv.loader import Loader  # noqa: E402
from ffcv.memory_allocator import MemoryAllocator  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.pipeline.operation import Operation  # noqa: E402
from ffcv.pipeline.pipeline_spec import PipelineSpec  # noqa: E402
from ffcv.traversal_order.base import TraversalOrder  # noqa: E402
from ffcv.writer import DatasetWriter, worker_job_indexed_dataset  # noqa: E402

torch.set_num_threads(_threads)
numba.typed.Dict = _typed_dict

__all__ = [
    "DatasetWriter",
    "IntField",
    "Loader",
    "MemoryAllocator",
    "Operation",
    "PipelineSpec",
    "RGBImageField",
    "TraversalOrder",
    "imdecode",
    "worker_job_indexed_dataset",
]

FIELDS = ("image", "label")  # in the order in which every .beton of ours stores them


def _note_threads(cls: Any, count: int) -> None:
    cls.num_threads = count


Compiler.set_enabled(False)
Compiler.set_num_threads = classmethod(_note_threads)
