"""A face from numbers: soft shapes on a grid of pixels, moved by facial action units.

`draw_heads` turns one row of numbers per face into one grey picture. Everything is a soft mask
(the distance to an edge over about a pixel of FER2013, clipped to 0..1), so edges are smooth.
Curves are functions of one axis and stay `[B, 1, W]` or `[B, H, 1]` as long as possible; only
masks are full pictures, and features are drawn in windows around them.

What moves is named after the Facial Action Coding System (Ekman & Friesen, "Facial Action Coding
System", Consulting Psychologists Press, 1978): au1 inner brow up, au2 outer brow up, au4 brows down
and together, au5 upper lid up, au6 cheek up, au7 lids tight, au9 nose wrinkled, au10 upper lip up,
au12 lip corners up, au15 lip corners down, au17 chin up, au19 tongue shown, au20 lips stretched,
au24 lips pressed, au25 lips parted, au26 jaw dropped, au31 jaw clenched, au43 upper lids droop.
Their amounts run from 0 (none) to 1 (full).

Units: x to the right and y down, the head is about 1.5 wide and 2 high around (0, 0).
Shapes: B faces, H and W pixels. All arrays are float32, tones run from 0 (black) to 1 (white).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[Any]
"""float32; numpy's own annotations forget that on the way through most functions."""
Numbers = Mapping[str, Plane]
"""The numbers of B faces by name, each `[B, 1, 1]`."""

REACH = 1.2
"""The canvas runs from -REACH to REACH on both axes."""


def draw_heads(numbers: Numbers, side: int) -> Plane:
    """Draws upright heads, before pose, light and camera.

    Args:
        numbers: the traits and action units of B faces, each float32 `[B, 1, 1]`.
        side: pixels per side of the canvas.

    Returns:
        float32 `[B, side, side]`, tones of 0..1 or a little beyond.
    """
    canvas_BHW = np.empty((len(numbers["skin"]), side, side), np.float32)
    _background(canvas_BHW, numbers)
    _head(canvas_BHW, numbers)
    _nose(canvas_BHW, numbers)
    _folds(canvas_BHW, numbers)
    _beard(canvas_BHW, numbers)
    _mouth(canvas_BHW, numbers)
    for hand in (-1.0, 1.0):
        _eye(canvas_BHW, numbers, hand)
        _brow(canvas_BHW, numbers, hand)
        _glasses(canvas_BHW, numbers, hand)
    _front_hair(canvas_BHW, numbers)
    return canvas_BHW


