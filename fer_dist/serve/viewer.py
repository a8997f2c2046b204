"""One picture at a time, as the app shows it: faces in their boxes, where the model looked, a camera smoothed."""

import math
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fer_dist.data.decoding import Photo
from fer_dist.serve.explain import look
from fer_dist.serve.faces import Box, crop, whole
from fer_dist.serve.htmlreport import overlay
from fer_dist.serve.overlay import annotate
from fer_dist.serve.predictor import Prediction, Predictor

SETTLE_S = 0.5
"""Time constant of the smoothing over time [s]: a face that changes at once is shown to 63% after so long."""
FORGET_S = 1.0
"""A face that was not seen for so long is another one [s]."""
RATE_S = 3.0
"""Frames per second are counted over so long [s]."""
SHOWN_SIDE = 1024
"""Longer side of the picture as it is shown [pixels]."""
MOST_FACES = 256
"""Faces that smoothing follows."""

_SAME = 0.2  # intersection over union of one face in two frames: heads move


@dataclass(frozen=True, kw_only=True)
class View:
    """What the app shows of a picture.

    Attributes:
        faces: from left to right; empty: there is none.
        picture: with boxes and labels, at most about SHOWN_SIDE pixels long.
        heat: the crop of the largest face under its heat map; None: the model's file cannot say.
        method: how the heat map was made; empty without one.
    """

    faces: tuple[Prediction, ...]
    picture: Image.Image
    heat: Image.Image | None = None
    method: str = ""

    @property
    def largest(self) -> int:
        """Index of the face that covers most; there must be one."""
        return max(range(len(self.faces)), key=lambda i: _area(self.faces[i].box))


class Viewer:
    """Draws what a predictor says; several threads may ask at once."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def shown(self, photo: Photo, faces: tuple[Prediction, ...], *, heat: bool) -> View:
        """A picture and its faces as they are shown.

        Args:
            faces: what `Predictor.photo` said, smoothed or not.
            heat: whether to ask where the model looked, which costs another answer of it.
        """
        picture = Image.fromarray(photo.rgb_HW3)
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
        labels = self.predictor.labels
        view = View(faces=faces, picture=annotate(np.asarray(picture), faces, labels, photo.width))
        if not heat or not faces:
            return view
        face = faces[view.largest]
        crop_SS = self._crop(photo, face.box)
        with self.predictor.lock:
            maps_1SS, method = look(
                self.predictor.runner,
                torch.from_numpy(crop_SS[None, None].copy()),
                torch.tensor([labels.index(face.label)]),
            )
        return view if maps_1SS is None else replace(view, heat=overlay(crop_SS, maps_1SS[0]), method=method)

    def _crop(self, photo: Photo, box: Box | None) -> NDArray[np.uint8]:
        """The square that the model has seen."""
        size = self.predictor.runner.spec.input.size
        if box is None:
            return whole(photo.rgb_HW3, size=size)
        factor = photo.rgb_HW3.shape[1] / photo.width
        return crop(photo.rgb_HW3, box.scaled(factor), size=size, margin=self.predictor.margin)


@dataclass(kw_only=True)
class Stream:
    """What is known of one camera: its faces, smoothed over time, and its frames per second.

    Attributes:
        labels: of the model, in its order.
        faces: of the last frames, with the moment each was last seen [s].
        moments: of the frames of the last RATE_S [s].
    """

    labels: tuple[str, ...]
    faces: list[tuple[Prediction, float]] = field(default_factory=list)
    moments: deque[float] = field(default_factory=deque)

    def add(self, faces: tuple[Prediction, ...], now: float) -> tuple[Prediction, ...]:
        """Take the faces of a frame.

        Each is the face of before whose box it shares most; of two frames dt apart, the new one counts
        1 - exp(-dt / SETTLE_S), however many frames a second there are.

        Args:
            now: a clock that never goes back [s].

        Returns:
            the same faces with smoothed probabilities, boxes and labels, in their order.
        """
        self.moments.append(now)
        while now - self.moments[0] > RATE_S:
            self.moments.popleft()
        before = [one for one in self.faces if now - one[1] <= FORGET_S]
        smooth = []
        for face in faces[:MOST_FACES]:
            match = max(before, key=lambda one, face=face: _shared(face.box, one[0].box), default=None)  # type: ignore[misc]
            if match is not None and _shared(face.box, match[0].box) >= _SAME:
                before.remove(match)
                face = self._mixed(match[0], face, 1 - math.exp(-(now - match[1]) / SETTLE_S))
            smooth.append(face)
        self.faces = ([(face, now) for face in smooth] + before)[:MOST_FACES]  # a face missed once is not forgotten
        return tuple(smooth)

    def _mixed(self, old: Prediction, new: Prediction, part: float) -> Prediction:
        """Between two sights of one face; `part` is the weight of the new one."""
        pairs = zip(old.probabilities_K, new.probabilities_K, strict=True)
        probabilities_K = tuple(a + part * (b - a) for a, b in pairs)
        box = new.box
        if old.box is not None and box is not None:  # a frame trembles, but must not lag behind a head
            box = Box(*(a + max(part, 0.5) * (b - a) for a, b in zip(old.box, box, strict=True)))
        label = self.labels[int(np.argmax(probabilities_K))]
        return replace(new, label=label, probabilities_K=probabilities_K, box=box)

    @property
    def rate(self) -> float:
        """Frames per second over the last RATE_S; 0 before the second frame."""
        if len(self.moments) < 2 or self.moments[-1] <= self.moments[0]:
            return 0.0
        return (len(self.moments) - 1) / (self.moments[-1] - self.moments[0])


def plain(faces: tuple[Prediction, ...], photo: Photo, labels: tuple[str, ...]) -> dict[str, Any]:
    """What the API answers: plain values."""
    return {
        "width": photo.width,
        "height": photo.height,
        "faces": [
            {
                "label": face.label,
                "probabilities": dict(zip(labels, face.probabilities_K, strict=True)),
                "box": None if face.box is None else face.box._asdict(),
                "confidence": face.confidence,
            }
            for face in faces
        ],
    }


def _area(box: Box | None) -> float:
    return box.width * box.height if box else 0.0


def _shared(a: Box | None, b: Box | None) -> float:
    """Intersection over union of two boxes."""
    if a is None or b is None:
        return float(a is b)
    wide = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    high = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    both = max(wide, 0.0) * max(high, 0.0)
    return both / max(_area(a) + _area(b) - both, 1e-9)
