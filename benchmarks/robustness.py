"""How much of its accuracy does a model keep on pictures that are worse than those it was trained on?

    python -m benchmarks.robustness best.pth best.int8.cpu.onnx --data archive.zip
    python -m benchmarks.robustness best.pth --data archive.zip --json robustness.json

All pictures of the validation part at their stored size, spoilt one way at a time, without test-time augmentation.
What is random is drawn once from a seed, so that every artifact answers the same pictures. Around a picture its border
goes on: FER2013 shows nothing of what was there.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from fer_dist.console import counting, say
from fer_dist.data.faces import VAL, Faces
from fer_dist.engine.score import answers
from fer_dist.serve.dataset import open_data, settings_of
from fer_dist.serve.runner import open_runner
from fer_dist.world import World, join

Spoil = Callable[[NDArray[np.uint8], np.random.Generator], NDArray[np.uint8]]
"""uint8 `[N, S, S]` -> the same, worse."""
OFF = 0.15
"""A crop box is off by up to this part of its side, in place and in size."""


def main() -> None:
    """Print the table; with --json also write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", metavar="ARTIFACT", type=Path, nargs="+")
    parser.add_argument("--data", metavar="PATH", required=True)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--limit", metavar="N", type=int, help="evenly spread pictures; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    given = parser.parse_args()
    with join("cpu") as world:
        found = {str(path): accuracies(path, given, world) for path in given.paths}
    rows = [{"corruption": name, "artifacts": {path: found[path][name] for path in found}} for name in SPOILT]
    say("  ".join(["spoilt by".ljust(34), *(Path(path).name for path in found)]))
    for row in rows:
        say("  ".join([row["corruption"].ljust(34), *(f"{100 * a:.2f}%".rjust(9) for a in row["artifacts"].values())]))
    if given.json:
        given.json.write_text(
            json.dumps({"data": given.data, "limit": given.limit, "seed": given.seed, "rows": rows}, indent=1) + "\n"
        )


def accuracies(path: Path, given: argparse.Namespace, world: World) -> dict[str, float]:
    """Accuracy 0..1 on the validation part, by kind of spoiling; "nothing" is the first."""
    with open_runner(path, threads=given.threads) as runner:
        faces = open_data(settings_of(path), runner.spec, given.data, say).faces
        index_M = faces.part(VAL)
        chosen = np.linspace(0, len(index_M) - 1, min(given.limit or len(index_M), len(index_M))).astype(int)
        part = faces.select(index_M[chosen])
        rows_M = np.arange(len(part))
        found = {}
        with counting(path.name, len(SPOILT) * len(part)) as progress:
            for number, (name, spoil) in enumerate(SPOILT.items()):
                worse = spoil(part.images_NHW, np.random.default_rng([given.seed, number]))
                spoilt: Faces = replace(part, images_NHW=worse)
                log_p_NK = answers(runner, spoilt, rows_M, world, batch=64, progress=progress)
                found[name] = float((log_p_NK.argmax(1).numpy() == part.labels_N).mean())
        return found


def blur(sigma: float) -> Spoil:
    """Gaussian blur; sigma in pixels as stored."""

    def spoil(images_NSS: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        reach = math.ceil(3 * sigma)
        weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
        weights /= weights.sum()
        padded = F.pad(_floats(images_NSS), (reach,) * 4, mode="replicate")
        return _bytes(F.conv2d(F.conv2d(padded, weights.view(1, 1, 1, -1)), weights.view(1, 1, -1, 1)))

    return spoil


def noise(deviation: float) -> Spoil:
    """Gaussian noise; deviation in grey levels."""

    def spoil(images_NSS: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        noisy = images_NSS + deviation * rng.standard_normal(images_NSS.shape, np.float32)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)

    return spoil


def jpeg(quality: int) -> Spoil:
    """Stored as JPEG once more."""

    def spoil(images_NSS: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        return np.stack([_stored(image_SS, quality) for image_SS in images_NSS])

    return spoil


def darkness(factor: float) -> Spoil:
    """Less light, in whole grey levels."""
    return lambda images_NSS, rng: np.rint(images_NSS * np.float32(factor)).astype(np.uint8)


def rotation(degrees: float) -> Spoil:
    """Turned around the middle; positive is against the clock."""

    def spoil(images_NSS: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        a = np.full(len(images_NSS), math.radians(degrees))
        zero = np.zeros_like(a)
        return _warped(images_NSS, np.stack([np.cos(a), -np.sin(a), zero, np.sin(a), np.cos(a), zero], 1))

    return spoil


def small(side: int) -> Spoil:
    """As from a face of so few pixels: reduced by area, enlarged again."""

    def spoil(images_NSS: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        whole = images_NSS.shape[-1]
        few = _bytes(F.interpolate(_floats(images_NSS), size=(side, side), mode="area"))
        return _bytes(F.interpolate(_floats(few), size=(whole, whole), mode="bilinear", align_corners=False))

    return spoil


def box_off(images_NSS: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The crop is shifted and resized at random, each by up to `OFF` of its side."""
    zoom, right, down = 1 + OFF * rng.uniform(-1, 1, (3, len(images_NSS)))
    zero = np.zeros_like(zoom)
    return _warped(images_NSS, np.stack([zoom, zero, 2 * (right - 1), zero, zoom, 2 * (down - 1)], 1))


SPOILT: dict[str, Spoil] = {
    "nothing": lambda images_NSS, rng: images_NSS,
    "blur, sigma 1 pixel": blur(1.0),
    "blur, sigma 2 pixels": blur(2.0),
    "noise, deviation 10 grey levels": noise(10),
    "noise, deviation 25 grey levels": noise(25),
    "JPEG, quality 30": jpeg(30),
    "JPEG, quality 10": jpeg(10),
    "darkness, half the light": darkness(0.5),
    "darkness, a fifth of the light": darkness(0.2),
    "rotation, 15 degrees left": rotation(15),
    "rotation, 15 degrees right": rotation(-15),
    "small face, 24 pixels": small(24),
    "crop box off by up to 15%": box_off,
}


def _stored(image_SS: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    file = BytesIO()
    Image.fromarray(image_SS).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _warped(images_NSS: NDArray[np.uint8], affine_N6: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Pixel (x, y) in -1..1 shows what was at (a*x + b*y + c, d*x + e*y + f)."""
    theta_N23 = torch.from_numpy(affine_N6.reshape(-1, 2, 3)).float()
    images_N1SS = _floats(images_NSS)
    grid = F.affine_grid(theta_N23, list(images_N1SS.shape), align_corners=False)
    return _bytes(F.grid_sample(images_N1SS, grid, mode="bilinear", padding_mode="border", align_corners=False))


def _floats(images_NSS: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images_NSS)).float().unsqueeze(1)


def _bytes(images_N1SS: Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = images_N1SS.squeeze(1).round().clamp(0, 255).to(torch.uint8).numpy()
    return found


if __name__ == "__main__":
    main()
