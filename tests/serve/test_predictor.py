"""The predictor with a model and a detector whose answers are known."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fer_dist.data.decoding import Photo
from fer_dist.errors import UserError
from fer_dist.serve.faces import Box, Found
from fer_dist.serve.photos import PHOTO_SIDE
from fer_dist.serve.predictor import Predictor, newest_model
from fer_dist.serve.runner import Runner
from tests.helpers.artifacts import CHECKPOINT, SPEC


class ByLevel(Runner):
    """Predict the class whose number is the crop's grey level divided by ten."""

    kind = "pth"

    def __init__(self) -> None:
        super().__init__(Path("by_level"), SPEC, "fp32", CHECKPOINT)
        self.batches: list[int] = []

    def _run(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        self.batches.append(len(images_N1SS))
        classes_N = images_N1SS.float().mean((1, 2, 3)).div(10).round().long()
        logits_NK = 4.0 * torch.nn.functional.one_hot(classes_N, 7)
        return logits_NK, logits_NK.softmax(1)

    def _close(self) -> None: ...


class Finder:
    """Find a face in each column of 8 pixels that is not white, in a thread of the predictor."""

    name = "finder"

    def find(self, rgb_HW3: NDArray[np.uint8]) -> list[Found]:
        assert threading.current_thread().name.startswith("faces")
        return [Found(Box(x, 0, 8, 8), 0.9) for x in range(0, rgb_HW3.shape[1], 8) if rgb_HW3[4, x + 4, 0] < 255]


def drawn(*classes: int) -> Image.Image:
    """Return a picture with a face for each class; without any, a white one."""
    levels = [10 * label for label in classes] or [255]
    return Image.fromarray(np.repeat(np.array([levels], np.uint8), 8, 0).repeat(8, 1))


def write(path: Path, *classes: int) -> Path:
    drawn(*classes).save(path)
    return path


@pytest.mark.parametrize(("batch", "workers"), [(1, 3), (4, 1), (4, 3), (64, None)])
def test_answers_do_not_depend_on_batch_and_threads(batch: int, workers: int | None, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    expected = [list(chance.integers(0, 7, chance.integers(0, 6))) for _ in range(40)]
    paths = [write(tmp_path / f"{i}.png", *classes) for i, classes in enumerate(expected)]
    runner = ByLevel()
    answers = list(Predictor(runner, Finder()).files(paths, batch=batch, workers=workers))
    assert [answer.path for answer in answers] == paths
    names = [[SPEC.labels.names[k] for k in classes] for classes in expected]
    assert [[face.label for face in answer.faces] for answer in answers] == names
    faces = sum(map(len, expected))
    assert sum(runner.batches) == faces, "a picture without a face is not classified"
    assert max(runner.batches) <= batch
    assert batch < 64 or len(runner.batches) <= 3, "faces of several pictures make one batch"
    for place, face in enumerate(answers[0].faces):
        assert (face.box, face.confidence) == (Box(8 * place, 0, 8, 8), 0.9)
        assert sum(face.probabilities_K) == pytest.approx(1)
    assert not any(thread.name.startswith("faces") for thread in threading.enumerate()), "they have ended"


def test_boxes_are_in_pixels_of_the_file(tmp_path: Path) -> None:
    """A large picture is reduced before the detector sees it; `photo` gets one that is reduced already."""
    side = PHOTO_SIDE
    drawn(3, 4).resize((2 * side, side), Image.Resampling.NEAREST).save(tmp_path / "a.png")
    halves = [Found(Box(left, 0, side / 2, side / 2), 0.9) for left in (0, side / 2)]
    predictor = Predictor(ByLevel(), mock.Mock(find=lambda rgb_HW3: halves))
    (answer,) = predictor.files([tmp_path / "a.png"], keep=True)
    assert (answer.width, answer.height) == (2 * side, side)
    assert [face.box for face in answer.faces] == [Box(0, 0, side, side), Box(side, 0, side, side)]
    assert [face.label for face in answer.faces] == ["happy", "sad"]
    assert answer.rgb_HW3 is not None
    assert answer.rgb_HW3.shape == (side // 2, side, 3)
    assert predictor.photo(Photo(answer.rgb_HW3, 2 * side, side)) == answer.faces


def test_only_a_few_pictures_are_read_ahead(tmp_path: Path) -> None:
    path, read = write(tmp_path / "a.png", 1), 0

    def paths() -> Iterator[Path]:
        nonlocal read
        for _ in range(3000):
            read += 1
            yield path

    answers = Predictor(ByLevel(), Finder()).files(paths(), batch=16, workers=2)
    for number, _ in zip(range(200), answers, strict=False):
        assert read - number <= 16 + 2 * 2 + 2
    answers.close()  # type: ignore[attr-defined]
    assert read < 240


def test_kept_pictures_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fer_dist.serve.predictor._HELD_BYTES", 3 * 8 * 8 * 3)
    runner, paths = ByLevel(), [write(tmp_path / "a.png", 1)] * 30
    assert all(answer.rgb_HW3 is not None for answer in Predictor(runner, Finder()).files(paths, keep=True))
    assert max(runner.batches[:-1]) == 3


def test_a_margin_out_of_bounds_is_refused() -> None:
    with pytest.raises(UserError, match=r"expected -0\.4\.\.2"):
        Predictor(ByLevel(), None, margin=float("nan"))


def test_the_newest_run_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .*/\*/best\.pth"):
        newest_model(tmp_path)
    for age, name in enumerate(("newest", "older", "oldest")):
        path = tmp_path / name / "best.pth"
        path.parent.mkdir()
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    assert newest_model(tmp_path) == tmp_path / "newest" / "best.pth"
