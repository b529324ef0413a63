"""One picture of the first images of a .beton with their classes, to see whether they are what they should be."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from coe_dist.data.sidecar import read_sidecar
from coe_dist.data.stored import StoredImages
from coe_dist.errors import InputError

TILE = 128  # pixels of an image's longer side
CAPTION = 18  # pixels of height below it
MARGIN = 6
FONT_SIZE = 11
LARGEST = 1024  # images of a sheet
ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


def write_contact_sheet(beton: Path, out: Path, *, count: int = 32, overwrite: bool = False) -> Path:
    """Writes the sheet of the first `count` images. Raises InputError for a damaged file or a bad argument."""
    out = Path(out)
    if not 1 <= count <= LARGEST:
        raise InputError(f"n: {count} is not allowed; give a whole number from 1 to {LARGEST}")
    if out.suffix.lower() not in ENDINGS:
        raise InputError(f"out: {out} is not allowed; give a name that ends in {', '.join(ENDINGS)}")
    if out.exists() and not overwrite:
        raise InputError(f"out: {out} exists; use --overwrite or another name")
    sheet = contact_sheet(beton, count)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out)
    except OSError as error:
        raise InputError(f"out: {out} cannot be written ({error.strerror or error})") from error
    return out


def contact_sheet(beton: Path, count: int) -> Image.Image:
    """RGB. Tile i, in rows from the left, is sample i, reduced to TILE pixels if larger, over `i class`."""
    info = read_sidecar(beton)
    stored = StoredImages(beton)
    count = min(count, info.count)
    columns = min(count, 8)
    rows = -(-count // columns)
    width, height = TILE + MARGIN, TILE + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), _font()
    for index in range(count):
        left, top = MARGIN + index % columns * width, MARGIN + index // columns * height
        try:
            image = Image.fromarray(stored.pixels(index))
        except ValueError as error:
            raise InputError(f"{beton}: sample {index}: {error}") from error
        image.thumbnail((TILE, TILE))
        sheet.paste(image, (left + (TILE - image.width) // 2, top + (TILE - image.height) // 2))
        label = int(stored.labels_N[index])
        name = info.classes[label] if 0 <= label < len(info.classes) else f"label {label}"
        draw.text((left, top + TILE + 2), _fitting(f"{index} {name}", font), fill="black", font=font)
    return sheet


def _fitting(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The text, cut so that it is no wider than a tile."""
    if font.getlength(text) <= TILE:
        return text
    while text and font.getlength(text + "…") > TILE:
        text = text[:-1]
    return text + "…"


def _font() -> ImageFont.FreeTypeFont:
    """matplotlib's: it has the letters of most alphabets, Pillow's own has only Latin ones."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), FONT_SIZE)
