"""`python -m fer_dist.predict IMAGE_OR_FOLDER...`: finds the faces in pictures and says which expression each shows."""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fer_dist.commandline import Parser, run
from fer_dist.errors import UserError, printable

if TYPE_CHECKING:  # heavy at run time: --help must answer at once
    from fer_dist.serve.listing import Listing
    from fer_dist.serve.predictor import Answer, Prediction, Predictor

PROG = "python -m fer_dist.predict"
ABOUT = """\
Finds the faces in pictures, and says of each which expression it shows, with probabilities. A picture without a
face is said to have none. Files that cannot be read are listed; the exit code is 2 only if none could be."""
MOST = 65_536
"""Largest batch."""
SECONDS_BETWEEN_LINES = 15.0
"""Where there is no terminal, long work says at most so often how far it is."""


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, or with 2 after a UserError."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    given = _parse(argv)

    from fer_dist.serve.faces import DETAIL, MARGIN, YuNet
    from fer_dist.serve.predictor import Predictor
    from fer_dist.serve.runner import open_runner
    from fer_dist.serve.shipped import default_model

    path = given.model or default_model()
    with open_runner(path, device=given.device, provider=given.device) as runner, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata, which says nothing about pixels
        detector = None if given.no_detect else YuNet(DETAIL if given.detail is None else given.detail)
        predictor = Predictor(runner, detector, margin=MARGIN if given.margin is None else given.margin)
        print(f"model {printable(str(path))} ({runner.spec.arch}, {runner.precision}) on {runner.runs_on}", flush=True)
        _predict(given, predictor)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(PROG, ABOUT)
    parser.add_argument("paths", metavar="IMAGE_OR_FOLDER", type=Path, nargs="+", help="pictures, and folders of them")
    parser.add_argument("--model", metavar="FILE", type=Path, help=".pth, .onnx or .engine (the one that ships)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything as JSON")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write a line for each face")
    parser.add_argument("--out", metavar="DIR", type=Path, help="write copies with boxes and labels into this folder")
    parser.add_argument("--no-detect", action="store_true", help="the pictures are crops of faces already")
    parser.add_argument(
        "--margin",
        metavar="F",
        type=float,
        help="room around a face, as a share of its box on each side (0: as tight as FER2013)",
    )
    parser.add_argument(
        "--detail",
        metavar="PIXELS",
        type=int,
        help="longer side of the copy in which small faces are looked for; more finds smaller ones and is slower (960)",
    )
    parser.add_argument("--batch", metavar="N", type=_count, help="faces that the model gets at once (64)")
    parser.add_argument("--workers", metavar="N", type=_count, help="threads that read and find faces (one a core)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the model (auto)")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= MOST:
        raise argparse.ArgumentTypeError(f"{text} is not a number within 1..{MOST}")
    return int(text)


def _predict(given: argparse.Namespace, predictor: "Predictor") -> None:
    """Find the files, go through them, and say in the end what became of them."""
    from fer_dist.serve.listing import pictures, targets
    from fer_dist.serve.records import Records

    found = pictures(given.paths, without=given.out)
    copies = targets(found.sources, given.out) if given.out else []
    if given.out:
        _make_folder(given.out)
    read = faces = without = 0
    with (
        Records(given.json, given.csv, about=_about(given, predictor), labels=predictor.labels) as records,
        _progress(len(found.sources)) as advance,
    ):
        for number, answer in enumerate(_answers(found, predictor, given)):
            records.add(answer)
            if answer.problem:
                print(f"not read: {printable(f'{answer.path}: {answer.problem}')}", file=sys.stderr, flush=True)
            else:
                read, faces, without = read + 1, faces + len(answer.faces), without + (not answer.faces)
                print("\n".join(_lines(answer, predictor.labels)), flush=True)
                if copies:
                    _draw(answer, predictor.labels, copies[number])
            advance()
        asked = len(found.sources) + len(found.problems)
        if not read:
            raise UserError(
                f"none of {asked:,} could be read", "name pictures (JPEG, PNG, BMP, WebP, GIF), or folders of them"
            )
    print(
        f"{read:,} picture{'s' * (read != 1)}, {faces:,} face{'s' * (faces != 1)}; "
        f"{without:,} without a face; {asked - read:,} not read"
    )
    if found.others:
        print(f"in the folders, no pictures by their names: {found.others:,}")
    for name in filter(None, (given.json, given.csv, given.out)):
        print(f"wrote {printable(str(name))}")


