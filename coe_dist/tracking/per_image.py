"""images-<split>.npz: what an evaluation found of every image, small enough to lie beside its figures.

Columns of numbers, compressed, without pickle; whether each expert is right takes one bit. 10,000 images and 4 experts
are about 150 kB, ImageNet's 50,000 with 16 experts about 1 MB.
"""

from __future__ import annotations

import dataclasses
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = 1


def images_file(split: str) -> str:
    return f"images-{split}.npz"


@dataclass(frozen=True)
class PerImage:
    """One row per image of a split, by rising id (its number in the split's .beton)."""

    ids_N: npt.NDArray[np.int64]
    labels_N: npt.NDArray[np.int32]
    delegator_class_N: npt.NDArray[np.int32]  # the delegator's answer
    confidence_N: npt.NDArray[np.float64]  # and its probability, against which the exit threshold is held
    selected_N: npt.NDArray[np.int32]  # the expert that the delegator chooses
    selection_confidence_N: npt.NDArray[np.float32]  # its share in the softmax of the selection logits
    final_class_N: npt.NDArray[np.int32]  # the answer when the image does not exit early
    final_confidence_N: npt.NDArray[np.float32]
    right_NE: npt.NDArray[np.bool_]  # whether each expert is right

    def __len__(self) -> int:
        return len(self.ids_N)

    def to_bytes(self) -> bytes:
        columns: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        right_NE = columns.pop("right_NE")
        file = io.BytesIO()
        shape = np.array(right_NE.shape, dtype=np.int64)
        np.savez_compressed(file, format=np.int64(FORMAT), shape=shape, right_bits=np.packbits(right_NE), **columns)
        return file.getvalue()

    @classmethod
    def read(cls, path: Path) -> PerImage:
        """Raises ValueError and OSError for a file that is none of these, of another format, or inconsistent."""
        try:
            with np.load(path, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
            if int(columns.pop("format")) != FORMAT:
                raise ValueError("it has another format")
            images, experts = (int(size) for size in columns.pop("shape"))
            bits = np.unpackbits(columns.pop("right_bits"), count=images * experts)
            rows = cls(**columns, right_NE=bits.reshape(images, experts).astype(bool))
        except (KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"not a readable file of this kind ({error})") from error
        if {np.shape(column)[:1] for column in vars(rows).values()} != {(images,)} or experts < 1:
            raise ValueError("its columns differ in length")
        if images and not 0 <= int(rows.selected_N.min()) <= int(rows.selected_N.max()) < experts:
            raise ValueError("it names experts that it does not have")
        return rows
