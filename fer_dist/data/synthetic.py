"""The embedded data set: faces drawn by the program, seven expressions.

Each face is a function of (seed, split, index) alone: how many faces are asked for, and of which
other split, changes nothing. An expression is a set of facial action units (FACS: Ekman & Friesen,
1978; the sets follow EMFACS, Friesen & Ekman, 1983), each with its own strength; identity, pose,
light and camera vary independently of it. `drawing.py` draws the upright head; here the numbers are
drawn, the head is posed, lit and photographed.

The bytes are the same in every process with the same numpy on the same kind of processor. Across
numpy versions or processors a last bit of float32 may differ, and with it a grey level here and there.
"""

import numpy as np
from numpy.typing import NDArray

from fer_dist.data.drawing import REACH, Plane, draw_heads
from fer_dist.data.faces import SPLITS, Faces
from fer_dist.spec import EXPRESSIONS

DRAWING_VERSION = 2
"""Raised with every change that changes a pixel: part of the cache key."""

BATCH = 64
"""Faces drawn at once. Always whole batches, so that a face meets the same vector code in any set."""

TRAITS: dict[str, tuple[float, float]] = {
    # identity
    "head_width": (0.66, 0.80),
    "head_height": (0.90, 1.04),
    "jaw": (0.08, 0.34),
    "skin": (0.42, 0.92),
    "hair": (0.03, 0.75),
    "long_hair": (-1.2, 1.0),
    "has_hair": (-0.15, 1.0),
    "hairline": (-0.78, -0.52),
    "fringe": (-0.3, 0.9),
    "part": (-0.4, 0.4),
    "curls": (0.0, 1.0),
    "ears": (0.0, 1.0),
    "cloth": (0.05, 0.95),
    "eye_gap": (0.29, 0.36),
    "eye_width": (0.165, 0.205),
    "eye_open": (0.085, 0.115),
    "eye_tilt": (-0.02, 0.025),
    "eye_y": (-0.20, -0.10),
    "iris": (0.05, 0.40),
    "iris_size": (0.080, 0.098),
    "white": (0.80, 0.97),
    "lash": (0.12, 0.45),
    "socket": (0.0, 1.0),
    "brow_gap": (0.21, 0.27),
    "brow_thick": (0.026, 0.055),
    "brow_dense": (0.75, 1.0),
    "nose_length": (0.36, 0.46),
    "nose_width": (0.11, 0.17),
    "mouth_y": (0.48, 0.58),
    "mouth_width": (0.25, 0.32),
    "mouth_bend": (-0.02, 0.02),
    "smirk": (-0.02, 0.02),
    "lip": (0.03, 0.07),
    "lip_tone": (0.55, 0.85),
    "age": (0.0, 1.0),
    "beard": (-4.0, 1.0),
    "moustache": (-5.0, 1.0),
    "glasses": (-6.0, 1.0),
    "frame": (0.02, 0.35),
    # pose and gaze
    "yaw": (-0.38, 0.38),
    "pitch": (-0.07, 0.07),
    "roll": (-0.30, 0.30),
    "gaze": (-1.0, 1.0),
    "gaze_y": (-1.0, 1.0),
    # background, light and camera
    "back": (0.08, 0.90),
    "back_x": (-1.0, 1.0),
    "back_y": (-1.0, 1.0),
    "back_phase": (0.0, 1.0),
    "back_texture": (0.0, 1.0),
    "light_x": (-1.0, 1.0),
    "light_y": (-1.0, 1.0),
    "light_tilt": (0.0, 0.32),
    "exposure": (0.75, 1.12),
    "contrast": (0.8, 1.2),
    "scale": (0.90, 1.22),
    "shift_x": (-0.16, 0.16),
    "shift_y": (-0.14, 0.14),
    "blur": (-0.25, 0.22),
    "noise": (-0.006, 0.026),
    "cover": (0.0, 1.0),
    "cover_angle": (-3.1416, 3.1416),
    "cover_tone": (0.05, 0.9),
    # expression
    "strength": (0.62, 1.05),
    "which": (0.0, 1.0),
}
"""Every number of a face that does not depend on its expression, and its range (uniform)."""

