"""Are faces found, how long does it take, and how much room should a crop have?

    python -m benchmarks.faces                             recall by size, false hits, milliseconds; half a minute
    python -m benchmarks.faces --model best.pth            and the accuracy of the crops, by margin
    python -m benchmarks.faces --model best.pth --data archive.zip     the same on FER2013's validation part

Scenes are drawn by the program, 1280x960, six heads of different sizes each; a size is the side of the square that
FER2013 would show. With `--data`, pictures of a data set are enlarged, and their border goes on around them: the last
line, "as stored", is what the model says of the pictures themselves.
"""

import argparse
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fer_dist.config import Config
from fer_dist.data.cache import open_faces
from fer_dist.data.faces import VAL
from fer_dist.serve.faces import DETAIL, Box, YuNet, crop, whole
from fer_dist.serve.runner import Runner, open_runner
from fer_dist.spec import LabelSet
from tests.helpers.synthetic_scenes import scene, tiles

SIDES = (32, 48, 64, 96, 128, 192, 240)
MARGINS = (-0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
Item = tuple[NDArray[np.uint8], Box, int]
"""A picture, the box of its face, its class."""


def main() -> None:
    """Print both tables, and the machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=42)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", help="a data set instead of drawn faces, for the margin")
    parser.add_argument("--limit", type=int, default=1050, help="faces for the margin")
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread; detail {DETAIL}")
    recall(given.scenes)
    if given.model:
        with open_runner(given.model, threads=1) as runner:
            margins(runner, stored(given.data, given.limit) if given.data else drawn(given.limit))


def recall(count: int) -> None:
    """Share of faces found by size, boxes on no face, and CPU time a scene."""
    detector = YuNet()
    hits: dict[int, list[bool]] = {side: [] for side in SIDES}
    wrong, began = 0, time.process_time()
    for seed in range(count):
        sides = [SIDES[(seed + i) % len(SIDES)] for i in range(6)]
        picture = scene(sides, seed, width=1280, height=960)
        found = [one.box for one in detector.find(picture.rgb_HW3)]
        for side, box in zip(sides, picture.boxes, strict=True):
            hits[side].append(any(near(one, box) for one in found))
        wrong += sum(not any(near(one, box) for box in picture.boxes) for one in found)
    spent = (time.process_time() - began) / count
    print("side of the face [pixels]", *(f"{side:>6}" for side in SIDES))
    print("found                    ", *(f"{100 * sum(h) / max(len(h), 1):5.0f}%" for h in hits.values()))
    print(f"boxes on no face: {wrong} in {count} scenes; {1000 * spent:.0f} ms of CPU a scene, drawing included")
    picture = scene([], 0, width=1280, height=960)
    times = []
    for _ in range(10):
        began = time.process_time()
        detector.find(picture.rgb_HW3)
        times.append(time.process_time() - began)
    print(f"looking for faces alone, 1280x960: {1000 * min(times):.0f} ms")


def near(found: Box, truth: Box) -> bool:
    """Whether a box is that face: its middle within a third of the face's side, its height half to twice of it."""
    across = found.left + found.width / 2 - truth.left - truth.width / 2
    down = found.top + found.height / 2 - truth.top - truth.height / 2
    return max(abs(across), abs(down)) < truth.height / 3 and 0.5 < found.height / truth.height < 2


def drawn(count: int) -> list[Item]:
    """Heads with their surroundings, those that are found."""
    heads, labels = tiles(count, seed=1)
    return located([np.repeat(head[..., None], 3, 2) for head in heads], labels)


def stored(path: str, count: int) -> list[Item]:
    """Validation pictures of a data set, enlarged three times on a wider ground, those that are found."""
    faces = open_faces(Config().override({"data.path": path}).data, LabelSet())
    index = faces.part(VAL)
    chosen = index[np.linspace(0, len(index) - 1, min(count, len(index))).astype(int)]
    pictures = []
    for image_SS in faces.images_NHW[chosen]:
        large = Image.fromarray(image_SS).resize((144, 144), Image.Resampling.BICUBIC)
        pictures.append(np.repeat(np.pad(np.asarray(large), 72, mode="edge")[..., None], 3, 2))
    return located(pictures, faces.labels_N[chosen])


def located(pictures: list[NDArray[np.uint8]], labels: NDArray[np.int64]) -> list[Item]:
    """Each picture with its surest box."""
    detector = YuNet()
    items = []
    for picture, label in zip(pictures, labels, strict=True):
        if found := detector.find(picture):
            items.append((picture, max(found, key=lambda one: one.confidence).box, int(label)))
    print(f"found in {len(items)} of {len(pictures)} pictures with one face each")
    return items


def margins(runner: Runner, items: list[Item]) -> None:
    """Accuracy of a model on the crops, by margin."""
    size, labels = runner.spec.input.size, torch.tensor([label for _, _, label in items])

    def accuracy(crops: list[NDArray[np.uint8]]) -> float:
        logits = [runner(torch.from_numpy(np.stack(crops[i : i + 64])[:, None])) for i in range(0, len(crops), 64)]
        return float((torch.cat(logits).argmax(1) == labels).double().mean())

    for margin in MARGINS:
        score = accuracy([crop(picture, box, size=size, margin=margin) for picture, box, _ in items])
        print(f"margin {margin:5.2f}: accuracy {100 * score:.1f}%")
    middles = [slice(p.shape[0] // 4, -(p.shape[0] // 4)) for p, _, _ in items]
    score = accuracy([whole(p[m, m], size=size) for (p, _, _), m in zip(items, middles, strict=True)])
    print(f"the middle half of the picture (--data: as stored): accuracy {100 * score:.1f}%")


if __name__ == "__main__":
    main()
