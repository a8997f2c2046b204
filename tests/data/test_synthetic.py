"""The drawn faces: the same everywhere, none blank or twice, and too varied for a linear classifier."""

import hashlib

import numpy as np
import pytest

from fer_dist.data.faces import TEST, TRAIN, VAL, Faces
from fer_dist.data.sheet import contact_sheet
from fer_dist.data.synthetic import BATCH, draw_faces
from fer_dist.spec import EXPRESSIONS
from tests.helpers.processes import python


@pytest.fixture(scope="module")
def faces() -> Faces:
    return draw_faces(2800, 700, 70, seed=0)


def test_another_process_draws_the_same_bytes() -> None:
    code = (
        "import hashlib; from fer_dist.data.synthetic import draw_faces; f = draw_faces(70, 14, 7, seed=5);"
        "print(hashlib.sha256(f.images_NHW.tobytes() + f.labels_N.tobytes()).hexdigest())"
    )
    here = draw_faces(70, 14, 7, seed=5)
    digest = hashlib.sha256(here.images_NHW.tobytes() + here.labels_N.tobytes()).hexdigest()
    assert python("-c", code).ok().out.strip() == digest


@pytest.mark.parametrize("count", [1, BATCH, BATCH + 1])
def test_the_first_faces_do_not_depend_on_the_number_of_faces(faces: Faces, count: int) -> None:
    few = draw_faces(count, count, 7, seed=0)
    for split in (TRAIN, VAL):
        first = faces.part(split)[:count]
        np.testing.assert_array_equal(few.images_NHW[few.part(split)], faces.images_NHW[first])
        np.testing.assert_array_equal(few.labels_N[few.part(split)], faces.labels_N[first])


def test_classes_are_balanced_and_no_picture_is_blank_or_a_copy(faces: Faces) -> None:
    assert faces.images_NHW.shape == (3570, 48, 48)
    assert faces.images_NHW.dtype == np.uint8
    assert faces.labels_N.dtype == faces.usage_N.dtype == np.int64
    for split, count in ((TRAIN, 2800), (VAL, 700), (TEST, 70)):
        members = np.bincount(faces.labels_N[faces.part(split)], minlength=len(EXPRESSIONS))
        assert members.tolist() == [count / 7] * 7
    assert not np.array_equal(faces.labels_N[:7], faces.labels_N[7:14])
    assert faces.images_NHW.std(axis=(1, 2)).min() > 10
    other = draw_faces(14, 7, 7, seed=1)
    assert len({image.tobytes() for image in (*faces.images_NHW, *other.images_NHW)}) == len(faces) + len(other)
    assert len(set(faces.names)) == len(faces)
    assert other.key != draw_faces(14, 7, 7, seed=2).key


@pytest.mark.parametrize("size", [32, 96])
def test_other_sizes_show_the_same_faces(faces: Faces, size: int) -> None:
    drawn = draw_faces(21, 7, 7, seed=0, size=size).images_NHW
    assert drawn.shape == (35, size, size)
    for image, reference in zip(drawn[:21], faces.images_NHW[:21], strict=True):
        small, other = (grey.reshape(16, len(grey) // 16, 16, -1).mean((1, 3)).ravel() for grey in (image, reference))
        assert np.corrcoef(small, other)[0, 1] > 0.97


def test_a_linear_classifier_of_pixels_learns_but_stays_under_70_percent(faces: Faces) -> None:
    """Ridge regression, as good (0.32) as any linear classifier here: logistic regression has 0.34."""
    train, val = faces.part(TRAIN), faces.part(VAL)
    pixels_NP, target_NK = faces.images_NHW.reshape(len(faces), -1) / 128 - 1, np.eye(7)[faces.labels_N] - 1 / 7
    gram_PP = pixels_NP[train].T @ pixels_NP[train] + 100 * np.eye(48 * 48)
    weights_PK = np.linalg.solve(gram_PP, pixels_NP[train].T @ target_NK[train])
    accuracy = ((pixels_NP[val] @ weights_PK).argmax(1) == faces.labels_N[val]).mean()
    assert 0.25 < accuracy < 0.70


def test_contact_sheet_has_a_row_per_class(faces: Faces) -> None:
    sheet = contact_sheet(faces.images_NHW[:200], faces.labels_N[:200], EXPRESSIONS, 1, columns=4, zoom=1)
    grey = np.asarray(sheet)
    assert sheet.height == 7 * 50
    first = faces.images_NHW[np.flatnonzero(faces.labels_N == 3)[0]]
    margin = sheet.width - 4 * 50
    np.testing.assert_array_equal(grey[150:198, margin : margin + 48], first)
    assert (grey[150:198, :margin] < 128).any()  # the caption
    assert contact_sheet(faces.images_NHW[:0], faces.labels_N[:0], EXPRESSIONS, 1).height == 1
