"""The audit finds what was planted, exactly."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from fer_dist.audit import _sections, draw, summary
from fer_dist.data import copies
from fer_dist.data.audit import Copies, Findings, Picture, audit, exact_groups
from fer_dist.data.copies import near_pairs
from fer_dist.data.faces import TEST, TRAIN, VAL, Faces
from fer_dist.spec import EXPRESSIONS
from tests.helpers.picture_files import faces_of

ANGRY, DISGUST, FEAR, HAPPY, SAD, SURPRISE, NEUTRAL = range(7)


def blobs(count: int, side: int = 48) -> NDArray[np.uint8]:
    """Unlike pictures `[N, S, S]` with large and small detail, between 30 and 230."""
    random = np.random.default_rng(0)
    coarse_NHW = np.kron(random.uniform(-1, 1, (count, 6, 6)), np.ones((-(-side // 6), -(-side // 6))))
    noise_NHW = random.uniform(-0.3, 0.3, (count, side, side))
    return (130 + 75 * (coarse_NHW[:, :side, :side] + noise_NHW)).astype(np.uint8)


def planted() -> Faces:
    a, b, c, d, e, f, g = blobs(7)
    black, grey = np.zeros_like(a), np.full_like(a, 77)
    flat = grey.copy()
    flat[:, :24] += 2  # deviation 1.0
    rows: list[tuple[NDArray[np.uint8], int, int]] = [
        (a, ANGRY, TRAIN),  # 0, 1: exact, one split, one label
        (a, ANGRY, TRAIN),
        (b, HAPPY, VAL),  # 2, 3: exact, across splits, two labels
        (b, SAD, TRAIN),
        (c, FEAR, TRAIN),  # 4, 5: near (darker, less contrast), across splits
        ((c * 0.5 + 10).astype(np.uint8), FEAR, VAL),
        (d, HAPPY, TRAIN),  # 6, 7: mirrored, two labels
        (d[:, ::-1], NEUTRAL, TRAIN),
        (black, ANGRY, TRAIN),  # 8, 9: black, across splits, two labels
        (black, SAD, TEST),
        (grey, DISGUST, VAL),  # 10: blank, but not black
        (flat, SURPRISE, TRAIN),  # 11: nearly flat; 12 its near copy, which must not count
        (flat[:, ::-1], SURPRISE, VAL),
        (e, SURPRISE, VAL),  # 13, 14: mirrored and brighter, across the two evaluation parts
        (np.minimum(e[:, ::-1] + 20, 255).astype(np.uint8), SURPRISE, TEST),
        (a[::-1], ANGRY, VAL),  # 15: upside down is no copy
        (f, NEUTRAL, TEST),  # 16, 17: test and train: the train one is no leak
        (f, NEUTRAL, TRAIN),
        (g, HAPPY, TEST),
    ]
    images, labels, usage = zip(*rows, strict=True)
    names = [f"row {i}" for i in range(len(rows))]
    return faces_of(np.stack(images), labels, usage, names=names, notes=("a note of the reader",))


@pytest.fixture(scope="module")
def found() -> Findings:
    return audit(planted())


def at(pictures: Sequence[Picture]) -> list[int]:
    return [p.index for p in pictures]


def kinds(groups: Sequence[Copies]) -> list[tuple[str, list[int], bool, bool]]:
    return sorted((c.kind, at(c.pictures), c.labels_differ, c.splits_differ) for c in groups)


def test_planted_pictures_are_found(found: Findings) -> None:
    assert [(p.index, p.grey) for p in found.blank] == [(8, 0), (9, 0), (10, 77)]
    assert [(p.index, p.deviation) for p in found.flat] == [(11, 1.0), (12, 1.0)]
    assert kinds(found.exact) == [
        ("exact", [0, 1], False, False),
        ("exact", [2, 3], True, True),
        ("exact", [8, 9], True, True),
        ("exact", [16, 17], False, True),
    ]
    assert kinds(found.near_copies) == [
        ("mirrored", [6, 7], True, False),
        ("mirrored", [13, 14], False, True),
        ("near", [4, 5], False, True),
    ]
    assert all(0.999 < c.correlation <= 1 for c in found.near_copies)
    assert at(found.leaks) == [2, 9, 16], "copies in an earlier part"
    assert at(found.near_leaks) == [5, 14]
    assert found.per_class["angry"] == {"train": 3, "val": 1, "test": 0}
    assert found.per_class["surprise"] == {"train": 1, "val": 2, "test": 1}
    assert list(found.per_class) == list(EXPRESSIONS)
    assert found.to_dict()["exact"][1]["pictures"][0]["name"] == "row 2"


def test_the_summary_and_the_picture(found: Findings) -> None:
    assert summary(found) == [
        "pictures: 9 train + 6 val + 4 test",
        "black pictures: 2 (1 train, 0 val, 1 test)",
        "blank pictures of another grey: 1",
        "nearly flat pictures (standard deviation under 3 grey levels): 2 (1 train, 1 val, 0 test)",
        "distinct pictures: 15",
        "groups of exact copies: 4",
        "groups of exact copies with conflicting labels: 2",
        "groups of exact copies across splits: 3",
        "val pictures copied from train: 1",
        "test pictures copied from train or val: 2",
        "pairs of near copies (correlation >= 0.98): 1 (0 with conflicting labels, 1 across splits)",
        "pairs of mirrored copies (likewise): 2 (1 with conflicting labels, 1 across splits)",
        "val pictures with only a near or mirrored copy in train: 1",
        "test pictures with only a near or mirrored copy in train or val: 1",
        "note: a note of the reader",
    ]
    assert [(title, [at(pictures) for _, pictures in tiles]) for title, tiles in _sections(found)] == [
        ("Blank and nearly flat pictures: 5", [[11], [12], [8], [9], [10]]),
        ("The same picture with different labels, blank ones aside: 1", [[3, 2]]),
        ("Near copies in different splits: 1", [[4, 5]]),
        ("Mirrored copies in different splits: 1", [[13, 14]]),
    ]
    sheet = draw(planted(), found)
    assert sheet.mode == "L"
    assert 0 < np.asarray(sheet).mean() < 255
    assert sheet.height > 4 * 144  # four sections, each with a row of pictures


def test_a_near_copy_speaks_for_the_exact_copies_of_both() -> None:
    a, b = blobs(2)
    darker = (a * 0.5).astype(np.uint8)
    found = audit(faces_of(np.stack([a, darker, b, a, darker]), [0] * 5, [TRAIN, TRAIN, TRAIN, TRAIN, VAL]))
    assert kinds(found.near_copies) == [("near", [0, 3, 1, 4], False, True)]
    assert at(found.leaks) == [4]
    assert found.near_leaks == ()  # counted once, as exact


def test_all_pictures_alike_or_blank() -> None:
    stages: set[str] = set()
    for image in (blobs(1)[0], np.zeros((48, 48), dtype=np.uint8)):
        faces = faces_of(np.stack([image] * 3), range(3), [TRAIN, VAL, TEST])
        found = audit(faces, progress=lambda what, done, total: stages.add(what))
        assert found.counts["distinct"] == 1
        assert at(found.leaks) == [1, 2]
    assert stages == {"blank pictures", "near copies"}


@pytest.mark.parametrize("near", [0, 1.01, float("nan")])
def test_a_threshold_that_is_not_a_correlation_is_refused(near: float) -> None:
    with pytest.raises(ValueError, match="correlation"):
        audit(planted(), near=near)


def test_exact_groups_are_numbered_by_first_appearance() -> None:
    a, b, c = blobs(3)
    assert exact_groups(np.stack([a, b, a, c, b, a.T])).tolist() == [0, 1, 0, 2, 1, 3]
    assert exact_groups(a[:0].reshape(0, 48, 48)).tolist() == []


@pytest.mark.parametrize(("side", "near"), [(48, 0.98), (17, 0.98), (10, 0.95)])
def test_the_prefilter_loses_nothing(side: int, near: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies on both sides of the threshold, with all of the difference in what the prefilter does not see.

    Compared with numpy's own correlation of every pair at full resolution.
    """
    monkeypatch.setattr(copies, "BLOCK", 50)  # several blocks, the last one short
    random = np.random.default_rng(1)
    base_NHW = blobs(40, side).astype(np.float64)
    checks_HW = 1.0 - 2 * (np.indices((side, side)).sum(axis=0) % 2)  # the highest frequency
    strength_N11 = random.uniform(0, 2.2 * np.sqrt(2 * (1 - near)) * 40, (160, 1, 1))
    some_NHW = np.tile(base_NHW, (4, 1, 1)) + strength_N11 * random.choice([-1, 1], (160, 1, 1)) * checks_HW
    some_NHW[::3] = some_NHW[::3, :, ::-1]
    images_NHW = np.clip(some_NHW, 0, 255).astype(np.uint8)
    both_NN = np.corrcoef(images_NHW.reshape(160, -1), images_NHW[:, :, ::-1].reshape(160, -1))
    plain_NN, mirrored_NN = both_NN[:160, :160], both_NN[:160, 160:]
    best_NN = np.triu(np.maximum(plain_NN, mirrored_NN), 1)
    expected = {(a, b, mirrored_NN[a, b] > plain_NN[a, b]) for a, b in np.argwhere(best_NN >= near)}
    pairs, notes = near_pairs(images_NHW, np.arange(160), near, lambda what, done, total: None)
    assert {(a, b, mirrored) for a, b, _, mirrored in pairs} == expected
    assert 20 < len(expected) < 40 * 6  # of the 240 pairs of one base, some are near and some are not
    assert notes == ()
    assert [c for _, _, c, _ in pairs] == sorted((c for _, _, c, _ in pairs), reverse=True)


def test_too_many_pairs_end_the_search_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "MAX_PAIRS", 5)
    found = audit(faces_of(np.stack([blobs(1)[0] // 2 + i for i in range(20)]), [0] * 20, [TRAIN] * 20))
    assert found.counts["near_pairs"] == 5
    assert "ended at 5 pairs" in found.notes[0]
