"""What is wrong with a data set: blanks, exact and near copies, leaks between splits, conflicting labels.

Conventions, which on the FER2013 archive (Training and PublicTest) give the published figures:

- Every picture counts, blank ones too: the 12 black pictures are one of the 1,273 groups of exact
  copies, one of the 47 with conflicting labels and one of the 270 across splits.
- A leak is an evaluation picture with a copy in an earlier part: a val picture in train, a test
  picture in train or val. These are the pictures that the *clean* accuracy leaves out. A train
  picture is never a leak.
- Near copies are searched among distinct pictures (one of each exact group), without blank and
  nearly flat ones, whose correlation is undefined or noise. A pair then speaks for all members of
  both exact groups. Pairs are not chained: A near B and B near C do not make A a copy of C.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fer_dist.data.copies import Pair, Progress, exact_groups, near_pairs, rows_at_once
from fer_dist.data.faces import SPLITS, Faces
from fer_dist.spec import LabelSet

__all__ = ["FLAT", "Copies", "Findings", "Picture", "audit", "exact_groups"]

FLAT = 3.0
"""Grey levels of standard deviation under which a picture that is not blank is nearly flat."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture: its place in the set, exact group (`exact_groups`), mean and deviation [grey levels]."""

    index: int
    group: int
    name: str
    split: str
    label: str
    grey: float
    deviation: float


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Pictures that are copies: all members of one exact group, or of two that are near.

    Attributes:
        kind: "exact", "near" or "mirrored" (near once one of the two is mirrored).
        correlation: Pearson correlation of the two at full resolution; 1.0 for exact copies.
        labels_differ: the members do not all have one label.
        splits_differ: the members are not all in one split.
        pictures: two or more; those of the same `group` are identical.
    """

    kind: str
    correlation: float
    labels_differ: bool
    splits_differ: bool
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of `audit`; see the module for the conventions.

    Attributes:
        counts: every figure by name.
        per_class: pictures by label, then by split.
        near: the correlation from which a pair counts as near.
        blank: constant pictures (`grey` 0: black). flat: deviation under `FLAT`, not constant.
        exact: groups of identical pictures. near_copies: pairs, most alike first.
        leaks: evaluation pictures with an exact copy in an earlier part.
        near_leaks: evaluation pictures that have only a near or mirrored copy there.
        notes: what the reader or the audit left out, one sentence each.
    """

    counts: dict[str, int]
    per_class: dict[str, dict[str, int]]
    near: float
    blank: tuple[Picture, ...]
    flat: tuple[Picture, ...]
    exact: tuple[Copies, ...]
    near_copies: tuple[Copies, ...]
    leaks: tuple[Picture, ...]
    near_leaks: tuple[Picture, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the counts first."""
        return asdict(self)


def audit(
    faces: Faces, *, near: float = 0.98, progress: Progress | None = None, labels: LabelSet | None = None
) -> Findings:
    """Look through a whole data set; reads it only, needs under 1 GB beside it.

    Args:
        faces: uint8 `[N, S, S]` pictures with labels and splits.
        near: Pearson correlation from which two pictures are near copies, in (0, 1].
        progress: called often with (what, done, total).
        labels: names of the classes; None: FER2013's seven.

    Raises:
        ValueError: `near` is outside (0, 1].
    """
    if not 0 < near <= 1:
        raise ValueError(f"near is {near}, expected a correlation in (0, 1]")
    tell = progress or (lambda what, done, total: None)
    group_N = exact_groups(faces.images_NHW)
    stats_N3 = _statistics(faces.images_NHW, tell)
    names = (labels or LabelSet()).names
    pictures = _pictures(faces, names, group_N, stats_N3)
    first_G = np.unique(group_N, return_index=True)[1]  # one picture of each group, ascending
    pairs, notes = near_pairs(faces.images_NHW, first_G[stats_N3[first_G, 2] >= FLAT], near, tell)

    members: list[list[Picture]] = [[] for _ in first_G]
    for picture in pictures:
        members[picture.group].append(picture)
    exact = [_copies("exact", 1.0, same) for same in members if len(same) > 1]
    near_copies = [
        _copies("mirrored" if mirrored else "near", correlation, members[group_N[a]] + members[group_N[b]])
        for a, b, correlation, mirrored in pairs
    ]
    leak_N, near_leak_N = _leaks(faces.usage_N, group_N, pairs)
    seen = Counter((p.label, p.split) for p in pictures)
    found = Findings(
        counts={},
        per_class={label: {split: seen[label, split] for split in SPLITS} for label in names},
        near=near,
        blank=tuple(p for p in pictures if stats_N3[p.index, 0] == 0),
        flat=tuple(p for p in pictures if stats_N3[p.index, 0] > 0 and p.deviation < FLAT),
        exact=tuple(exact),
        near_copies=tuple(near_copies),
        leaks=tuple(pictures[i] for i in np.flatnonzero(leak_N)),
        near_leaks=tuple(pictures[i] for i in np.flatnonzero(near_leak_N)),
        notes=(*faces.notes, *notes),
    )
    return replace(found, counts=_counts(found, pictures, distinct=len(first_G)))


def _statistics(images_NHW: NDArray[np.uint8], tell: Progress) -> NDArray[np.float64]:
    """Range (max - min), mean and standard deviation of each picture, float64 `[N, 3]`."""
    stats_N3 = np.empty((len(images_NHW), 3))
    for start in range(0, len(images_NHW), rows_at_once(images_NHW)):
        image_BP = images_NHW[start : start + rows_at_once(images_NHW)].reshape(-1, images_NHW.shape[-1] ** 2)
        stop = start + len(image_BP)
        stats_N3[start:stop] = np.column_stack([np.ptp(image_BP, axis=1), image_BP.mean(axis=1), image_BP.std(axis=1)])
        tell("blank pictures", stop, len(images_NHW))
    return stats_N3


def _pictures(
    faces: Faces, labels: Sequence[str], group_N: NDArray[np.int64], stats_N3: NDArray[np.float64]
) -> list[Picture]:
    columns = (group_N, faces.names, faces.usage_N, faces.labels_N, stats_N3.round(3))
    return [
        Picture(
            index=i,
            group=int(g),
            name=str(name),
            split=SPLITS[u],
            label=labels[y],
            grey=float(grey),
            deviation=float(deviation),
        )
        for i, (g, name, u, y, (_, grey, deviation)) in enumerate(zip(*columns, strict=True))
    ]


def _copies(kind: str, correlation: float, pictures: Sequence[Picture]) -> Copies:
    return Copies(
        kind=kind,
        correlation=round(correlation, 6),
        labels_differ=len({p.label for p in pictures}) > 1,
        splits_differ=len({p.split for p in pictures}) > 1,
        pictures=tuple(pictures),
    )


def _leaks(
    usage_N: NDArray[np.int64], group_N: NDArray[np.int64], pairs: Sequence[Pair]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which pictures have an exact copy in an earlier part, and which only a near one."""
    earliest_G = np.full(group_N.max(initial=-1) + 1, len(SPLITS))
    np.minimum.at(earliest_G, group_N, usage_N)
    near_G = earliest_G.copy()
    for a, b, _, _ in pairs:
        near_G[group_N[a]] = min(near_G[group_N[a]], earliest_G[group_N[b]])
        near_G[group_N[b]] = min(near_G[group_N[b]], earliest_G[group_N[a]])
    leak_N = usage_N > earliest_G[group_N]
    return leak_N, (usage_N > near_G[group_N]) & ~leak_N


def _counts(found: Findings, pictures: Sequence[Picture], distinct: int) -> dict[str, int]:
    """Every figure; `x_train`, `x_val` and `x_test` are the parts of `x`."""
    counts: dict[str, int] = {}

    def by_split(name: str, some: Sequence[Picture]) -> None:
        counts[name] = len(some)
        counts.update({f"{name}_{split}": sum(p.split == split for p in some) for split in SPLITS})

    def copies(name: str, some: Sequence[Copies]) -> None:
        counts[name] = len(some)
        counts[f"{name}_labels_differ"] = sum(c.labels_differ for c in some)
        counts[f"{name}_splits_differ"] = sum(c.splits_differ for c in some)

    by_split("pictures", pictures)
    by_split("blank", found.blank)
    by_split("black", [p for p in found.blank if p.grey == 0])
    by_split("flat", found.flat)
    counts["distinct"] = distinct
    copies("exact_groups", found.exact)
    copies("near_pairs", [c for c in found.near_copies if c.kind == "near"])
    copies("mirrored_pairs", [c for c in found.near_copies if c.kind == "mirrored"])
    by_split("leaks", found.leaks)
    by_split("near_leaks", found.near_leaks)
    return counts
