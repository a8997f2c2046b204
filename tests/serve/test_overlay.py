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


def face(box: Box | None, label: str = "happy") -> Prediction:
    return Prediction(label=label, probabilities_K=(0.88, *[0.02] * 6), box=box, confidence=0.9)


def drawn(size: tuple[int, int], *faces: Prediction, labels: tuple[str, ...] = EXPRESSIONS) -> Image.Image:
    return annotate(np.full((size[1], size[0], 3), 60, np.uint8), faces, labels, size[0])


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
    """Boxes are in pixels of the file, which is four times as wide as the picture."""
    box = Box(1200, 800, 400, 480)
    picture = np.asarray(annotate(np.full((600, 800, 3), 60, np.uint8), [face(box, label)], EXPRESSIONS, 3200))
    colour = np.array(ImageColor.getrgb(COLOURS[EXPRESSIONS.index(label)]))
    assert np.all(picture[200:320, 300:400] == 60)
    for row, column in ((250, 298), (250, 401), (321, 350)):
        assert np.all(picture[row, column] == colour)


@pytest.mark.parametrize("size", [(800, 600), (48, 48), (200, 10), (2048, 1365)])
@pytest.mark.parametrize(
    "place", [(0, 0, 0.1, 0.1), (0.9, 0, 0.1, 0.1), (0, 0.9, 0.1, 0.1), (0.9, 0.9, 0.2, 0.3), (0.4, 0.4, 0.02, 0.02)]
)
def test_the_label_is_readable_and_within_the_picture(place: Any, size: tuple[int, int], tags: Tags) -> None:
    box = Box(place[0] * size[0], place[1] * size[1], place[2] * size[0], place[3] * size[1])
    picture = drawn(size, face(box))
    ((text, (left, top, right, bottom)),) = tags
    assert text == "happy 88%"
    assert max(picture.size) >= 640
    assert 0 <= left < right <= picture.width
    assert bottom - top >= max(13, max(picture.size) / 60)
    assert 0 <= top < bottom <= picture.height


def test_labels_of_neighbours_do_not_cover_each_other(tags: Tags) -> None:
    drawn((800, 600), *(face(Box(20 + 60 * i, 200 + 15 * (i % 2), 50, 60)) for i in range(12)))
    areas = [area for _, area in tags]
    assert len(areas) == 12
    for i, a in enumerate(areas):
        assert all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for b in areas[:i])


def test_a_picture_without_boxes_has_one_label(tags: Tags) -> None:
    """One without a face, and one that is a ready crop, whose label holds control characters."""
    name = "bad\x1b[2J\nname"
    empty = np.asarray(drawn((800, 600)))
    crop = np.asarray(drawn((48, 48), face(None, name), labels=(name, *EXPRESSIONS[1:])))
    assert [text for text, _ in tags] == ["no face found", "bad?[2J?name 88%"]
    assert crop.shape == (640, 640, 3)
    assert np.all(empty[300:] == 60)
    assert np.all(crop[200:] == 60)
