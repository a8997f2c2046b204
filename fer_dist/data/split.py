"""Which pictures train and which judge: a held-out validation part, blanks and copies left out."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fer_dist.data.copies import exact_groups
from fer_dist.data.faces import SPLITS, TEST, TRAIN, VAL, Faces
from fer_dist.errors import UserError

_CHUNK = 4096  # pictures looked at together: a few MB out of the memory map

_MARKS = (
    "Usage Training, a folder train/, or file names that begin with Training_",
    "Usage PublicTest, a folder val/, or file names that begin with PublicTest_",
    "Usage PrivateTest, a folder test/, or file names that begin with PrivateTest_",
)


def require_part(faces: Faces, split: int) -> None:
    """Make sure that a split has pictures.

    Raises:
        UserError: it has none.
    """
    counts = [int(np.count_nonzero(faces.usage_N == code)) for code in range(len(SPLITS))]
    if not counts[split]:
        found = ", ".join(f"{name} {count:,}" for name, count in zip(SPLITS, counts, strict=True))
        raise UserError(f"the {SPLITS[split]} part is empty; found {found}", f"it is marked by {_MARKS[split]}")


def hold_out_validation(faces: Faces, fraction: float, seed: int) -> Faces:
    """Move a stratified part of train to val, where train is there and val is not.

    Exact copies of a picture stay on one side, so that val is not recognised by heart. The
    pictures themselves are not copied.

    Args:
        faces: the data set; returned as it is when it has a val part or no train part.
        fraction: part of the pictures of each class.
        seed: of the choice; the same faces and seed give the same choice.
    """
    train_T = faces.part(TRAIN)
    if not train_T.size or faces.part(VAL).size:
        return faces
    groups: dict[int, list[int]] = {}
    for index, group in zip(train_T.tolist(), exact_groups(faces.images_NHW)[train_T].tolist(), strict=True):
        groups.setdefault(group, []).append(index)
    by_class: dict[int, list[list[int]]] = {}
    for copies in groups.values():  # a group with two labels counts as its first
        by_class.setdefault(int(faces.labels_N[copies[0]]), []).append(copies)
    random = np.random.default_rng(seed)
    usage_N = faces.usage_N.copy()
    for _, candidates in sorted(by_class.items()):
        quota = max(1, round(fraction * sum(map(len, candidates))))
        for i in random.permutation(len(candidates))[1:]:  # one group always stays in train
            if quota <= 0:
                break
            usage_N[candidates[i]] = VAL
            quota -= len(candidates[i])
    held = int(np.count_nonzero(usage_N == VAL))
    note = (
        f"no validation part is marked: {held:,} of {len(train_T):,} training pictures "
        f"({fraction:.0%} of each class, seed {seed}) are held out as validation"
    )
    return replace(faces, usage_N=usage_N, notes=(*faces.notes, note))


def training_index(faces: Faces, drop_copies: bool) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """The pictures to train on: train without blank ones, and without copies if asked.

    Evaluation parts are never thinned. The pictures are not copied.

    Args:
        faces: the data set.
        drop_copies: leave out training pictures that are exact copies of val or test pictures.

    Returns:
        int64 indices, ascending, and a sentence for each kind that was left out.

    Raises:
        UserError: nothing is left.
    """
    require_part(faces, TRAIN)
    index_T = faces.part(TRAIN)
    blank_T = _is_blank(faces, index_T)
    notes: tuple[str, ...] = ()
    if blank_T.any():
        notes += (f"{np.count_nonzero(blank_T):,} blank training pictures are left out",)
    kept = index_T[~blank_T]
    if drop_copies:
        others = np.concatenate([faces.part(VAL), faces.part(TEST)])
        group_N = exact_groups(faces.images_NHW)
        copy = np.isin(group_N[kept], group_N[others])
        notes += (f"{np.count_nonzero(copy):,} training pictures are copies of evaluation pictures and left out",)
        kept = kept[~copy]
    if not kept.size:
        raise UserError(
            "no training picture is left: all are blank or copies of evaluation pictures",
            "--data.drop_copies false, or other data",
        )
    return kept, notes


def _is_blank(faces: Faces, index_N: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each picture is of one single grey level, bool `[N]`."""
    blank_N = np.zeros(len(index_N), dtype=bool)
    for start in range(0, len(index_N), _CHUNK):
        pixels_ND = faces.images_NHW[index_N[start : start + _CHUNK]].reshape(-1, faces.images_NHW[0].size)
        blank_N[start : start + _CHUNK] = (pixels_ND == pixels_ND[:, :1]).all(axis=1)
    return blank_N
