"""The real FER2013 archive (Training and PublicTest); skipped where it is not."""

from pathlib import Path

import numpy as np
import pytest

from fer_dist.config import DataConfig
from fer_dist.data import cache
from fer_dist.data.copies import exact_groups, near_pairs
from fer_dist.data.faces import TEST, TRAIN, VAL, Faces
from fer_dist.data.split import training_index
from fer_dist.spec import LabelSet
from tests.data.test_audit import brute


@pytest.fixture(scope="module")
def real(real_archive: Path) -> Faces:
    return cache.open_faces(DataConfig(path=str(real_archive)), LabelSet())


def test_counts_blanks_copies_and_the_cache(real: Faces, real_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {split: np.bincount(real.labels_N[real.part(split)], minlength=7).tolist() for split in (TRAIN, VAL, TEST)}
    assert counts[TRAIN] == [3995, 436, 4097, 7215, 4830, 3171, 4965]
    assert counts[VAL] == [467, 56, 496, 895, 653, 415, 607]  # PublicTest_, although its folder is test/
    assert counts[TEST] == [0] * 7
    assert real.images_NHW.shape == (28_709 + 3_589, 48, 48)
    assert len(set(real.names)) == len(real)
    index, _ = training_index(real, drop_copies=False)
    assert len(index) == 28_709 - 11
    assert len(training_index(real, drop_copies=True)[0]) < len(index)
    monkeypatch.setattr(cache, "read_faces", lambda *_, **__: pytest.fail("decoded again"))
    again = cache.open_faces(DataConfig(path=str(real_archive)), LabelSet())
    assert again.key == real.key
    assert list(again.names) == list(real.names)


def test_the_prefilter_of_near_copies_loses_nothing(real: Faces) -> None:
    """3,000 distinct pictures; 0.85 instead of 0.98, for the sake of many pairs, mirrored ones among them."""
    images_NHW = np.asarray(real.images_NHW)
    first_G = np.unique(exact_groups(images_NHW), return_index=True)[1]
    textured_G = first_G[images_NHW[first_G].std(axis=(1, 2)) >= 3]
    some_NHW = images_NHW[np.sort(np.random.default_rng(0).choice(textured_G, 3000, replace=False))]
    pairs, _ = near_pairs(some_NHW, np.arange(3000), 0.85, lambda what, done, total: None)
    want = brute(some_NHW, 0.85)
    assert {(a, b, mirrored) for a, b, _, mirrored in pairs} == want
    assert len(want) > 20
    assert any(mirrored for *_, mirrored in want)
