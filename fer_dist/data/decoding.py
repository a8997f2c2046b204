"""Encoded pictures -> grey levels, or a photo in colour.

Pictures come from strangers: the size of one is looked at before it is decoded, only five common
formats are decoded at all, each under its own name, and of an animation the first picture.
"""

import io
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import PurePosixPath
from typing import NamedTuple

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
MAX_PHOTO_BYTES, MAX_PHOTO_PIXELS = 64 * 2**20, 3 * 2**24
"""The same for photos, which cameras make larger than any data set of faces: 8192 x 6144 is the largest usual one."""

_ORIENTATION = 0x0112  # of EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_one_giant = threading.Lock()  # photos beyond MAX_PIXELS are decoded one at a time, however many threads there are


class Photo(NamedTuple):
    """A decoded photo, upright.

    Attributes:
        rgb_HW3: uint8 `[H, W, 3]`, perhaps smaller than the file's.
        width, height: of the file's, upright [pixels].
    """

    rgb_HW3: NDArray[np.uint8]
    width: int
    height: int


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
    with _opened(raw, name, MAX_PICTURE_BYTES, MAX_PIXELS) as picture:
        if picture.mode.startswith("I"):  # 16 bits: Pillow would clip them at 255
            return resized(_eight_bits(picture), size)
        if picture.mode in ("P", "PA"):  # a palette may hide transparency, which L cannot express
            return resized(np.asarray(picture.convert("RGBA").convert("L")), size)
        return resized(np.asarray(picture.convert("L")), size)


def decode_photo(raw: bytes, name: str = "", *, side: int) -> Photo:
    """A picture of any size in colour: turned upright as its EXIF says, what is transparent white.

    Args:
        raw: the encoded picture.
        name: of its file, as for `decode`.
        side: the longer side of the result at most [pixels]; a JPEG is not even decoded larger than need be.

    Pillow may warn of odd metadata; filters of warnings belong to the process, so the caller's main thread sets them.

    Raises:
        UserError: as `decode`, with the bounds of a photo.
    """
    with (
        _opened(raw, name, MAX_PHOTO_BYTES, MAX_PHOTO_PIXELS) as picture,
        _one_giant if picture.width * picture.height > MAX_PIXELS else nullcontext(),
    ):
        width, height = picture.size
        small: Image.Image = picture
        if picture.mode.startswith("I"):
            small = Image.fromarray(_eight_bits(picture))
        elif picture.mode != "RGBA" and (picture.has_transparency_data or picture.mode in ("P", "PA")):
            small = picture.convert("RGBA")
        small.thumbnail((side, side), Image.Resampling.BILINEAR)
        if small.mode == "RGBA":
            small = Image.alpha_composite(Image.new("RGBA", small.size, "white"), small)
        small = small.convert("RGB")
        turned = 1
        with suppress(Exception):  # EXIF is any bytes; without it a picture is as it is
            turned = int(picture.getexif().get(_ORIENTATION, 1))
        if turned in _UPRIGHT:
            small = small.transpose(_UPRIGHT[turned])
            width, height = (height, width) if turned >= 5 else (width, height)
        return Photo(np.array(small, dtype=np.uint8), width, height)


@contextmanager
def _opened(raw: bytes, name: str, most_bytes: int, most_pixels: int) -> Iterator[Image.Image]:
    """A picture that is what it says and within bounds, not yet decoded; what goes wrong inside is a UserError."""
    require_size(len(raw), most_bytes)
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as picture:
            _require_format(picture.format or "", name)
            if picture.format in ("JPEG", "MPO") and (scans := raw.count(b"\xff\xda")) > MAX_SCANS:
                raise UserError(f"a JPEG of {scans:,} scans, more than {MAX_SCANS}")
            if picture.width * picture.height > most_pixels:  # known from the header, before decoding
                raise Image.DecompressionBombError(f"{picture.width}x{picture.height} pixels, over {most_pixels:,}")
            yield picture
    except UnidentifiedImageError:
        raise UserError(f"no picture of the formats {', '.join(FORMATS)}") from None
    except UserError:
        raise
    except Exception as error:  # a decoder fed with garbage may raise anything
        raise UserError(f"does not decode: {error}") from None


def _eight_bits(picture: Image.Image) -> NDArray[np.uint8]:
    """The upper half of 16-bit grey levels, uint8 `[H, W]`."""
    return (np.asarray(picture) // 257).astype(np.uint8)


def require_size(count: int, most: int = MAX_PICTURE_BYTES) -> None:
    """Raises UserError when an encoded picture has more bytes than that."""
    if count > most:
        raise UserError(f"{count:,} bytes, more than a picture may have ({most:,})")


def _require_format(found: str, name: str) -> None:
    said = FORMAT_OF.get(PurePosixPath(name).suffix.lower(), found)
    if said != {"MPO": "JPEG"}.get(found, found):  # some phones put several pictures into a JPEG
        raise UserError(f"its name says {said}, but it holds {found}: rename it")
