"""The report for people: one HTML page that needs nothing beside it, whatever names strangers gave their files."""

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from fer_dist.data.faces import SPLITS
from fer_dist.engine.metrics import wilson
from fer_dist.engine.plots import curves_figure, png, reliability_figure
from fer_dist.errors import printable
from fer_dist.serve.evaluation import Judged, Shown, compare
from fer_dist.serve.exam import Exam, Task

MOST_IN_MATRIX = 40
"""Classes for which the confusion matrix is shown."""
MOST_HISTORY = 2**24
"""Longest metrics.jsonl that is read [bytes]."""
ENLARGED = 4
"""Pixels for each of a picture in a heat map."""
_VIEWS = {"none": "", "flip": ", averaged with mirror images", "ten_crop": ", averaged over ten crops"}


def html(task: Task, exam: Exam, judged: Sequence[Judged]) -> bytes:
    """The page, UTF-8. Texts are escaped by Jinja, and made printable: no text of a stranger turns around or away.

    A content security policy in the page forbids scripts, and everything from elsewhere.
    """
    names = [printable(str(one.path)) for one in judged]
    comparisons = [
        {
            "first": names[c.first],
            "second": names[c.second],
            "only_first": c.test.only_first,
            "only_second": c.test.only_second,
            "p": p_value(c.test.p),
            "p_holm": p_value(c.p_holm),
            "method": c.test.method,
        }
        for c in compare(judged)
    ]
    page: str = _template().render(
        title=f"Evaluation: {', '.join(short_names(judged))}",
        subtitle=f"{len(exam.rows_M):,} pictures, {SPLITS[exam.split]} part of {printable(exam.source)}"
        + _VIEWS[task.views],
        notes=exam.notes,
        clean_told=_clean_told(judged[0], exam),
        comparisons=comparisons,
        judged=[_section(one) for one in judged],
    )
    return page.encode("utf-8", "replace")


def short_names(judged: Sequence[Judged]) -> list[str]:
    """The names of the files, with their folders where two are called alike."""
    names = [one.path.name for one in judged]
    alike = {name for name in names if names.count(name) > 1}
    return [printable(str(one.path) if one.path.name in alike else one.path.name) for one in judged]


def percent(share: float) -> str:
    """`67.26%`."""
    return f"{100 * share:.2f}%"


def interval(share: float, count: int) -> str:
    """The 95% interval of a share of some pictures."""
    low, high = wilson(share, count)
    return f"{100 * low:.1f} to {100 * high:.1f}%"


def p_value(p: float) -> str:
    """Two digits are enough."""
    return f"{p:.2g}" if p >= 1e-4 else "< 0.0001"


