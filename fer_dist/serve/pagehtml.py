"""What the app shows, as HTML. Pictures are inside of it, so that nothing that people show is written to a disk."""

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from fer_dist.errors import printable
from fer_dist.serve.measured import Measured
from fer_dist.serve.overlay import COLOURS
from fer_dist.serve.predictor import Prediction
from fer_dist.serve.runner import Runner
from fer_dist.serve.viewer import View

MUST_NOT = (
    "Expression is not emotion: the model names what a face looks like, not what anybody feels, and it is often wrong. "
    "Do not use it to judge people. In the EU, inferring emotions at work and in education is forbidden "
    "(AI Act, Regulation (EU) 2024/1689, Article 5(1)(f))."
)
STYLE = """
.fer img {max-width: 100%; max-height: 60vh; display: block; border-radius: 6px}
.fer .row {display: flex; gap: 1rem; flex-wrap: wrap; align-items: flex-start; margin-top: .8rem}
.fer .bars {flex: 1 1 15rem}
.fer .bar {display: grid; grid-template-columns: 5.5rem minmax(3rem, 1fr) 3rem; gap: .5rem}
.fer .bar {align-items: center; line-height: 1.7}
.fer .bar span:last-child {text-align: right; font-variant-numeric: tabular-nums}
.fer .track {height: .8rem; border-radius: 4px; background: rgb(128 128 128 / .2); overflow: hidden}
.fer .track div {height: 100%}
.fer .best {font-weight: 600}
.fer figure {margin: 0; width: 11rem} .fer figure img {width: 100%; image-rendering: auto}
.fer figcaption, .fer .small {font-size: .85rem; opacity: .8}
.fer .state {padding: .7rem 1rem; border-radius: 6px; background: rgb(128 128 128 / .15)}
footer .divider {display: none !important}
.gradio-container:has(#seen .wrong) #picture img {visibility: hidden; min-height: 12rem}
.fer .wrong {border-left: 4px solid #d73027} .fer .must {border-left: 4px solid #f2b701}
"""
NOTHING_YET = '<div class="fer"><p class="state">No picture yet.</p></div>'
NO_CAMERA_YET = (
    '<div class="fer"><p class="state">No picture yet: turn on the camera, then press Record. '
    "Frames are looked at one after another on this machine, and none is kept.</p></div>"
)


def result(view: View, labels: Sequence[str], *, rate: float | None = None) -> str:
    """The picture with its boxes, seven bars of the largest face, the heat map; or that there is no face.

    Args:
        labels: of the model, in its order.
        rate: frames per second of a camera.
    """
    parts = [f'<img class="seen" alt="the picture with what was found" src="{_uri(view.picture)}">']
    if rate is not None:
        parts.append(f'<p class="small rate">{rate:.1f} frames per second</p>')
    count = len(view.faces)
    if not count:
        parts.append('<p class="state none">No face found, so nothing is classified.</p>')
        return _box(parts)
    parts.append(
        f'<p class="small count">{count} face{"s" * (count > 1)}{"; the bars are of the largest" * (count > 1)}</p>'
    )
    parts.append(
        f'<div class="row"><div class="bars">{_bars(view.faces[view.largest], labels)}</div>{_heat(view)}</div>'
    )
    return _box(parts)


def problem(text: str) -> str:
    """Why a picture was not read."""
    return _box([f'<p class="state wrong">Not read: {_safe(text)}</p>'])


def about(runner: Runner, known: Measured | None) -> str:
    """The model by name, how good it is known to be, and what it must not be used for."""
    said = _safe(str(known)) if known else "its accuracy is not known: its files do not say"
    drawn = known is not None and known.drawn
    warning = " Trained on drawn faces, it says little about photos." * drawn
    name = f"{_safe(runner.path.name)} ({_safe(runner.spec.arch)}, {runner.precision}, {_safe(runner.runs_on)})"
    return _box(
        [f'<p class="model"><b>{name}</b>: {said}.{warning}</p>', f'<p class="state must">{escape(MUST_NOT)}</p>']
    )


def _bars(face: Prediction, labels: Sequence[str]) -> str:
    lines = []
    for index, (name, p) in enumerate(zip(labels, face.probabilities_K, strict=True)):
        best = " best" * (name == face.label)
        lines.append(
            f'<div class="bar{best}"><span>{_safe(name)}</span><div class="track"><div style="width:{100 * p:.1f}%;'
            f'background:{COLOURS[index % len(COLOURS)]}"></div></div><span>{100 * p:.0f}%</span></div>'
        )
    return "".join(lines)


def _heat(view: View) -> str:
    if view.heat is None:
        return ""
    return (
        f'<figure><img class="heat" alt="where the model looked" src="{_uri(view.heat)}">'
        f"<figcaption>Where the model looked: {escape(view.method)}</figcaption></figure>"
    )


def _box(parts: Sequence[str]) -> str:
    return f'<div class="fer">{"".join(parts)}</div>'


def _safe(text: str) -> str:
    return escape(printable(text))


def _uri(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
