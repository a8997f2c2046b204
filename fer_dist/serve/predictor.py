"""Pictures -> faces -> what a model says of each; used by `predict` and by the app."""

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fer_dist.data.decoding import Photo
from fer_dist.errors import UserError
from fer_dist.serve.faces import MARGIN, MOST_MARGIN, Box, Detector, Found, crop, whole
from fer_dist.serve.photos import read_photo
from fer_dist.serve.runner import Runner

BATCH = 64
"""Faces that the model answers at once."""
_HELD_BYTES = 2**27  # pictures that wait for their answers, where the caller wants them back
_HELD_PICTURES = 1024


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model says of one face.

    Attributes:
        label: the class of the largest probability.
        probabilities_K: in the order of the model's labels, sum 1.
        box: of the face, in pixels of the file; None: the picture was taken as a crop.
        confidence: of the detector, 0..1; None likewise.
    """

    label: str
    probabilities_K: tuple[float, ...]
    box: Box | None = None
    confidence: float | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of one picture.

    Attributes:
        path: of the file.
        width, height: upright [pixels]; 0 where it could not be read.
        faces: from left to right; empty: there is none, or it could not be read.
        problem: why it could not be read, or "".
        rgb_HW3: the picture, uint8 `[H, W, 3]`, perhaps smaller than the file's, if it was asked for.
    """

    path: Path
    width: int = 0
    height: int = 0
    faces: tuple[Prediction, ...] = ()
    problem: str = ""
    rgb_HW3: NDArray[np.uint8] | None = None


class _Seen(NamedTuple):
    """A picture with the crops of its faces, uint8 `[F, S, S]`, before the model has looked at them."""

    answer: Answer
    found: Sequence[Found | None] = ()
    crops_FSS: Sequence[NDArray[np.uint8]] = ()


class Predictor:
    """A model and what finds faces for it.

    Args:
        runner: answers batches of crops; one at a time.
        detector: None: every picture is taken as a crop, whole.
        margin: see `fer_dist.serve.faces.crop`.

    Raises:
        UserError: the margin is out of bounds.
    """

    def __init__(self, runner: Runner, detector: Detector | None, *, margin: float = MARGIN) -> None:
        if not -0.4 <= margin <= MOST_MARGIN:
            raise UserError(f"margin is {margin}, expected -0.4..{MOST_MARGIN:g}", f"--margin {MARGIN:g}")
        self.runner, self.detector, self.margin = runner, detector, margin
        self.lock = threading.Lock()  # held while the model answers: `photo` may be called from several threads
        self.labels = runner.spec.labels.names

    def photo(self, photo: Photo) -> tuple[Prediction, ...]:
        """The faces of one picture, boxes in pixels of its file.

        Raises:
            UserError: the model has no memory for them.
        """
        seen = self._seen(Path(), photo, keep=False)
        return next(self._answers([seen], BATCH)).faces

    def files(
        self, paths: Iterable[Path], *, batch: int = BATCH, workers: int | None = None, keep: bool = False
    ) -> Iterator[Answer]:
        """The faces of many pictures, in their order; memory does not grow with their number.

        Threads read, decode and look for faces; the faces of several pictures make one batch of the model.

        Args:
            batch: faces at once.
            workers: threads; None: one for each core that this process may use.
            keep: give the pictures back, too.

        Raises:
            UserError: the model has no memory for a batch. A file that cannot be read is an Answer.
        """
        count = workers or cores()
        waiting: list[_Seen] = []
        with ThreadPoolExecutor(count, thread_name_prefix="faces") as pool:
            ahead: deque[Future[_Seen]] = deque()
            try:
                for path in paths:
                    ahead.append(pool.submit(self._read, path, keep))
                    if len(ahead) > 2 * count:
                        waiting.append(ahead.popleft().result())
                    if _full(waiting, batch):
                        yield from self._answers(waiting, batch)
                        waiting = []
                waiting += [future.result() for future in ahead]
                yield from self._answers(waiting, batch)
            finally:
                for future in ahead:
                    future.cancel()

    def _read(self, path: Path, keep: bool) -> _Seen:
        try:
            return self._seen(path, read_photo(path), keep)
        except UserError as error:
            return _Seen(Answer(path=path, problem=error.problem))
        except MemoryError:
            return _Seen(Answer(path=path, problem="no memory for it"))

    def _seen(self, path: Path, photo: Photo, keep: bool) -> _Seen:
        rgb_HW3, size = photo.rgb_HW3, self.runner.spec.input.size
        answer = Answer(path=path, width=photo.width, height=photo.height, rgb_HW3=rgb_HW3 if keep else None)
        if self.detector is None:
            return _Seen(answer, [None], [whole(rgb_HW3, size=size)])
        found = self.detector.find(rgb_HW3)
        crops_FSS = [crop(rgb_HW3, one.box, size=size, margin=self.margin) for one in found]
        factor = photo.width / rgb_HW3.shape[1]
        return _Seen(answer, [Found(one.box.scaled(factor), one.confidence) for one in found], crops_FSS)

    def _answers(self, seen: Sequence[_Seen], batch: int) -> Iterator[Answer]:
        """Ask the model of all crops at once, and deal out what it says."""
        crops = [crop_SS for one in seen for crop_SS in one.crops_FSS]
        told: list[list[float]] = []
        for begin in range(0, len(crops), batch):
            images_N1SS = torch.from_numpy(np.stack(crops[begin : begin + batch])[:, None])
            with self.lock:
                told += self.runner.run(images_N1SS).probabilities_NK.tolist()
        rows = iter(told)
        for answer, found, _ in seen:
            faces = tuple(self._prediction(one, next(rows)) for one in found)
            yield Answer(
                path=answer.path,
                width=answer.width,
                height=answer.height,
                faces=faces,
                problem=answer.problem,
                rgb_HW3=answer.rgb_HW3,
            )

    def _prediction(self, found: Found | None, probabilities_K: list[float]) -> Prediction:
        label = self.labels[int(np.argmax(probabilities_K))]
        box, confidence = found if found else (None, None)
        return Prediction(label=label, probabilities_K=tuple(probabilities_K), box=box, confidence=confidence)


def newest_model(runs: Path = Path("runs")) -> Path:
    """The `best.pth` of the run that was written last.

    Raises:
        UserError: there is none.
    """
    found = [path for path in runs.glob("*/best.pth") if path.is_file()]
    if not found:
        raise UserError(f"no model is named, and there is no {runs}/*/best.pth", "make demo, or --model FILE")
    return max(found, key=lambda path: path.stat().st_mtime)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _full(waiting: Sequence[_Seen], batch: int) -> bool:
    crops = sum(len(one.crops_FSS) for one in waiting)
    held = sum(one.answer.rgb_HW3.nbytes for one in waiting if one.answer.rgb_HW3 is not None)
    return crops >= batch or held >= _HELD_BYTES or len(waiting) >= _HELD_PICTURES
