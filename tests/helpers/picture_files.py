"""Small data sets for tests: pictures as file contents, folders and archives of them, and `Faces` in memory."""

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fer_dist.data.faces import Faces


def encoded(picture: NDArray[Any] | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Encode a picture as a file of this format; options are Pillow's."""
    out = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(out, form, **options)
    return out.getvalue()


def plain(level: int = 90, form: str = "PNG") -> bytes:
    """Encode 48 x 48 pixels of one grey level."""
    return encoded(np.full((48, 48), level, dtype=np.uint8), form)


def write_folder(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, raw in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(raw)
    return root


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return path


def faces_of(images_NHW: NDArray[np.uint8], labels: Sequence[int], usage: Sequence[int], **fields: Any) -> Faces:
    """Build a data set in memory; its names are numbers unless `fields` holds others."""
    count = len(images_NHW)
    names = fields.pop("names", [str(i) for i in range(count)])
    return Faces(images_NHW=images_NHW, labels_N=np.array(labels), usage_N=np.array(usage), names=names, **fields)
