"""`python -m fer_dist.audit --data PATH --out DIR`: what is wrong with a data set, as table, JSON and picture."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from fer_dist.commandline import run
from fer_dist.config import Config, DataConfig
from fer_dist.errors import UserError
from fer_dist.options import walk

if TYPE_CHECKING:  # heavy at run time: --help must answer at once
    from PIL.Image import Image

    from fer_dist.data.audit import Findings, Picture
    from fer_dist.data.copies import Progress
    from fer_dist.data.faces import Faces

PROG = "python -m fer_dist.audit"
ABOUT = """\
Looks through a data set and changes nothing in it: counts per class and split, blank and nearly flat
pictures, exact copies, near copies (correlation >= 0.98, mirror images included), copies across splits
and conflicting labels. Writes DIR/audit.json with every finding and DIR/audit.png with the worst."""
SETTINGS = ("path", "cache_dir", "size", "on_error", "embedded_train", "embedded_val", "embedded_seed")
"""Those of the `data.*` settings that say which pictures there are."""

TILE = 144
"""Side of a shown picture [pixels]."""

ROW = 8
"""Pictures side by side."""

SHOWN = 16
"""Most findings of a sort that are shown."""

Tile = tuple[str, "list[Picture]"]
"""A caption, and the one or two pictures above it."""


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, or with 2 after a UserError."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    data, out = _parse(argv)
    _check_writable(out)
    if data.path is None:
        print("auditing the embedded drawn faces; --data PATH names your own", flush=True)

    from fer_dist.data.audit import audit
    from fer_dist.data.cache import open_faces
    from fer_dist.spec import LabelSet

    labels = LabelSet()
    faces = open_faces(data, labels)
    with _progress() as progress:
        found = audit(faces, progress=progress, labels=labels)
    _print(found)
    plain = {"counts": found.counts, "data": data.path or "embedded", "key": faces.key, **found.to_dict()}
    _replace(out / "audit.json", lambda path: path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8"))
    _replace(out / "audit.png", lambda path: draw(faces, found).save(path, format="PNG"))
    print(f"wrote {out / 'audit.json'} and {out / 'audit.png'}")


def _parse(argv: Sequence[str]) -> tuple[DataConfig, Path]:
    parser = argparse.ArgumentParser(
        prog=PROG, description=ABOUT, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="DIR", default="audit", help="folder of the report, made if need be (audit)")
    for name, f in walk(DataConfig):
        if name in SETTINGS:
            flags = ["--data", "--data.path"] if name == "path" else [f"--data.{name}"]
            text = f"{f.metadata['help']} ({'none' if f.default is None else f.default})"
            metavar = "PATH" if name == "path" else "VALUE"
            parser.add_argument(*flags, dest=f"data.{name}", metavar=metavar, help=text.replace("%", "%%"))
    given, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            if name not in dict(walk(Config)):
                Config().override({name: ""})  # raises, and shows the nearest name
            raise UserError(f"--{name} is not a setting of the audit", f"{PROG} --help lists them")
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}", f"{PROG} --data PATH --out DIR")
    values = {name: value for name, value in vars(given).items() if name != "out" and value is not None}
    return Config().override(values).data, Path(given.out)


def _check_writable(out: Path) -> None:
    """Make the folder, and find out before the long work whether files can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from None
    _replace(out / ".writable", lambda path: path.touch())
    (out / ".writable").unlink(missing_ok=True)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            write(beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written: {error.strerror or error}", "--out DIR with a folder that can be written"
    )


