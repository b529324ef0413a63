"""Reading a .beton without FFCV: its layout, and each stored image as bytes or pixels.

FFCV's layout: a header, one description a field, one row a sample (of our two fields: image, label), pages of bytes,
and at the end the allocation table with the place and size of every sample's bytes.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from coe_dist.errors import InputError

_HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")])
_FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
_FIELDS = [(2, b"image"), (1, b"label")]  # FFCV's numbers for an image and an integer
_ROW = np.dtype({
    "names": ["mode", "width", "height", "start", "label"],
    "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
    "offsets": [0, 1, 3, 5, 16],
    "itemsize": 24,
})  # fmt: skip
_PLACE = np.dtype([("sample", "<u8"), ("start", "<u8"), ("bytes", "<u8")])
JPEG_MODE = 0  # FFCV's mark of an image stored as JPEG; 1 is raw

Bytes = npt.NDArray[np.uint8]


class StoredImages:
    """The images of one .beton; `labels_N` int64. Raises InputError for a file with other fields or a cut one."""

    def __init__(self, beton: Path) -> None:
        self.beton = Path(beton)
        broken = f"{beton}: not an FFCV file, or a cut one; `coe-dist data write` makes one"
        try:
            self._mapped = np.memmap(beton, np.uint8, mode="r")
            header = np.fromfile(beton, _HEADER, count=1)[0]
            fields = np.fromfile(beton, _FIELD, count=int(header["fields"]), offset=_HEADER.itemsize)
            count, first_row = int(header["samples"]), _HEADER.itemsize + fields.nbytes
            self._rows = np.fromfile(beton, _ROW, count=count, offset=first_row)
            table = np.fromfile(beton, _PLACE, offset=int(header["table"]))
        except (OSError, ValueError, IndexError, OverflowError) as error:
            raise InputError(broken) from error
        if fields[["type", "name"]].tolist() != _FIELDS:
            raise InputError(f"{beton}: its fields are not image and label; `coe-dist data write` makes such a file")
        if len(self._rows) != count or len(table) != count:
            raise InputError(broken)
        self._table = table[np.argsort(table["start"])]
        self.labels_N: npt.NDArray[np.int64] = self._rows["label"].astype(np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) in pixels."""
        return int(self._rows["height"][index]), int(self._rows["width"][index])

    def is_jpeg(self, index: int) -> bool:
        return bool(self._rows["mode"][index] == JPEG_MODE)

    def bytes_of(self, index: int) -> Bytes:
        """The stored bytes (a JPEG file, or H*W*3 pixels), mapped. Raises ValueError where the file lacks them."""
        start = int(self._rows["start"][index])
        place = int(np.searchsorted(self._table["start"], np.uint64(start)))
        if place == len(self._table) or int(self._table["start"][place]) != start:
            raise ValueError("the file has no place for it")
        stop = start + int(self._table["bytes"][place])
        if stop > len(self._mapped):
            raise ValueError("its place lies behind the end of the file")
        return self._mapped[start:stop]

    def pixels(self, index: int) -> Bytes:
        """uint8 [H,W,3], contiguous, decoded by Pillow. Raises ValueError for damaged bytes."""
        height, width = self.size(index)
        stored = self.bytes_of(index)
        if not self.is_jpeg(index):
            if stored.size != height * width * 3:
                raise ValueError(f"{stored.size} bytes for {height} x {width} pixels")
            return stored.reshape(height, width, 3)
        try:
            with Image.open(io.BytesIO(stored.tobytes()), formats=("JPEG",)) as image:
                pixels_HW3 = np.asarray(image.convert("RGB"))
        except Exception as error:  # a decoder may raise anything on damaged bytes
            raise ValueError(f"its JPEG is damaged ({' '.join(str(error).split())})") from error
        if pixels_HW3.shape != (height, width, 3):
            raise ValueError(
                f"its JPEG has {pixels_HW3.shape[0]} x {pixels_HW3.shape[1]} pixels, not {height} x {width}"
            )
        return pixels_HW3