UNITS = [f"au{unit}" for unit in (1, 2, 4, 5, 6, 7, 9, 10, 12, 15, 17, 19, 20, 24, 25, 26, 31, 43)]

VARIANTS: dict[str, tuple[str, str, str]] = {
    "angry": ("4:1 5:.4 7:.4 24:1", "4:1 7:.7 24:.8 15:.35 17:.4", "4:1 5:.4 7:.3 31:1 25:.4 10:.4"),
    "disgust": ("4:.5 7:.8 9:1 10:1 15:.3", "4:.4 7:.8 9:1 10:.9 25:.6", "4:.4 7:.9 9:.9 10:.5 19:1 25:.5 26:.25"),
    "fear": (
        "1:1 2:.8 4:.6 5:1 20:1 25:1",
        "1:1 2:.7 4:.7 5:1 20:1 25:.6 26:.4",
        "1:1 2:.9 4:.6 5:1 20:.8 15:.3 25:.9",
    ),
    "happy": ("6:.9 12:1", "6:.9 12:1 25:1", "6:.8 12:1 25:1 26:.35"),
    "sad": ("1:1 4:.25 15:1 43:.6", "1:1 4:.3 15:.9 17:.8 43:.6", "1:1 4:.2 15:1 17:.4 43:.9"),
    "surprise": ("1:.8 2:1 5:1 26:1", "1:.8 2:1 5:.9 26:.75", "1:.9 2:1 5:1 26:1 25:.3"),
    "neutral": ("", "25:.2", "43:.15"),
}
"""Three ways of each expression: action units and their amounts at full strength."""


def draw_faces(train: int, val: int, test: int, seed: int, size: int = 48) -> Faces:
    """Draws the embedded data set.

    Args:
        train, val, test: faces per split; the classes of each are equally frequent, one of each among
            every seven faces.
        seed: another seed, other faces.
        size: pixels per side.

    Returns:
        Faces in the order train, val, test; `images_NHW` uint8 `[train + val + test, size, size]`.
    """
    counts = (train, val, test)
    parts = [_draw_split(count, seed, split, size) for split, count in enumerate(counts)]
    return Faces(
        images_NHW=np.concatenate([images_NHW for images_NHW, _ in parts]),
        labels_N=np.concatenate([labels_N for _, labels_N in parts]),
        usage_N=np.repeat(np.arange(len(counts), dtype=np.int64), counts),
        names=[f"drawn/{SPLITS[split]}/{i:05d}" for split, count in enumerate(counts) for i in range(count)],
        key=f"drawn-v{DRAWING_VERSION}-seed{seed}-{train}-{val}-{test}-{size}px",
    )


