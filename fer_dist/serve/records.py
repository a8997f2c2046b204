"""What was predicted, as JSON and CSV: written as it comes, in place once all is there."""

import csv
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from fer_dist.errors import UserError
from fer_dist.serve.faces import Box
from fer_dist.serve.predictor import Answer, Prediction

COLUMNS = ("path", "face", "left", "top", "width", "height", "confidence", "label")
"""Of the CSV, before a probability for each class and `problem`; a picture without a face has one row, too."""


class Records:
    """Both files, while they grow; use it in a `with`, which puts them in place unless an error ends it.

    Args:
        about: what the JSON begins with: model, detector, settings.
        labels: of the model.

    Raises:
        UserError: a file cannot be written; seen before the first picture. The old file is intact.
    """

    def __init__(
        self, json_path: Path | None, csv_path: Path | None, *, about: dict[str, Any], labels: Sequence[str]
    ) -> None:
        self._labels = labels
        self._open: list[tuple[Path, Path, TextIO]] = []
        self._first = True
        try:
            self._json = self._create(json_path)
            self._csv = self._create(csv_path)
            self._rows = csv.writer(self._csv) if self._csv else None
            if self._json:
                head = json.dumps(about, indent=1)
                self._json.write(f'{head.removesuffix("}").rstrip()},\n "pictures": [')
            if self._rows:
                self._rows.writerow([*COLUMNS, *labels, "problem"])
        except BaseException:
            self._abandon()
            raise

    def add(self, answer: Answer) -> None:
        """One picture.

        Raises:
            UserError: the disk is full.
        """
        try:
            if self._json:
                self._json.write(f"{'' if self._first else ','}\n  {json.dumps(self._plain(answer))}")
            if self._rows:
                self._rows.writerows(self._table(answer))
        except OSError as error:
            raise _unwritable(self._open[0][0], error) from None
        self._first = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandon()
            return
        path = Path()
        try:
            if self._json:
                self._json.write("\n ]\n}\n")
            for path, beside, file in self._open:
                file.flush()
                os.fsync(file.fileno())
                file.close()
                beside.replace(path)
        except OSError as failure:
            self._abandon()
            raise _unwritable(path, failure) from None

    def _create(self, path: Path | None) -> TextIO | None:
        if path is None:
            return None
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            file = beside.open("w", encoding="utf-8", errors="backslashreplace", newline="")
        except (OSError, ValueError) as error:
            raise _unwritable(path, error) from None
        self._open.append((path, beside, file))
        return file

    def _abandon(self) -> None:
        for _, beside, file in self._open:
            with suppress(OSError):
                file.close()
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def _plain(self, answer: Answer) -> dict[str, Any]:
        if answer.problem:
            return {"path": str(answer.path), "problem": answer.problem}
        faces = [self._face(face) for face in answer.faces]
        return {"path": str(answer.path), "width": answer.width, "height": answer.height, "faces": faces}

    def _face(self, face: Prediction) -> dict[str, Any]:
        told: dict[str, Any] = {}
        if face.box:
            told = {"box": rounded(face.box), "confidence": face.confidence}
        probabilities = {name: round(p, 6) for name, p in zip(self._labels, face.probabilities_K, strict=True)}
        return {**told, "label": face.label, "probabilities": probabilities}

    def _table(self, answer: Answer) -> list[list[Any]]:
        blank = [""] * (len(COLUMNS) - 1 + len(self._labels))
        if not answer.faces:
            return [[str(answer.path), *blank, answer.problem or "no face"]]
        rows: list[list[Any]] = []
        for number, face in enumerate(answer.faces, 1):
            where: list[Any] = [*rounded(face.box), face.confidence] if face.box else [""] * 5
            probabilities = [f"{p:.6f}" for p in face.probabilities_K]
            rows.append([str(answer.path), number, *where, face.label, *probabilities, ""])
        return rows


def rounded(box: Box) -> list[int]:
    """Left, top, width and height in whole pixels."""
    return [round(value) for value in box]


def _unwritable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot write {path}: {getattr(error, 'strerror', None) or error}", "name a file in a folder that is there"
    )
