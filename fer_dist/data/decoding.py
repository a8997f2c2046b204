"""Encoded pictures -> grey levels.

Pictures come from strangers: the size of one is looked at before it is decoded, only five common
formats are decoded at all, each under its own name, and of an animation the first picture.
"""

import io
import warnings
from collections.abc import Iterable
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fer_dist.data.gathering import Encoded, Gathering, resized
from fer_dist.errors import UserError

FORMAT_OF = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP", ".gif": "GIF"}
FORMATS = tuple(dict.fromkeys(FORMAT_OF.values()))

MAX_PICTURE_BYTES = 16 * 2**20
"""Largest encoded picture, inflated."""
MAX_PIXELS = 2**24
"""Largest picture to be decoded."""
MAX_SCANS = 100
"""Most passes over a JPEG; a progressive one has about ten, and each costs the time of the whole picture."""


def decode_all(encoded: Iterable[Encoded], prefix: str, into: Gathering) -> None:
    """Decode pictures one by one; `prefix` and the name of a picture say where it is.

    Raises:
        UserError: a bad picture with on_error="stop".
    """
    with warnings.catch_warnings():  # Pillow warns of odd metadata, which says nothing about pixels
        warnings.simplefilter("ignore")
        for name, raw, label, usage in encoded:
            try:
                grey_SS = decode(raw, into.size, name)
            except UserError as error:
                into.bad(f"{prefix}{name}", error.problem)
            else:
                into.add(grey_SS, label, usage, name)


def decode(raw: bytes, size: int, name: str = "") -> NDArray[np.uint8]:
    """A picture as grey levels, uint8 `[size, size]`; larger and smaller ones are resized.

    Args:
        raw: the encoded picture.
        size: side of the result.
        name: of its file; an ending in FORMAT_OF must be true, others say nothing.

    Raises:
        UserError: it is none, too large, damaged, or of another format than its name says.
    """
    require_size(len(raw))
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as picture:
            _require_format(picture.format or "", name)
            if picture.format in ("JPEG", "MPO") and (scans := raw.count(b"\xff\xda")) > MAX_SCANS:
                raise UserError(f"a JPEG of {scans:,} scans, more than {MAX_SCANS}")
            if picture.width * picture.height > MAX_PIXELS:  # known from the header, before decoding
                raise Image.DecompressionBombError(f"{picture.width}x{picture.height} pixels, over {MAX_PIXELS:,}")
            if picture.mode.startswith("I"):  # 16 bits: Pillow would clip them at 255
                return resized((np.asarray(picture) // 257).astype(np.uint8), size)
            if picture.mode in ("P", "PA"):  # a palette may hide transparency, which L cannot express
                return resized(np.asarray(picture.convert("RGBA").convert("L")), size)
            return resized(np.asarray(picture.convert("L")), size)
    except UnidentifiedImageError:
        raise UserError(f"no picture of the formats {', '.join(FORMATS)}") from None
    except UserError:
        raise
    except Exception as error:  # a decoder fed with garbage may raise anything
        raise UserError(f"does not decode: {error}") from None


def require_size(count: int) -> None:
    """Raises UserError when an encoded picture has more bytes than MAX_PICTURE_BYTES."""
    if count > MAX_PICTURE_BYTES:
        raise UserError(f"{count:,} bytes, more than a picture may have ({MAX_PICTURE_BYTES:,})")


def _require_format(found: str, name: str) -> None:
    said = FORMAT_OF.get(PurePosixPath(name).suffix.lower(), found)
    if said != {"MPO": "JPEG"}.get(found, found):  # some phones put several pictures into a JPEG
        raise UserError(f"its name says {said}, but it holds {found}: rename it")