def _draw_split(count: int, seed: int, split: int, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first `count` faces of a split: uint8 `[count, size, size]` and int64 `[count]`."""
    canvas = size * 7 // 4  # about 1.6 pixels of the drawing for each of the photo
    images_NHW = np.empty((count, size, size), np.uint8)
    labels_N = np.empty(count, np.int64)
    streams = [np.random.Generator(np.random.Philox(s)) for s in np.random.SeedSequence((seed, split)).spawn(4)]
    shuffled = (row for _ in iter(int, 1) for row in streams[0].permutation(len(EXPRESSIONS)))
    for start in range(0, count, BATCH):
        labels_B = np.fromiter(shuffled, np.int64, BATCH)
        numbers = _numbers(labels_B, streams[1].random((BATCH, len(TRAITS)), np.float32), streams[2])
        noise_BHW = streams[3].standard_normal((BATCH, size, size), np.float32)
        part = slice(start, min(start + BATCH, count))
        images_NHW[part] = _photograph(draw_heads(numbers, canvas), numbers, noise_BHW)[: part.stop - start]
        labels_N[part] = labels_B[: part.stop - start]
    return images_NHW, labels_N


def _variants() -> Plane:
    """Amounts at full strength, float32 `[K, 3, units]`."""
    amounts_KVU = np.zeros((len(EXPRESSIONS), 3, len(UNITS)), np.float32)
    for k, name in enumerate(EXPRESSIONS):
        for v, text in enumerate(VARIANTS[name]):
            for word in text.split():
                unit, amount = word.split(":")
                amounts_KVU[k, v, UNITS.index(f"au{unit}")] = float(amount)
    return amounts_KVU


def _numbers(labels_B: NDArray[np.int64], uniform_BT: Plane, jitter: np.random.Generator) -> dict[str, Plane]:
    """What `draw_heads` and `_photograph` need, each float32 `[B, 1, 1]`."""
    low_T, high_T = np.array(list(TRAITS.values()), np.float32).T
    traits_BT = low_T + (high_T - low_T) * uniform_BT
    n = {name: traits_BT[:, i, None, None] for i, name in enumerate(TRAITS)}
    which_B = np.minimum(n["which"].ravel() * 3, 2).astype(np.int64)
    amounts_BU = _variants()[labels_B, which_B] * n["strength"][:, :, 0]
    # Each unit varies on its own.
    amounts_BU *= 0.8 + 0.35 * jitter.random(amounts_BU.shape, np.float32)
    n |= {name: amounts_BU[:, i, None, None] for i, name in enumerate(UNITS)}
    for name in ("has_hair", "long_hair"):
        n[name] = (n[name] > 0).astype(np.float32)
    n["beard"] = np.where(n["beard"] > 0, 0.3 + 0.5 * n["beard"], 0).astype(np.float32)
    n["moustache"] = (n["moustache"] > 0).astype(np.float32) * 0.8
    n["glasses"] = (n["glasses"] > 0).astype(np.float32) * 0.85
    for name in ("blur", "noise"):
        n[name] = np.maximum(n[name], 0)
    n["brow"] = np.minimum(n["hair"] * 0.6, n["skin"] * 0.5)
    return n


def _photograph(canvas_BHW: Plane, n: dict[str, Plane], noise_BHW: Plane) -> NDArray[np.uint8]:
    """Rolls, scales and shifts the heads into the frame, then light, blur, noise and grey levels."""
    size = noise_BHW.shape[-1]
    at = ((np.arange(size, dtype=np.float32) + 0.5) / size) * 2 - 1
    x, y = at[None, None, :], at[None, :, None]
    cos, sin = np.cos(n["roll"]) / n["scale"], np.sin(n["roll"]) / n["scale"]
    photo = _sample(canvas_BHW, cos * x + sin * y - n["shift_x"], cos * y - sin * x - n["shift_y"])
    photo *= n["exposure"] * (1 + n["light_tilt"] * (n["light_x"] * x + n["light_y"] * y))
    # One face in twelve is partly hidden by something that reaches in from the border.
    hidden = n["cover"] > 11 / 12
    depth = x * np.cos(n["cover_angle"]) + y * np.sin(n["cover_angle"]) - 0.75
    photo += (n["cover_tone"] - photo) * np.clip(depth * 20, 0, 1) * hidden
    for axis in (1, 2):
        around = np.roll(photo, 1, axis) + np.roll(photo, -1, axis)
        photo += n["blur"] * (around - 2 * photo)
    photo = 0.5 + (photo - 0.5) * n["contrast"] + n["noise"] * noise_BHW
    grey: NDArray[np.uint8] = np.clip(photo * 255 + 0.5, 0, 255).astype(np.uint8)
    return grey


def _sample(canvas_BHW: Plane, x_BHW: Plane, y_BHW: Plane) -> Plane:
    """Bilinear samples of the canvas at these coordinates; the border goes on for ever."""
    count, side, _ = canvas_BHW.shape
    column, row = (np.clip((v / REACH + 1) * (side / 2) - 0.5, 0, side - 1.001) for v in (x_BHW, y_BHW))
    left, top = column.astype(np.int32), row.astype(np.int32)
    column -= left
    row -= top
    flat = canvas_BHW.ravel()
    index = left + top * side + np.arange(count, dtype=np.int32)[:, None, None] * (side * side)
    upper = flat[index] * (1 - column) + flat[index + 1] * column
    lower = flat[index + side] * (1 - column) + flat[index + side + 1] * column
    photo: Plane = upper + (lower - upper) * row
    return photo