def _window(canvas_BHW: Plane, left: float, right: float, top: float, bottom: float) -> tuple[Plane, Plane, Plane]:
    """A view of part of the canvas, with the x `[1, 1, W]` and y `[1, H, 1]` of its pixels."""
    side = canvas_BHW.shape[-1]
    first, last, high, low = (
        min(max(round((v + REACH) / (2 * REACH) * side), 0), side) for v in (left, right, top, bottom)
    )
    at = ((np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1) * np.float32(REACH)
    return canvas_BHW[:, high:low, first:last], at[None, None, first:last], at[None, high:low, None]


def _edge(depth: Plane, blur: float = 0.045) -> Plane:
    """1 where `depth` (distance inside an edge) is positive, 0 outside, a ramp of width `blur` between."""
    ramp: Plane = depth * np.float32(1 / blur)
    ramp += np.float32(0.5)
    return np.clip(ramp, 0, 1, out=ramp)


def _oval(x: Plane, y: Plane, wide: Plane | float, high: Plane | float) -> Plane:
    """Distance inside an ellipse around (0, 0), good near its edge; its half axes are `wide` and `high`."""
    half = 0.5 * np.minimum(wide, high)
    return half - half * (x / wide) ** 2 - half * (y / high) ** 2


def _paint(view_BHW: Plane, tone: Plane | float, mask_BHW: Plane) -> None:
    """Covers the view with a tone where the mask is 1."""
    change = tone - view_BHW
    change *= mask_BHW
    view_BHW += change


def _shade(view_BHW: Plane, strength: Plane | float, mask_BHW: Plane) -> None:
    """Darkens the view by a share where the mask is 1."""
    view_BHW *= 1 - strength * mask_BHW


def _turn(x: Plane | float, numbers: Numbers) -> tuple[Plane, Plane]:
    """Where a point of the frontal face lies after the head's yaw, and how much narrower it looks there."""
    radius = numbers["head_width"] * 1.15
    angle = np.arcsin(np.clip(np.asarray(x, np.float32) / radius, -0.9, 0.9))
    turned = angle + numbers["yaw"]
    middle = -0.55 * radius * np.sin(numbers["yaw"])
    return radius * np.sin(turned) + middle, np.clip(np.cos(turned) / np.cos(angle), 0.5, 1.3)


def _background(canvas_BHW: Plane, n: Numbers) -> None:
    view, x, y = _window(canvas_BHW, -REACH, REACH, -REACH, REACH)
    across = 0.2 * n["back_texture"] ** 2 * np.sin(x * n["back_x"] * 11 + n["back_phase"] * 6.3)
    np.multiply(across, np.cos(y * n["back_y"] * 11), out=view)
    view += (n["back"] + 0.25 * n["back_x"] * x) + 0.2 * n["back_y"] * y


def _head(canvas_BHW: Plane, n: Numbers) -> None:
    """From back to front: long hair, shoulders, neck, ears, head."""
    view, x, y = _window(canvas_BHW, -REACH, REACH, -REACH, REACH)
    middle = -0.5 * n["head_width"] * np.sin(n["yaw"])
    x = x - middle
    hair = _oval(x, np.minimum(y + 0.08, 0), n["head_width"] + 0.17, n["head_height"] + 0.14)
    _paint(view, n["hair"], _edge(hair, 0.06) * n["long_hair"])
    below, _, low = _window(canvas_BHW, -REACH, REACH, 0.6, REACH)
    _paint(below, n["cloth"], _edge(low - 1.0 - 0.3 * x * x))
    _paint(below, n["skin"] * 0.72, _edge(0.42 - np.abs(x)) * _edge(1.15 - low - 0.5 * x * x))
    beside, _, level = _window(canvas_BHW, -REACH, REACH, -0.35, 0.35)
    ears = _edge(_oval(np.abs(x) - n["head_width"] - 0.01, level - n["pitch"], 0.11, 0.2))
    _paint(beside, n["skin"] * 0.86, ears * (n["ears"] > 0.25))
    # The tone falls off towards the outline, as on a ball.
    round_BHW = _round(x, y, n)
    flat = n["skin"] * 1.04 + n["skin"] * n["light_x"] * 0.22 * x
    ball = flat + n["skin"] * n["light_y"] * 0.12 * y - (0.24 * n["skin"]) * round_BHW
    _paint(view, ball, _edge(0.4 - 0.4 * round_BHW))


def _round(x: Plane, y: Plane, n: Numbers) -> Plane:
    """0 in the middle of the head, 1 on its outline, which narrows to the jaw; `[B, H, W]`."""
    width = n["head_width"] * (1 - n["jaw"] * np.maximum(y, 0) ** 2)
    height = np.where(y > 0, n["head_height"] + 0.12 * n["au26"], n["head_height"])
    inside: Plane = x * x * (1 / width**2)
    inside += (y / height) ** 2
    return inside


def _front_hair(canvas_BHW: Plane, n: Numbers) -> None:
    view, x, y = _window(canvas_BHW, -REACH, REACH, -REACH, 0.25)
    x = x + 0.5 * n["head_width"] * np.sin(n["yaw"])
    cap = _edge(_oval(x, y, n["head_width"] + 0.06, n["head_height"] + 0.08))
    part = x - n["part"]
    line = n["hairline"] + n["pitch"] * 0.6 + n["fringe"] * part * part + 0.03 * np.sin(17 * part) * n["curls"]
    gloss = 1 + 0.08 * np.sin(x * 31 + n["back_phase"] * 6) * n["curls"]
    _paint(view, n["hair"] * gloss, cap * _edge(line - y, 0.07) * n["has_hair"])


def _eye(canvas_BHW: Plane, n: Numbers, hand: float) -> None:
    view, x, y = _window(canvas_BHW, *((-0.95, 0.2) if hand < 0 else (-0.2, 0.95)), -0.6, 0.3)
    middle, narrow = _turn(hand * n["eye_gap"], n)
    width = n["eye_width"] * narrow
    level = n["eye_y"] + n["pitch"]
    t = hand * (x - middle) / width  # -1 at the inner corner, 1 at the outer one
    bow = np.maximum(1 - t * t, 0)
    slant = np.clip(0.45 * n["au4"] * (1 - n["au1"]) - 0.45 * n["au43"] - 0.25 * n["au1"] * (1 - n["au5"]), -0.6, 0.6)
    opened = 1 + 0.75 * n["au5"] - 0.45 * n["au7"] - 0.33 * n["au6"] - 0.4 * n["au43"]
    upper = level - n["eye_open"] * opened * bow * (1 + slant * t) - n["eye_tilt"] * t
    raised = 1.2 * n["au6"] + 0.45 * n["au7"] - 0.25 * n["au5"]
    lower = level + 0.62 * n["eye_open"] * bow * (1 - raised) - n["eye_tilt"] * t
    ends = _edge((1 - np.abs(t)) * width)
    inside = _edge(y - upper) * _edge(lower - y) * ends
    _shade(view, 0.25 * n["socket"], _edge(0.13 - np.abs(y - upper + 0.08), 0.2) * np.clip(1.3 - t * t, 0, 1))
    _paint(view, n["white"], inside)
    across = (x - middle - n["gaze"] * 0.06) / np.maximum(narrow, 0.7)
    away = np.sqrt(across * across + (y - level + 0.02 + 0.02 * n["gaze_y"]) ** 2)
    _paint(view, n["iris"], inside * _edge(n["iris_size"] - away))
    _paint(view, 0.03, inside * _edge(n["iris_size"] * 0.5 - away))
    _paint(view, n["lash"] * n["skin"], _edge(0.026 - np.abs(y - upper)) * ends)
    _shade(view, 0.35 + 0.2 * n["au6"], _edge(0.008 - np.abs(y - lower)) * ends)
    # The fold above the lid, and the bulge that a raised cheek pushes under the eye (au6).
    _shade(view, 0.28, _edge(0.006 - np.abs(y - upper + 0.075)) * ends)
    bag = _edge(0.008 - np.abs(y - lower - 0.05 - 0.05 * bow)) * ends
    _shade(view, 0.1 + 0.35 * np.maximum(n["au6"], n["au7"] * 0.6), bag)


def _brow(canvas_BHW: Plane, n: Numbers, hand: float) -> None:
    view, x, y = _window(canvas_BHW, *((-0.95, 0.25) if hand < 0 else (-0.25, 0.95)), -0.85, 0.1)
    middle, narrow = _turn(hand * (n["eye_gap"] + 0.01 - 0.045 * n["au4"]), n)
    t = hand * (x - middle) / ((n["eye_width"] * 1.25) * narrow)
    level = n["eye_y"] + n["pitch"] - n["brow_gap"]
    inner = level - 0.15 * n["au1"] - 0.07 * n["au2"] + 0.13 * n["au4"] + 0.03 * n["au9"]
    centre = level - 0.05 - 0.05 * n["au1"] - 0.14 * n["au2"] + 0.065 * n["au4"] + 0.03 * n["au9"]
    outer = level + 0.02 + 0.05 * n["au1"] - 0.12 * n["au2"] - 0.03 * n["au4"]
    line = centre + 0.5 * (outer - inner) * t + (0.5 * (outer + inner) - centre) * t * t
    hairs = _edge(n["brow_thick"] * (1.05 - 0.35 * t) - np.abs(y - line)) * _edge((1 - np.abs(t)) * 0.2)
    _paint(view, n["brow"], hairs * n["brow_dense"])


def _nose(canvas_BHW: Plane, n: Numbers) -> None:
    view, x, y = _window(canvas_BHW, -0.6, 0.6, -0.4, 0.5)
    middle, _ = _turn(0.0, n)
    tip_x = middle + 0.14 * np.sin(n["yaw"])
    tip_y = n["eye_y"] + n["nose_length"] + n["pitch"] * 1.5 - 0.04 * n["au9"]
    wing = n["nose_width"] * (1 + 0.2 * n["au9"])
    along = np.clip((y - n["eye_y"]) / (tip_y - n["eye_y"]), 0, 1)
    from_tip, bridge = x - tip_x, x - middle - (tip_x - middle) * along
    # The bridge: light on one side, shadow on the other; its side follows the light.
    flank = 0.05 + 0.05 * along
    fade = _edge(tip_y - y, 0.1) * np.clip(along * 3, 0, 1)
    _shade(view, 0.16, _edge(0.03 - np.abs(bridge * np.sign(n["light_x"]) + flank), 0.06) * fade)
    _shade(view, -0.12, _edge(0.03 - np.abs(bridge), 0.08) * fade)
    _shade(view, 0.3, _edge(_oval(from_tip, y - tip_y - 0.03, wing, 0.05), 0.08))
    _shade(view, 0.6, _edge(_oval(np.abs(from_tip) - wing * 0.5, y - tip_y - 0.02, 0.045, 0.028)))
    rim = _edge(0.012 - np.abs(_oval(from_tip, y - tip_y + 0.02, wing, 0.09))) * (np.abs(from_tip) > wing * 0.6)
    _shade(view, 0.3 + 0.2 * n["au9"], rim)
    # Wrinkles across the bridge (au9), which also draw the sides of the nose up.
    for row in (0.03, 0.12, 0.21):
        away = np.abs(y - n["eye_y"] - n["pitch"] - row - 1.6 * bridge * bridge)
        _shade(view, 0.6 * n["au9"], _edge(0.014 - away) * _edge(0.15 - np.abs(bridge)))


def _folds(canvas_BHW: Plane, n: Numbers) -> None:
    """Lines of the forehead (au1, au2), between the brows (au4) and from nose to mouth (au9, au10, au12)."""
    view, x, y = _window(canvas_BHW, -0.75, 0.75, -0.8, 0.1)
    middle, _ = _turn(0.0, n)
    top = n["eye_y"] + n["pitch"]
    for row in (0.50, 0.60):
        crease = top - row - 0.06 * n["au2"] + 0.15 * (x - middle) ** 2
        lines = _edge(0.010 - np.abs(y - crease)) * _edge(0.36 - np.abs(x - middle), 0.2)
        _shade(view, 0.3 * np.maximum(n["au1"] * 0.7, n["au2"]), lines)
    frown = np.abs(np.abs(x - middle) - 0.045 - 0.1 * (top - 0.1 - y))
    frown = _edge(0.010 - frown) * _edge(0.11 - np.abs(y - top + 0.2))
    _shade(view, 0.45 * np.clip(n["au4"] * 1.2 - n["au1"] * 0.5, 0, 1), frown)
    view, x, y = _window(canvas_BHW, -0.9, 0.9, 0.0, 0.9)
    start = n["eye_y"] + n["pitch"] + n["nose_length"] - 0.06 - 0.05 * n["au9"]
    down = (y - start) / (n["mouth_y"] + n["pitch"] - start + 0.05)
    depth = np.clip(0.5 * n["au9"] + 0.6 * n["au10"] + 0.45 * n["au12"] + n["age"] * 0.15, 0, 0.6)
    for hand in (-1.0, 1.0):
        near, narrow = _turn(hand * (n["nose_width"] + 0.04), n)
        spread = narrow * (0.12 + 0.1 * n["au12"] + 0.05 * n["au20"]) * np.clip(down, 0, 1.2)
        line = near + hand * (spread + 0.07 * np.sin(np.clip(down, 0, 1) * 3.14))
        _shade(view, depth, _edge(0.016 - np.abs(x - line)) * _edge((0.55 - np.abs(down - 0.5)) * 0.4, 0.1))


def _beard(canvas_BHW: Plane, n: Numbers) -> None:
    view, x, y = _window(canvas_BHW, -0.9, 0.9, 0.1, REACH)
    middle, _ = _turn(0.0, n)
    side = x + 0.5 * n["head_width"] * np.sin(n["yaw"])
    lip = n["mouth_y"] + n["pitch"]
    # Its upper border runs from the ears down the cheeks and under the mouth.
    border = lip + 0.12 - 1.1 * np.maximum(np.abs(side) - 0.2, 0)
    _paint(view, n["hair"], _edge(0.4 - 0.4 * _round(side, y, n)) * _edge(y - border, 0.16) * n["beard"])
    bar = np.abs(y - lip + 0.13 + 0.03 * n["au26"] + 0.05 * n["au10"] - 0.5 * (x - middle) ** 2)
    _paint(view, n["hair"], _edge(0.035 - bar) * _edge(0.24 - np.abs(x - middle), 0.1) * n["moustache"])


def _mouth(canvas_BHW: Plane, n: Numbers) -> None:
    view, x, y = _window(canvas_BHW, -0.8, 0.8, 0.1, 1.1)
    middle, narrow = _turn(0.0, n)
    widen = 1 + 0.34 * n["au12"] + 0.42 * n["au20"] - 0.32 * n["au26"] * (1 - n["au20"]) - 0.12 * n["au24"]
    width = n["mouth_width"] * narrow * (widen - 0.12 * n["au17"])
    t = (x - middle - 0.05 * np.sin(n["yaw"])) / width
    inside = np.maximum(1 - t * t, 0)
    # Square openings for stretched, bared or clenched mouths, round ones for a dropped jaw.
    bow = inside ** (0.8 - 0.5 * np.clip(np.maximum(n["au20"], n["au31"]), 0, 1))
    level = n["mouth_y"] + n["pitch"] + 0.06 * n["au26"] - 0.05 * n["au17"] - 0.03 * n["au9"]
    corners = -0.17 * n["au12"] + 0.15 * n["au15"] + 0.05 * n["au20"] + 0.05 * n["au10"] + n["mouth_bend"]
    line = level + corners * (t * t - 0.35) + n["smirk"] * t
    above = (0.03 * n["au25"] + 0.07 * n["au26"] + 0.10 * n["au10"] * n["au25"] + 0.05 * n["au31"]) * bow
    parted = n["au25"] * (0.08 + 0.09 * n["au20"] + 0.07 * n["au12"])
    below = (parted + 0.21 * n["au26"] + 0.06 * n["au31"]) * bow
    roof, floor = line - above - 0.05 * n["au10"] * inside, line + below - 0.05 * n["au10"] * inside
    thin = n["lip"] * (1 - 0.75 * n["au24"])
    cupid = thin * np.sqrt(inside) * (1 - 0.35 * np.exp(-((t / 0.2) ** 2)))
    ends = _edge((1 - np.abs(t)) * width)
    lips = _edge(y - roof + cupid) * _edge(floor + 1.25 * thin * np.sqrt(inside) - y) * ends
    _paint(view, n["skin"] * n["lip_tone"], lips)
    hollow = _edge(y - roof) * _edge(floor - y) * ends * np.clip((above + below) * 30, 0, 1)
    _paint(view, 0.05, hollow)
    _teeth(view, t, y, n, hollow, roof, floor)
    seam = _edge(0.016 + 0.012 * n["au24"] - np.abs(y - 0.5 * (roof + floor))) * ends
    _shade(view, 0.7 * np.clip(1 - (above + below) * 25, 0, 1), seam)
    # A raised chin (au17) bulges below a pushed-up lip; every lower lip throws a small shadow.
    dent = _edge(0.022 - np.abs(y - floor - 1.25 * thin - 0.07), 0.06) * _edge(0.6 - np.abs(t), 0.4)
    _shade(view, 0.16 + 0.35 * n["au17"], dent)


def _teeth(view: Plane, t: Plane, y: Plane, n: Numbers, hollow: Plane, roof: Plane, floor: Plane) -> None:
    """Upper teeth for smiles, raised and stretched lips, both rows and their gaps when clenched; the tongue."""
    shown = np.maximum(np.maximum(n["au12"], n["au10"]), np.maximum(n["au31"], n["au20"]))
    shown = np.clip(4 * shown - 1.2 - 4 * n["au19"], 0, 1)
    reach = np.maximum(0.085 - 0.045 * n["au20"], n["au31"] * 0.5)
    _paint(view, n["white"] * 1.03, hollow * _edge(roof + reach - y) * shown)
    _shade(view, 0.45 * n["au31"], hollow * _edge(np.cos(t * 16) - 0.93, 0.2))
    _shade(view, 0.6 * n["au31"], hollow * _edge(0.012 - np.abs(y - 0.5 * (roof + floor))))
    tongue = _edge(_oval(t * 0.25, y - floor - 0.03, 0.14, 0.14)) * (y > roof)
    _paint(view, n["skin"] * 0.78, tongue * n["au19"])


def _glasses(canvas_BHW: Plane, n: Numbers, hand: float) -> None:
    view, x, y = _window(canvas_BHW, *((-1.0, 0.2) if hand < 0 else (-0.2, 1.0)), -0.6, 0.35)
    middle, narrow = _turn(hand * n["eye_gap"], n)
    wide, high = (n["eye_width"] + 0.07) * narrow, n["eye_width"] * 0.95
    level = n["eye_y"] + n["pitch"] + 0.03
    # A rounded rectangle: the sum of fourth powers.
    power = np.square((x - middle) / wide) ** 2 + np.square((y - level) / high) ** 2
    _paint(view, n["frame"], _edge(0.018 - np.abs(power - 1) * 0.06) * n["glasses"])
    bridge = _edge(n["eye_gap"] - n["eye_width"] - 0.06 - np.abs(x - _turn(0.0, n)[0]))
    _paint(view, n["frame"], _edge(0.018 - np.abs(y - level + 0.05)) * bridge * n["glasses"])