def _answers(found: "Listing", predictor: "Predictor", given: argparse.Namespace) -> "Iterator[Answer]":
    """What became of each source, in their order, then of what could not be looked into."""
    from fer_dist.serve.predictor import BATCH, Answer

    paths = (source.path for source in found.sources)
    yield from predictor.files(paths, batch=given.batch or BATCH, workers=given.workers, keep=given.out is not None)
    yield from (Answer(path=path, problem=problem) for path, problem in found.problems)


def _about(given: argparse.Namespace, predictor: "Predictor") -> dict[str, Any]:
    """What the JSON file begins with."""
    runner, detector = predictor.runner, predictor.detector
    return {
        "model": str(runner.path),
        "arch": runner.spec.arch,
        "precision": runner.precision,
        "checkpoint_sha256": runner.checkpoint_sha256,
        "labels": list(predictor.labels),
        "detector": detector.name if detector else None,
        "margin": predictor.margin if detector else None,
    }


def _lines(answer: "Answer", labels: Sequence[str]) -> list[str]:
    """A picture and its faces, for people."""
    path, count = printable(str(answer.path)), len(answer.faces)
    if not count:
        return [f"{path}: no face found"]
    if answer.faces[0].box is None:
        return [f"{path}: {_said(answer.faces[0], labels)}"]
    lines = [f"{path}: {count} face{'s' * (count > 1)}"]
    for face in answer.faces:
        assert face.box is not None
        left, top, wide, high = map(round, face.box)
        lines.append(f"  {_said(face, labels)}  at {left},{top}, {wide}x{high}")
    return lines


def _said(face: "Prediction", labels: Sequence[str]) -> str:
    """The label, then the other classes, the most probable first."""
    ranked = sorted(zip(face.probabilities_K, labels, strict=True), key=lambda pair: -pair[0])
    others = " ".join(f"{printable(name)} {100 * p:.0f}" for p, name in ranked if name != face.label)
    return f"{printable(face.label)} {100 * max(face.probabilities_K):.0f}%  ({others})"


def _draw(answer: "Answer", labels: Sequence[str], target: Path) -> None:
    """Write the annotated copy, whole or not at all."""
    from fer_dist.engine.checkpoint import write_atomically
    from fer_dist.serve.overlay import annotate

    assert answer.rgb_HW3 is not None
    picture = annotate(answer.rgb_HW3, answer.faces, labels, answer.width)
    form = "JPEG" if target.suffix == ".jpg" else "PNG"
    _make_folder(target.parent)
    write_atomically(target, lambda file: picture.save(file, format=form, quality=92))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made: {error.strerror or error}", "--out DIR with a folder that can be written"
        ) from None


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal below what is printed, else a line on stderr now and then; call it after each picture."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=not sys.stdout.isatty())
    if console.is_terminal and total > 1:
        columns = (TextColumn("pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task("pictures", total=total)
            yield lambda: bars.advance(task)
        return
    began = last = time.monotonic()
    count = 0

    def advance() -> None:
        nonlocal count, last
        count += 1
        if (now := time.monotonic()) - last > SECONDS_BETWEEN_LINES:
            last = now
            print(f"{count:,} of {total:,} pictures after {now - began:.0f} s", file=sys.stderr, flush=True)

    yield advance


if __name__ == "__main__":
    main()