@contextmanager
def _progress() -> "Iterator[Progress]":
    """Bars on a terminal, else a line when a stage begins and at each quarter of it; both on stderr."""
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    console = Console(stderr=True)
    if not console.is_terminal:
        told: set[tuple[str, int]] = set()

        def line(what: str, done: int, total: int) -> None:
            quarter = 4 * done // total
            if (what, quarter) not in told:
                told.add((what, quarter))
                print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)

        yield line
        return
    with Bars(console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield bar


def _print(found: "Findings") -> None:
    """The table of classes and splits, then one figure a line."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, show_footer=True)
    columns = [split for split in ("train", "val", "test") if found.counts[f"pictures_{split}"]]
    table.add_column("class", footer="all")
    for split in columns:
        table.add_column(split, justify="right", footer=f"{found.counts[f'pictures_{split}']:,}")
    table.add_column("all", justify="right", footer=f"{found.counts['pictures']:,}")
    for label, by_split in found.per_class.items():
        table.add_row(label, *(f"{by_split[s]:,}" for s in columns), f"{sum(by_split.values()):,}")
    console.print(table)
    for line in summary(found):
        console.print(line)


def summary(found: "Findings") -> list[str]:
    """Every figure as a sentence."""
    n = found.counts
    splits = [split for split in ("train", "val", "test") if n[f"pictures_{split}"]]

    def by_split(name: str, joint: str = ", ") -> str:
        return joint.join(f"{n[name + '_' + split]:,} {split}" for split in splits)

    def shared(name: str) -> str:
        differ = (n[f"{name}_{what}_differ"] for what in ("labels", "splits"))
        return "{:,} ({:,} with conflicting labels, {:,} across splits)".format(n[name], *differ)

    earlier = {"val": "train", "test": "train or val"}
    return [
        f"pictures: {by_split('pictures', ' + ')}",
        f"black pictures: {n['black']:,} ({by_split('black')})",
        f"blank pictures of another grey: {n['blank'] - n['black']:,}",
        f"nearly flat pictures (standard deviation under 3 grey levels): {n['flat']:,} ({by_split('flat')})",
        f"distinct pictures: {n['distinct']:,}",
        f"groups of exact copies: {n['exact_groups']:,}",
        f"groups of exact copies with conflicting labels: {n['exact_groups_labels_differ']:,}",
        f"groups of exact copies across splits: {n['exact_groups_splits_differ']:,}",
        *(f"{s} pictures copied from {earlier[s]}: {n['leaks_' + s]:,}" for s in splits if s in earlier),
        f"pairs of near copies (correlation >= {found.near}): {shared('near_pairs')}",
        f"pairs of mirrored copies (likewise): {shared('mirrored_pairs')}",
        *(
            f"{s} pictures with only a near or mirrored copy in {earlier[s]}: {n['near_leaks_' + s]:,}"
            for s in splits
            if s in earlier
        ),
        *(f"note: {note}" for note in found.notes),
    ]


def draw(faces: "Faces", found: "Findings") -> "Image":
    """The worst cases as one picture: blanks, conflicting labels, near and mirrored copies across splits."""
    from PIL import Image, ImageDraw, ImageFont

    font, bold = ImageFont.load_default(size=13), ImageFont.load_default(size=19)
    cell, line, margin = TILE + 8, 17, 24
    across = ROW * (cell + margin // 2) + margin
    sheet = Image.new("L", (across, 4_000), 255)
    pen = ImageDraw.Draw(sheet)
    pen.text(
        (margin, margin), "Under each picture: label / split, and the name of its file or row", fill=110, font=font
    )
    y = margin + 2 * line
    for title, tiles in _sections(found):
        pen.text((margin, y), title, fill=0, font=bold)
        y += 2 * line
        x = margin
        for caption, pictures in tiles:
            if x + len(pictures) * cell > across:
                x, y = margin, y + TILE + 4 * line
            pen.text((x, y + TILE + 2 * line), caption, fill=110, font=font)
            for picture in pictures:
                tile = Image.fromarray(faces.images_NHW[picture.index])
                sheet.paste(tile.resize((TILE, TILE), Image.Resampling.NEAREST), (x, y))
                pen.text((x, y + TILE + 2), f"{picture.label} / {picture.split}", fill=0, font=font)
                pen.text((x, y + TILE + line), _short(picture.name), fill=110, font=font)
                x += cell
            x += margin // 2 * len(pictures)
        y += TILE + 5 * line if tiles else line
    return sheet.crop((0, 0, across, y))


def _sections(found: "Findings") -> list[tuple[str, list[Tile]]]:
    """Title and tiles of each part of the picture, the worst first."""
    blank = [(f"grey {p.grey:.0f}, deviation {p.deviation:.1f}", [p]) for p in (*found.flat, *found.blank)]
    exact = [c for c in found.exact if c.labels_differ and c.pictures[0].deviation > 0]
    exact.sort(key=lambda c: (-len({p.label for p in c.pictures}), -len(c.pictures)))
    wrong = [(f"identical: {len(c.pictures)} pictures", _unlike(c.pictures, c.pictures)) for c in exact]

    def pairs(kind: str) -> list[Tile]:
        some = [c for c in found.near_copies if c.kind == kind and c.splits_differ]
        some.sort(key=lambda c: (not c.labels_differ, -c.correlation))
        tiles = []
        for c in some:
            first = [p for p in c.pictures if p.group == c.pictures[0].group]
            second = [p for p in c.pictures if p.group != c.pictures[0].group]
            tiles.append((f"correlation {c.correlation:.4f}", _unlike(first, second)))
        return _new_first(tiles)

    parts = [
        ("Blank and nearly flat pictures", blank),
        ("The same picture with different labels, blank ones aside", wrong),
        ("Near copies in different splits", pairs("near")),
        ("Mirrored copies in different splits", pairs("mirrored")),
    ]
    return [
        (f"{title}: {len(tiles) or 'none'}" + f", {SHOWN} shown" * (len(tiles) > SHOWN), tiles[:SHOWN])
        for title, tiles in parts
    ]


def _new_first(tiles: list[Tile]) -> list[Tile]:
    """Put off tiles with a picture that was there before: one picture may have many near copies."""
    seen: set[int] = set()
    again: list[bool] = []
    for _, pictures in tiles:
        groups = {p.group for p in pictures}
        again.append(bool(groups & seen))
        seen |= groups
    return [tiles[k] for k in sorted(range(len(tiles)), key=again.__getitem__)]


def _unlike(some: "Sequence[Picture]", others: "Sequence[Picture]") -> "list[Picture]":
    """One of each that differ as much as can be, in label and split."""
    kinds = [{(p.label, p.split): p for p in reversed(side)} for side in (some, others)]
    a, b = max(product(*kinds), key=lambda ab: (ab[0][0] != ab[1][0]) + (ab[0][1] != ab[1][1]))
    return [kinds[0][a], kinds[1][b]]


def _short(name: str) -> str:
    """The end of a name, as wide as a tile and in letters that the font has."""
    return Path(name).stem[-20:].encode("ascii", "replace").decode()


if __name__ == "__main__":
    main()
