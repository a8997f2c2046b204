"""Which pictures were asked for, and where their annotated copies go."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from fer_dist.data.pictures import is_picture, walk
from fer_dist.errors import UserError


class Source(NamedTuple):
    """A picture to be read, and its name below the folder that it was asked for with."""

    path: Path
    name: PurePath


class Listing(NamedTuple):
    """Attributes:
    sources: pictures, in the order of the arguments, those of a folder sorted.
    problems: what could not be looked into, and why.
    others: files in folders that are no pictures by their names.
    """

    sources: list[Source]
    problems: list[tuple[Path, str]]
    others: int


def pictures(named: Sequence[Path], *, without: Path | None = None) -> Listing:
    """The files that are named, and all pictures below folders that are; hidden ones are left out.

    Args:
        without: a folder that is not looked into: that of the results.
    """
    sources: list[Source] = []
    problems: list[tuple[Path, str]] = []
    others = 0
    skip = without.resolve() if without else None
    for path in named:
        if not path.is_dir():  # whether it can be read shows when it is
            sources.append(Source(path, PurePath(path.name)))
            continue
        try:
            files = walk(path)
        except UserError as error:
            problems.append((path, error.problem))
            continue
        below = skip.relative_to(path.resolve()) if skip and skip.is_relative_to(path.resolve()) else None
        names = [PurePath(file.name) for file in files]
        if below:
            names = [name for name in names if not name.is_relative_to(below)]
        found = [Source(path / name, name) for name in names if is_picture(name.as_posix())]
        others += len(names) - len(found)
        if not found:
            own = below == PurePath()  # whoever asks for copies beside the pictures is told why none is read
            problems.append((path, "is the folder of the results, too" if own else "holds no picture"))
        sources += found
    return Listing(sources, problems, others)


def targets(sources: Sequence[Source], out: Path) -> list[Path]:
    """Where the annotated copy of each goes: below `out` as it lay below its folder, JPEG or PNG, no name twice.

    Raises:
        UserError: one would replace a picture that was asked for.
    """
    inputs = {os.path.realpath(source.path) for source in sources}  # a link that loops is no error here
    used: set[str] = set()
    found = []
    for source in sources:
        suffix = ".jpg" if source.name.suffix.lower() in (".jpg", ".jpeg") else ".png"
        stem, count = source.name.with_suffix(""), 1
        path = out / f"{stem}{suffix}"
        while str(path).lower() in used:
            count += 1
            path = out / f"{stem}-{count}{suffix}"
        used.add(str(path).lower())
        if os.path.realpath(path) in inputs:
            raise UserError(f"--out {out} would replace {path} by its annotated copy", "--out DIR with another folder")
        found.append(path)
    return found
