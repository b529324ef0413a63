"""Answers from the files that `coe-dist export onnx` writes. This file needs only numpy and onnxruntime: copy it.

    model = OnnxCollaboration("DIR")
    answer = model(images_NCHW)                       # numpy, uint8
    model.classes[answer.probabilities_NC[0].argmax()]

1. The delegator's graph gives each image class logits and selection logits.
2. An image whose largest class probability is at least the manifest's threshold is answered by these.
3. The others are grouped by the expert of largest selection logit (ties: lowest number); each expert that was chosen
   runs its graph once, on its group.
4. Answers are in the order of the images.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime  # type: ignore[import-untyped]

MANIFEST = "manifest.json"
INPUT = "images"
DELEGATOR_OUTPUTS = ("class_logits", "selection_logits")
EXPERT_OUTPUTS = ("class_logits",)


class Answer(NamedTuple):
    """The answer to a batch, rows in the order of the images."""

    probabilities_NC: npt.NDArray[np.float32]
    expert_N: npt.NDArray[np.int64]  # the expert that was used; -1: the image exited early
    macs_N: npt.NDArray[np.int64]  # multiply-adds spent on the image


class OnnxCollaboration:
    """A delegator and its experts, each a session of onnxruntime on the CPU.

    threads: of each session; None: as many as onnxruntime takes by itself. Raises ValueError naming the file that is
    missing, damaged or not one of ours.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            entries = [manifest["delegator"], *manifest["experts"]]
            if manifest["format"] != 1:
                raise ValueError(f"format {manifest['format']} is not known; give one of format 1")
            self.classes = tuple(manifest["classes"])
            self.channels, self.resolution = int(manifest["channels"]), int(manifest["resolution"])
            self.threshold, self.final = manifest["threshold"], manifest["final"]
            self._macs = [int(entry["macs"]) for entry in entries]
            files = [(str(entry["file"]), str(entry["sha256"])) for entry in entries]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / MANIFEST}: not a manifest of `coe-dist export onnx` ({error!r})") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; its warnings tell of optimisations that it leaves out
        if threads is not None:
            options.intra_op_num_threads = threads
        self._delegator, *self._experts = [_session(folder, *file, options) for file in files]

    def __call__(self, images_NCHW: npt.NDArray[np.uint8]) -> Answer:
        """Images uint8 [N, channels, resolution, resolution], N from 0. Raises ValueError for others."""
        wanted = (self.channels, self.resolution, self.resolution)
        if images_NCHW.dtype != np.uint8 or images_NCHW.ndim != 4 or images_NCHW.shape[1:] != wanted:
            raise ValueError(
                f"images: {images_NCHW.dtype} {list(images_NCHW.shape)} is not allowed; give uint8 [N, "
                f"{', '.join(map(str, wanted))}] with values from 0 to 255"
            )
        if not len(images_NCHW):
            empty_N = np.zeros(0, dtype=np.int64)
            return Answer(np.zeros((0, len(self.classes)), dtype=np.float32), empty_N, empty_N)
        class_logits_NC, selection_NE = self._delegator.run(DELEGATOR_OUTPUTS, {INPUT: images_NCHW})
        answer_NC = _softmax(class_logits_NC)
        expert_N = selection_NE.argmax(axis=1).astype(np.int64)
        if self.threshold is not None:  # compared in float64, as calibration does
            expert_N[answer_NC.max(axis=1).astype(np.float64) >= self.threshold] = -1
        macs_N = np.full(len(images_NCHW), self._macs[0], dtype=np.int64)
        for expert in np.unique(expert_N[expert_N >= 0]):
            rows = np.flatnonzero(expert_N == expert)
            [logits_NC] = self._experts[expert].run(EXPERT_OUTPUTS, {INPUT: images_NCHW[rows]})
            probabilities_NC = _softmax(logits_NC)
            answer_NC[rows] = (probabilities_NC + answer_NC[rows]) / 2 if self.final == "average" else probabilities_NC
            macs_N[rows] += self._macs[1 + expert]
        return Answer(answer_NC, expert_N, macs_N)


def _session(folder: Path, name: str, sha256: str, options: Any) -> Any:
    path = folder / name
    if Path(name).name != name:
        raise ValueError(f"{folder / MANIFEST}: file {name!r} is not allowed; give a name inside the folder")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path}: its content does not match its sha256 in {MANIFEST}; it is damaged")
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _softmax(logits_NC: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    powers_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return np.asarray(powers_NC / powers_NC.sum(axis=1, keepdims=True), dtype=np.float32)
