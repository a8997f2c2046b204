"""Picture files of any size and origin, read for people rather than for training."""

import errno
import stat
from pathlib import Path

from fer_dist.data.decoding import MAX_PHOTO_BYTES, Photo, decode_photo, require_size
from fer_dist.errors import UserError

PHOTO_SIDE = 2048
"""Longer side of a picture as it is held and annotated [pixels]; larger files are shrunk."""


def read_photo(path: Path) -> Photo:
    """A picture file of any size, as `decode_photo` has it, at most PHOTO_SIDE pixels long.

    Raises:
        UserError: it is missing, no regular file, unreadable, or no picture within the bounds.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise OSError(errno.EINVAL, "is no regular file")
        require_size(status.st_size, MAX_PHOTO_BYTES)
        with path.open("rb") as file:
            raw = file.read(MAX_PHOTO_BYTES + 1)  # it may have grown
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return decode_photo(raw, path.name, side=PHOTO_SIDE)
