"""No setting is forgotten: a test names each, and the code reads each."""

import sys
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from fer_dist.config import Config
from fer_dist.engine import trainer
from fer_dist.engine.state import why_sync_batchnorm
from fer_dist.options import Section, walk
from fer_dist.world import World
from tests.helpers.training import PARTS, settings

TESTS = Path(__file__).resolve().parents[1]
CODE = TESTS.parent / "fer_dist"


def test_every_setting_is_named_in_a_test() -> None:
    """Dotted, or with two underscores as `settings()` spells it."""
    text = "\n".join(path.read_text() for path in TESTS.rglob("*.py") if path.name != "test_config.py")
    forgotten = [
        name
        for name, _ in walk(Config)
        if name not in text and name.replace(".", "__") not in text and name.split(".")[-1] not in PARTS
    ]
    assert not forgotten, "no test sets " + ", ".join(forgotten)


def test_every_setting_is_read_by_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train a few times and note which fields fer_dist reads; a field that nothing reads has no effect."""
    read: set[tuple[type, str]] = set()
    plumbing = {str(CODE / name) for name in ("options.py", "config.py")}

    def note(section: Section, name: str) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        if caller.startswith(str(CODE)) and caller not in plumbing:
            read.add((type(section), name))
        return object.__getattribute__(section, name)

    # Twenty training pictures with their votes; there is no validation part.
    rows = [f"{i % 5},{10 * i}{' 0' * (48 * 48 - 1)},Training" for i in range(20)]
    (tmp_path / "fer2013.csv").write_text("\n".join(["emotion,pixels,Usage", *rows]) + "\n")
    head = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
    votes = [f"Training,fer{i:07d}.png,{i % 5},{5 - i % 5},0,0,3,1,1,0,0,0" for i in range(20)]
    (tmp_path / "fer2013new.csv").write_text("\n".join([head, *votes]) + "\n")
    quick = {"train.epochs": 1, "train.steps_per_epoch": 1, "run.dir": str(tmp_path / "runs"), "run.tensorboard": True}
    table = {"data.path": str(tmp_path / "fer2013.csv"), "data.ferplus": str(tmp_path / "fer2013new.csv")}
    drawn = {"data.embedded_train": 14, "data.embedded_val": 7}
    mixing = {"data.augment.mixup": 0.2, "data.augment.cutmix": 0.2}
    runs = (
        {**quick, **drawn, **mixing, "run.name": "a", "optim.schedule": "one_cycle", "train.precision": "bfloat16"},
        {**quick, **table, "data.size": 48, "data.cache_dir": str(tmp_path), "optim.schedule": "plateau"}
        | {"run.name": "b", "run.resume": "auto", "train.ema": 0.9},
    )
    with monkeypatch.context() as patch:
        patch.setattr(Section, "__getattribute__", note, raising=False)
        patch.setattr("os.fsync", lambda handle: None)
        (tmp_path / "runs" / "b").mkdir(parents=True)  # so that run.resume matters
        for values in runs:
            trainer.fit(settings(values))
        why_sync_batchnorm(settings().train, World(size=2, device=torch.device("cuda")))
    unread = set()
    for name, _ in walk(Config):
        *sections, field = name.split(".")
        if (type(reduce(getattr, sections, Config())), field) not in read:
            unread.add(name)
    # Read in the second evaluation without a gain, which one epoch does not have, and after a non-finite step.
    assert unread <= {"optim.plateau_factor", "train.max_skipped"}, "never read: " + ", ".join(sorted(unread))
