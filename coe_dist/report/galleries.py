"""Images for the report: what each expert is chosen for, what it gets wrong, and what the delegator answers alone.

They come from the run's data set, as small pictures inside the page. A data set that is gone, or was written anew
since, costs the galleries and one line.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from coe_dist.errors import InputError
from coe_dist.report.quality import early_N
from coe_dist.tracking.per_image import PerImage

EACH = 8  # images of one row of a gallery
SHOWN_EXPERTS = 16
SIDE = 96  # pixels of a picture's longer side


@dataclass(frozen=True)
class Shown:
    """One picture: a data address, and what it shows. said: the answer, where it is wrong."""

    picture: str
    id: int
    label: str
    said: str | None
    probability: float


@dataclass(frozen=True)
class Gallery:
    title: str
    note: str
    images: list[Shown]


class Pictures:
    """Small pictures of a split's images. Raises InputError where the data set is not that of these rows."""

    def __init__(self, beton: Path, rows: PerImage) -> None:
        from coe_dist.data.stored import StoredImages

        if not beton.is_file():
            raise InputError(f"{beton} is not there")
        self._stored = StoredImages(beton)
        if len(rows) and int(rows.ids_N.max()) >= len(self._stored):
            raise InputError(f"{beton} has fewer images than were evaluated")
        if (self._stored.labels_N[rows.ids_N] != rows.labels_N).any():
            raise InputError(f"{beton} was written anew since the evaluation")

    def address(self, index: int) -> str:
        """`data:image/...`: small images as they are (PNG), larger ones reduced (JPEG). Raises ValueError."""
        from PIL import Image

        pixels_HW3 = self._stored.pixels(index)
        grey = bool((pixels_HW3 == pixels_HW3[..., :1]).all())
        image = Image.fromarray(np.ascontiguousarray(pixels_HW3[..., 0]) if grey else pixels_HW3)
        kind = "png" if 2 * max(image.size) <= SIDE else "jpeg"
        image.thumbnail((SIDE, SIDE))
        file = io.BytesIO()
        image.save(file, kind, quality=80)
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def expert_galleries(
    rows: PerImage, threshold: float | None, classes: list[str], pictures: Pictures
) -> list[tuple[int, list[Gallery]]]:
    """Of the most used experts, by their number: what each is chosen for most confidently, and its mistakes."""
    counts = np.bincount(rows.selected_N, minlength=rows.right_NE.shape[1])
    used = sorted(np.argsort(-counts, kind="stable")[:SHOWN_EXPERTS].tolist())
    stays_N, galleries = ~early_N(rows, threshold), []
    for expert in used:
        own_N = rows.selected_N == expert
        wrong_N = own_N & stays_N & (rows.final_class_N != rows.labels_N)
        chosen = _first(own_N, rows.selection_confidence_N)
        mistakes = _first(wrong_N, rows.final_confidence_N)
        galleries.append((expert, [
            Gallery(
                "Chosen for most confidently",
                "probability with which the delegator chooses this expert",
                [*_shown(chosen, rows, rows.selection_confidence_N, classes, pictures)],
            ),
            Gallery(
                "Wrong and most sure of it",
                "the wrong answer and its probability",
                [*_shown(mistakes, rows, rows.final_confidence_N, classes, pictures, rows.final_class_N)],
            ),
        ]))  # fmt: skip
    return galleries


def early_galleries(rows: PerImage, threshold: float, classes: list[str], pictures: Pictures) -> list[Gallery]:
    """What the delegator answers alone."""
    early = early_N(rows, threshold)
    right = rows.delegator_class_N == rows.labels_N
    groups = [
        (
            "Right and most sure of it",
            "probability of the delegator's answer",
            _first(early & right, rows.confidence_N),
        ),
        ("Right, and hardly sure enough", "just above the threshold", _first(early & right, -rows.confidence_N)),
        (
            "Wrong and most sure of it",
            "the wrong answer and its probability",
            _first(early & ~right, rows.confidence_N),
        ),
    ]
    said = rows.delegator_class_N
    return [Gallery(t, n, [*_shown(i, rows, rows.confidence_N, classes, pictures, said)]) for t, n, i in groups]


def _first(these_N: npt.NDArray[np.bool_], by_N: npt.NDArray[np.floating]) -> list[int]:
    places = np.flatnonzero(these_N)
    return [int(place) for place in places[np.argsort(-by_N[places], kind="stable")[:EACH]]]


def _shown(
    places: Iterable[int],
    rows: PerImage,
    probability_N: npt.NDArray[np.floating],
    classes: list[str],
    pictures: Pictures,
    said_N: npt.NDArray[np.int32] | None = None,
) -> Iterable[Shown]:
    for place in places:
        index, label = int(rows.ids_N[place]), int(rows.labels_N[place])
        said = None if said_N is None or said_N[place] == label else classes[int(said_N[place])]
        yield Shown(pictures.address(index), index, classes[label], said, float(probability_N[place]))
