"""Boxes, labels and probabilities drawn onto a picture."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fer_dist.errors import printable
from fer_dist.serve.faces import Box
from fer_dist.serve.predictor import Prediction

LEAST_SIDE = 640
"""Smaller pictures are enlarged to this before they are drawn on, so that letters have room [pixels]."""
COLOURS = ("#d73027", "#7a9a01", "#8e44ad", "#f2b701", "#3b7dd8", "#e67e22", "#8c96a0")
"""By index of the class; those of FER2013: angry, disgust, fear, happy, sad, surprise, neutral."""
NO_FACE = "no face found"

_Area = tuple[float, float, float, float]  # left, top, right, bottom


def annotate(rgb_HW3: NDArray[np.uint8], faces: Sequence[Prediction], labels: Sequence[str], width: int) -> Image.Image:
    """Draw what was found.

    Args:
        rgb_HW3: uint8 `[H, W, 3]`; small pictures come back enlarged.
        faces: with boxes in pixels of the file, or without one for a ready crop.
        labels: of the model, in its order, for the colours.
        width: of the file [pixels].

    Returns:
        A picture of mode RGB.
    """
    picture = Image.fromarray(rgb_HW3)
    factor = max(1.0, LEAST_SIDE / max(picture.size))
    if factor > 1:
        size = tuple(max(round(length * factor), 1) for length in picture.size)
        picture = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    pen, scale = ImageDraw.Draw(picture), picture.width / width
    if not faces:
        _tag(pen, NO_FACE, _letters(picture.size, None), [(0, 0)], [], "#30363d")
        return picture
    boxes = [face.box.scaled(scale) if face.box else None for face in faces]
    taken: list[_Area] = []
    for face, box in zip(faces, boxes, strict=True):
        if box:
            _frame(pen, box, _colour(face, labels), _line(picture.size, box))
    # Labels come last, small faces first: theirs have the least room.
    for face, box in sorted(zip(faces, boxes, strict=True), key=lambda pair: pair[1].height if pair[1] else 0):
        text = f"{printable(face.label)} {100 * max(face.probabilities_K):.0f}%"
        font = _letters(picture.size, box)
        places = _places(pen, text, font, box, _line(picture.size, box))
        taken.append(_tag(pen, text, font, places, taken, _colour(face, labels)))
    return picture


def _colour(face: Prediction, labels: Sequence[str]) -> str:
    return COLOURS[labels.index(face.label) % len(COLOURS)]


def _frame(pen: ImageDraw.ImageDraw, box: Box, colour: str, line: int) -> None:
    """A coloured line with a thin dark edge, to be seen on any ground; all of it outside of the box."""
    for out, ink, width in ((line + 2, "#101418", line + 2), (line + 1, colour, line)):
        corner = box.left + box.width + out - 1, box.top + box.height + out - 1
        pen.rectangle(
            (box.left - out, box.top - out, max(corner[0], box.left), max(corner[1], box.top)), outline=ink, width=width
        )


def _line(size: tuple[int, int], box: Box | None) -> int:
    """Width of a line that grows with the face [pixels]."""
    return max(2, round(min(box.height / 45 if box else 0, max(size) / 160)))


def _letters(size: tuple[int, int], box: Box | None) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Letters that grow with the face, but are readable in the whole picture."""
    least = max(13.0, max(size) / 60)
    wanted = box.height / 7 if box else max(size) / 28
    return ImageFont.load_default(size=min(max(wanted, least), 2.2 * least))


def _places(
    pen: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    box: Box | None,
    line: int,
) -> list[tuple[float, float]]:
    """Where a label may begin, the best place first: above, below, beside the box, inside of it."""
    if box is None:
        return [(0, 0)]
    left, top, right, bottom = _extent(pen, text, font, (0, 0))
    wide, high = right - left, bottom - top
    out = 2 * line + 1
    columns = (box.left - out, box.left + box.width + out - wide)
    levels = (box.top - out - high, box.top + box.height + out)
    beside = [(box.left + box.width + out, box.top), (box.left - out - wide, box.top)]
    # Further away only where faces stand close together.
    further = [(x, y + step * high) for step in (-1, 1, -2, 2) for x, y in product(columns, levels)]
    return [*((x, y) for y, x in product(levels, columns)), *beside, (box.left, box.top), *further]


def _extent(
    pen: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    at: tuple[float, float],
) -> _Area:
    """The plate of a label whose upper left corner is there; as high with any letters."""
    room = pen.textbbox((0, 0), "hgÅ", font=font)[3]
    pad = room / 4
    return at[0], at[1], at[0] + pen.textlength(text, font=font) + 2 * pad, at[1] + room + pad


def _tag(
    pen: ImageDraw.ImageDraw,
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    places: Sequence[tuple[float, float]],
    taken: Sequence[_Area],
    colour: str,
) -> _Area:
    """Draw a label at the first place that is within the picture and covers no other label."""
    wide, high = pen.im.size

    def fits(area: _Area) -> bool:
        within = area[0] >= 0 and area[1] >= 0 and area[2] <= wide and area[3] <= high
        return within and not any(
            area[0] < other[2] and other[0] < area[2] and area[1] < other[3] and other[1] < area[3] for other in taken
        )

    areas = [_extent(pen, text, font, at) for at in places]
    x0, y0, x1, y1 = areas[0]
    # As far into the picture as it goes, where no place is free.
    x, y = max(min(x0, wide - (x1 - x0)), 0), max(min(y0, high - (y1 - y0)), 0)
    area = next(filter(fits, areas), (x, y, x + x1 - x0, y + y1 - y0))
    pad = (area[3] - area[1]) / 5
    pen.rounded_rectangle(area, radius=pad, fill=colour, outline="#101418")
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    ink = "#101418" if 0.299 * red + 0.587 * green + 0.114 * blue > 135 else "white"
    pen.text(((area[0] + area[2]) / 2, (area[1] + area[3]) / 2), text, fill=ink, font=font, anchor="mm")
    return area
