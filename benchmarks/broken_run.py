"""What does it cost that a run can be broken at any moment?

One process, one thread. Steps of patt_lite (the demo's, and at 96 px) and of a small vit with all that is agreed on and
checked, and bare (backward pass and optimizer), in turns: the ratio of their CPU times. Then a save with its checksum,
in steps and in seconds, and what of it the checksum is. Run: python -m benchmarks.broken_run
"""

import hashlib
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fer_dist.config import Config, RunConfig, load_config
from fer_dist.data.faces import TRAIN
from fer_dist.data.feed import Batch, TrainFeed
from fer_dist.data.synthetic import draw_faces
from fer_dist.engine.checkpoint import Checkpoint
from fer_dist.engine.history import save_step
from fer_dist.engine.runlog import RunLog
from fer_dist.engine.state import TrainState, prepare, resume_state
from fer_dist.engine.step import backward, train_step
from fer_dist.models import build_model
from fer_dist.spec import LabelSet
from fer_dist.world import World

STEPS, TURNS, BATCH = 10, 5, 32
SIZES = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
CASES = {
    "patt_lite 48 px": {"data.embedded_train": 700},
    "patt_lite 96 px": {"data.embedded_train": 700, "model.image_size": 96, "model.options": {}},
    "vit 96 px, width 192": {"model.arch": "vit", "model.image_size": 96, "model.options": SIZES},
}


def prepared(config: Config, world: World) -> tuple[TrainState, TrainFeed]:
    """A state to step by hand."""
    labels = LabelSet()
    faces = draw_faces(700, 7, 0, seed=0)
    feed = TrainFeed(config, faces, faces.part(TRAIN), len(labels), world.device)
    torch.manual_seed(0)
    model = build_model(config.model, 48, labels)
    return prepare(config, model, 100, world, RunLog(RunConfig(progress="none"), first=True)), feed


def bare(config: Config, state: TrainState, batch: Batch) -> None:
    """A step that agrees on nothing and checks nothing."""
    backward(config, state, batch, World())
    state.optimizer.step()
    state.optimizer.zero_grad()
    assert state.ema
    state.ema.update(state.step)


def seconds(work: Callable[[], object]) -> float:
    """CPU time of some steps, per step [s]."""
    begun = time.process_time()
    for _ in range(STEPS):
        work()
    return (time.process_time() - begun) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    world = World()
    for name, values in CASES.items():
        config = load_config("demo", {**values, "train.global_batch": BATCH})
        state, feed = prepared(config, world)
        batch = next(feed.epoch(0, rank=0, size=1))

        checked = partial(train_step, config, state, batch, world)
        turns = [(seconds(partial(bare, config, state, batch)), seconds(checked)) for _ in range(TURNS + 1)]
        turns = turns[1:]  # the first warms up
        bare_s, checked_s = min(turn[0] for turn in turns), min(turn[1] for turn in turns)
        spec = state.model.spec
        made = Checkpoint(
            spec=spec,
            weights=state.deployed.state_dict(),
            config=config.to_dict(),
            record={},
            provenance={},
            resume=resume_state(state, ""),
        )
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            path = save_step(Path(folder), made, 1, 2)
            save_s = time.perf_counter() - begun
            raw = path.read_bytes()
        begun = time.perf_counter()
        hashlib.sha256(raw).digest()
        hash_s = time.perf_counter() - begun
        print(
            f"{name:<22} step {1000 * checked_s:6.1f} ms, {checked_s / bare_s:.3f} of a bare one; "
            f"a save of {len(raw) / 2**20:5.1f} MiB {1000 * save_s:5.0f} ms, {save_s / checked_s:4.1f} steps, "
            f"its checksum {100 * hash_s / save_s:.0f}% of it"
        )
    print(f"on {platform.platform()}, torch {torch.__version__}, one thread")


if __name__ == "__main__":
    main()