def history(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The epochs of the run that a checkpoint lies in, and a sentence about them; neither where there is no run.

    The file may be a stranger's: what is no record of ours is not shown, and the sentence says so.
    """
    beside = path.with_name("metrics.jsonl")
    if path.suffix not in (".pth", ".safetensors") or not beside.is_file():
        return [], ""
    try:
        with beside.open("rb") as file:
            raw = file.read(MOST_HISTORY + 1)
        if len(raw) > MOST_HISTORY:
            raise ValueError(f"it is longer than {MOST_HISTORY:,} bytes")
        records = [_record(json.loads(line)) for line in raw.splitlines() if line.strip()]
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        return [], printable(f"{beside} is no history of a run ({type(error).__name__}: {str(error)[:200]})")
    return records, printable(f"The run in {path.parent}, by its own evaluation") if records else ""


def _record(plain: dict[str, Any]) -> dict[str, Any]:
    """Of one epoch, the numbers that curves show."""
    val = {name: _number(plain["val"][name]) for name in ("loss", "accuracy", "macro_f1")}
    if type(plain["epoch"]) is not int or not 0 < plain["epoch"] < 10**6:
        raise ValueError("an epoch is no count")
    return {"epoch": plain["epoch"], "val": val, **{name: _number(plain[name]) for name in ("train_loss", "lr")}}


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e9:
        raise ValueError("a score is no number")
    return float(value)


def _template() -> Any:
    loader = PackageLoader("fer_dist.serve", ".")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template("report.html")


def _clean_told(one: Judged, exam: Exam) -> str:
    if one.clean is None:
        return "Without copies: not known, since no part that trained or chose the model is at hand."
    copies = one.whole.count - one.clean.count
    return (
        f"Without copies: {copies:,} of {one.whole.count:,} pictures have an exact copy in a part that trained "
        "or chose, and are left out. Intervals are Wilson's."
    )


def _section(one: Judged) -> dict[str, Any]:
    whole, clean = one.whole, one.clean
    names = [printable(name) for name in one.spec.labels.names]
    records, told = history(one.path)
    known = clean is not None and clean.count > 0
    scores = zip(whole.precision, whole.recall, whole.f1, strict=True)
    return {
        "name": printable(str(one.path)),
        "about": printable(
            f"{one.about['arch']}, {one.about['kind']}, {one.about['precision']}, on {one.about['runs_on']}; "
            f"checkpoint {one.about['checkpoint_sha256'][:12]}"
        ),
        "accuracy": percent(whole.accuracy),
        "interval": interval(whole.accuracy, whole.count),
        "clean": percent(clean.accuracy) if clean is not None and known else "?",
        "clean_interval": interval(clean.accuracy, clean.count) if clean is not None and known else "",
        "macro_f1": percent(whole.macro_f1),
        "ece": percent(one.calibration.ece),
        "names": names,
        "matrix": _matrix(whole.confusion_KK, names),
        "classes": [
            {"name": name, "scores": [f"{100 * score:.1f}%" for score in three], "support": f"{support:,}"}
            for name, three, support in zip(names, scores, whole.confusion_KK.sum(1).tolist(), strict=True)
        ],
        "reliability": _uri(png(reliability_figure(one.calibration))),
        "curves": _uri(png(curves_figure(records))) if records else "",
        "curves_told": told,
        "parts": _parts(one),
    }


def _matrix(confusion_KK: NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of cells; none where there are too many."""
    if len(names) > MOST_IN_MATRIX:
        return []
    share_KK = confusion_KK / np.maximum(1, confusion_KK.sum(1, keepdims=True))
    return [
        {
            "name": name,
            "cells": [
                {
                    "share": f"{100 * share:.0f}%",
                    "count": int(count),
                    "shade": f"{share:.3f}",
                    "ink": "white" if share > 0.9 else "inherit",  # dark letters have more contrast up to there
                }
                for share, count in zip(shares, counts, strict=True)
            ],
        }
        for name, shares, counts in zip(names, share_KK, confusion_KK, strict=True)
    ]


def _parts(one: Judged) -> list[dict[str, Any]]:
    """The galleries: what it got wrong, and what it was right about."""
    looked = f" Beside each: where it looked ({one.method})." if one.method else ""
    parts = [
        ("The most confident mistakes", "Answer and its probability, then the label." + looked, one.mistakes),
        ("The surest right answers", "One of each class." + looked, one.sure),
    ]
    return [
        {"title": title, "told": told, "faces": [_face(shown) for shown in some]} for title, told, some in parts if some
    ]


def _face(shown: Shown) -> dict[str, str]:
    return {
        "name": Path(shown.name).name,
        "true": printable(shown.true),
        "predicted": printable(shown.predicted),
        "confidence": f"{100 * shown.confidence:.1f}%",
        "image": _uri(_encoded(Image.fromarray(np.asarray(shown.image_SS)))),
        "heat": "" if shown.heat_SS is None else _uri(_encoded(overlay(shown.image_SS, shown.heat_SS))),
    }


def overlay(image_SS: NDArray[np.uint8], heat_SS: NDArray[np.float32]) -> Image.Image:
    """The picture, enlarged, under a heat map: warm where the map is 1, grey where it is 0."""
    side = ENLARGED * len(image_SS)
    grey = np.asarray(Image.fromarray(np.asarray(image_SS)).resize((side, side), Image.Resampling.BICUBIC))
    heat = np.asarray(Image.fromarray(heat_SS.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))
    heat = heat.clip(0, 1)[..., None]
    colour = mpl.colormaps["inferno"](0.25 + 0.7 * heat[..., 0])[..., :3] * 255
    mixed = grey[..., None] * (1 - 0.65 * heat) + colour * 0.65 * heat
    return Image.fromarray(mixed.round().astype(np.uint8))


def _encoded(image: Image.Image) -> bytes:
    memory = io.BytesIO()
    image.save(memory, format="PNG", optimize=True)
    return memory.getvalue()


def _uri(raw: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(raw).decode()}"
