"""Annotated pictures: boxes in their place, labels within the picture and apart from each other."""

from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from fer_dist.serve import overlay
from fer_dist.serve.faces import Box
from fer_dist.serve.overlay import COLOURS, annotate
from fer_dist.serve.predictor import Prediction
from fer_dist.spec import EXPRESSIONS

Tags = list[tuple[str, tuple[float, float, float, float]]]


def face(box: Box | None, label: str = "happy", p: float = 0.88) -> Prediction:
    probabilities_K = tuple(p if name == label else (1 - p) / 6 for name in EXPRESSIONS)
    return Prediction(label=label, probabilities_K=probabilities_K, box=box, confidence=0.9)


def drawn(size: tuple[int, int], *faces: Prediction, width: int | None = None) -> Image.Image:
    rgb = np.full((size[1], size[0], 3), 60, np.uint8)
    return annotate(rgb, faces, EXPRESSIONS, width or size[0])


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> Tags:
    """Collect text and area of each label that is drawn."""
    seen: Tags = []
    original = overlay._tag

    def tag(pen: Any, text: str, *rest: Any) -> Any:
        seen.append((text, original(pen, text, *rest)))
        return seen[-1][1]

    monkeypatch.setattr(overlay, "_tag", tag)
    return seen


@pytest.mark.parametrize("label", EXPRESSIONS)
def test_the_box_is_around_the_face_and_not_on_it(label: str) -> None:
    picture = np.asarray(drawn((800, 600), face(Box(300, 200, 100, 120), label)))
    colour = np.array(ImageColor.getrgb(COLOURS[EXPRESSIONS.index(label)]))
    assert np.all(picture[200:320, 300:400] == 60)
    for row, column in ((250, 298), (250, 401), (321, 350)):
        assert np.all(picture[row, column] == colour)


def test_boxes_are_scaled_from_the_file_to_the_picture() -> None:
    picture = np.asarray(drawn((800, 600), face(Box(1200, 800, 400, 480)), width=3200))
    assert np.any(picture[230, 298] != 60)
    assert np.all(picture[205:315, 305:395] == 60)


PLACES = [(0, 0, 100, 100), (700, 0, 100, 100), (0, 500, 100, 100), (700, 500, 120, 140), (-50, -50, 900, 700)]


@pytest.mark.parametrize("place", [*PLACES, (400, 300, 6, 8), (0, 0, 800, 600), (900, 900, 50, 50)])
def test_the_label_is_within_the_picture(place: tuple[int, int, int, int], tags: Tags) -> None:
    drawn((800, 600), face(Box(*place)))
    ((text, (left, top, right, bottom)),) = tags
    assert text == "happy 88%"
    assert 0 <= left < right <= 800
    assert 0 <= top < bottom - 13 <= 600 - 13


@pytest.mark.parametrize("size", [(48, 48), (200, 10), (640, 480), (2048, 1365)])
def test_letters_are_readable_at_any_size(size: tuple[int, int], tags: Tags) -> None:
    picture = drawn(size, face(Box(size[0] * 0.4, size[1] * 0.4, size[0] / 50, size[1] / 50)))
    assert max(picture.size) >= 640
    ((_, (_, top, _, bottom)),) = tags
    assert bottom - top >= max(picture.size) / 60


def test_labels_of_neighbours_do_not_cover_each_other(tags: Tags) -> None:
    drawn((800, 600), *(face(Box(20 + 60 * i, 200 + 15 * (i % 2), 50, 60)) for i in range(12)))
    areas = [area for _, area in tags]
    assert len(areas) == 12
    for i, a in enumerate(areas):
        assert all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for b in areas[:i])


def test_a_picture_without_boxes_has_one_label(tags: Tags) -> None:
    """One without a face, and one that is a ready crop."""
    empty, crop = np.asarray(drawn((800, 600))), np.asarray(drawn((48, 48), face(None, "sad", 0.5)))
    assert [text for text, _ in tags] == ["no face found", "sad 50%"]
    assert crop.shape == (640, 640, 3)
    assert np.all(empty[300:] == 60)
    assert np.all(crop[200:] == 60)


def test_control_characters_of_a_label_are_not_drawn(tags: Tags) -> None:
    names = ("bad\x1b[2J\nname", *EXPRESSIONS[1:])
    one = Prediction(label=names[0], probabilities_K=(1.0, *[0.0] * 6), box=Box(100, 100, 50, 50), confidence=0.9)
    annotate(np.zeros((300, 700, 3), np.uint8), [one], names, 700)
    assert tags[0][0].isprintable()
