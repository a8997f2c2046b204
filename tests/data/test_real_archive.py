"""The real FER2013 archive (Training and PublicTest); skipped where it is not."""

from pathlib import Path

import numpy as np
import pytest

from fer_dist.config import DataConfig
from fer_dist.data import cache
from fer_dist.data.faces import TEST, TRAIN, VAL
from fer_dist.data.split import training_index
from fer_dist.spec import LabelSet

pytestmark = pytest.mark.slow


def test_counts_blanks_copies_and_the_cache(real_archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cache.open_faces(DataConfig(path=str(real_archive)), LabelSet())
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
