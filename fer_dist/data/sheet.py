"""A contact sheet: small grey pictures in captioned rows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

GAP = 2
"""Pixels between pictures."""


def contact_sheet(
    images_NHW: NDArray[np.uint8],
    labels_N: NDArray[np.int64],
    names: Sequence[str],
    rows: int,
    columns: int = 12,
    zoom: int = 2,
) -> Image.Image:
    """Pictures by class, `rows` rows of each, the class name at the left.

    Args:
        images_NHW: uint8 `[N, H, W]`, grey.
        labels_N: int64 `[N]`, indices into `names`.
        names: row captions, one per class. A class without pictures has no rows.
        rows: rows per class; the first `rows * columns` pictures of a class are shown.
        columns: pictures per row.
        zoom: how many times a picture is enlarged.

    Returns:
        A grey picture (mode "L").
    """
    high, wide = (side * zoom + GAP for side in images_NHW.shape[1:])
    font = ImageFont.load_default(size=max(12, high // 6))
    margin = round(max((font.getlength(name) for name in names), default=0)) + 4 * GAP
    lines: list[tuple[str, NDArray[np.int64]]] = []
    for k, name in enumerate(names):
        members = np.flatnonzero(labels_N == k)[: rows * columns]
        lines += [(name if i == 0 else "", members[i : i + columns]) for i in range(0, len(members), columns)]
    sheet = Image.new("L", (margin + columns * wide, max(len(lines) * high, 1)), 255)
    pen = ImageDraw.Draw(sheet)
    for line, (caption, members) in enumerate(lines):
        pen.text((2 * GAP, line * high + high // 2), caption, fill=0, font=font, anchor="lm")
        for column, i in enumerate(members):
            tile = Image.fromarray(images_NHW[i]).resize((wide - GAP, high - GAP), Image.Resampling.BICUBIC)
            sheet.paste(tile, (margin + column * wide, line * high))
    return sheet
