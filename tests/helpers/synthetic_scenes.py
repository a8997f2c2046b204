"""Scenes with drawn faces in them: what tests and benchmarks look for faces in. Nothing in them is a photo."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fer_dist.data import synthetic
from fer_dist.data.drawing import draw_heads
from fer_dist.serve.faces import Box
from fer_dist.spec import EXPRESSIONS

SHARE = 0.62
"""Of a tile, what a training picture would show: around it are hair, neck, shoulders and ground."""


class Scene(NamedTuple):
    """A picture, uint8 `[H, W, 3]`, the place of each face as FER2013 would frame it, and its class."""

    rgb_HW3: NDArray[np.uint8]
    boxes: list[Box]
    labels: list[int]


def tiles(count: int, seed: int, size: int = 256) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Drawn heads with their surroundings: uint8 `[count, size, size]`, and their classes, int64 `[count]`."""
    chance = np.random.default_rng(seed)
    labels_N = np.arange(count) % len(EXPRESSIONS)
    uniform_NT = chance.random((count, len(synthetic.TRAITS)), np.float32)
    numbers = synthetic._numbers(labels_N, uniform_NT, chance)
    numbers["scale"] = numbers["scale"] * np.float32(SHARE)
    for name in ("shift_x", "shift_y", "cover", "blur", "noise"):  # framed as a detector would, in good light
        numbers[name] = np.zeros_like(numbers[name])
    noise_NHW = np.zeros((count, size, size), np.float32)
    return synthetic._photograph(draw_heads(numbers, size * 7 // 4), numbers, noise_NHW), labels_N


def scene(sides: list[int], seed: int, *, width: int = 640, height: int = 480) -> Scene:
    """A textured ground with one drawn head a side [pixels, as FER2013 would frame it], in cells of equal size.

    Fails when a head is larger than its cell.
    """
    chance = np.random.default_rng(seed)
    coarse = Image.fromarray(chance.integers(40, 216, (6, 8, 3), dtype=np.uint8))
    ground = coarse.resize((width, height), Image.Resampling.BICUBIC)
    columns = int(np.ceil(np.sqrt(len(sides))))
    rows = -(-len(sides) // columns) if sides else 1
    heads, labels = tiles(len(sides), seed) if sides else (np.empty((0, 1, 1), np.uint8), np.empty(0, np.int64))
    boxes = []
    for i, side in enumerate(sides):
        tile = round(side / SHARE)
        cell = width // columns, height // rows
        left = i % columns * cell[0] + int(chance.integers(0, cell[0] - tile + 1))
        top = i // columns * cell[1] + int(chance.integers(0, cell[1] - tile + 1))
        head = Image.fromarray(heads[i]).resize((tile, tile), Image.Resampling.BICUBIC)
        ground.paste(head.convert("RGB"), (left, top))
        boxes.append(Box(left + (tile - side) / 2, top + (tile - side) / 2, side, side))
    return Scene(np.asarray(ground), boxes, labels.tolist())
