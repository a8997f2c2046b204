"""Files of tensors that would run code or fill the memory: refused by the one reader, which every place uses.

To add a place that loads a file, add a line to PLACES.
"""

import hashlib
import io
import json
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from export.console import Wish
from export.pipeline import export
from fer_dist.app import _main as app
from fer_dist.calibrate import _main as calibrate
from fer_dist.config import Config
from fer_dist.data.faces import VAL
from fer_dist.engine.checkpoint import SEAL, SEAL_BYTES
from fer_dist.engine.checkpoint import load as load_checkpoint
from fer_dist.engine.describe import describe
from fer_dist.engine.history import newest
from fer_dist.engine.start import starting_model
from fer_dist.errors import UserError
from fer_dist.models import build_model
from fer_dist.models.weights import read_state
from fer_dist.predict import _main as predict
from fer_dist.serve.dataset import settings_of
from fer_dist.serve.evaluation import evaluate
from fer_dist.serve.exam import Task
from fer_dist.serve.runner import open_runner
from fer_dist.spec import LabelSet
from fer_dist.tensors import NotTensors, read_tensors
from fer_dist.world import World
from tests.helpers.malicious_pickles import ATTACKS, EVIL_NAMES, INERT, around, benign, called, whole
from tests.helpers.memory_meter import read_within
from tests.helpers.tensor_bombs import BODIES, FILES, make_bomb, number
from tests.helpers.tiny_models import tiny_config

# -- the reader


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_attack_is_refused_before_torch_loads_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded plainly, the same file acts: its refusal means something."""
    make, reason = ATTACKS[kind]
    trace, path = tmp_path / "trace", tmp_path / "weights.pth"
    with warnings.catch_warnings(action="ignore"):  # of members that are there twice, of TorchScript
        path.write_bytes(make(trace))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
        with pytest.raises(NotTensors, match=reason) as caught:
            read_tensors(path)
    assert len(str(caught.value).splitlines()) == 1
    assert not trace.exists()
    with warnings.catch_warnings(action="ignore"):
        with suppress(Exception):  # some fail after they have acted
            torch.load(path, weights_only=False)
        with suppress(Exception):
            pickle.loads(path.read_bytes())
    assert trace.exists() == (kind not in INERT)


def test_names_that_tensors_do_not_need_are_refused(tmp_path: Path) -> None:
    for name in EVIL_NAMES:
        (tmp_path / "x.pth").write_bytes(around(whole(called(name))))
        with pytest.raises(NotTensors, match=f"it names {name.replace(' ', '.')}, which tensors do not need"):
            read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", [*BODIES, *FILES])
def test_a_bomb_takes_neither_memory_nor_time(kind: str, tmp_path: Path) -> None:
    raw, reason = make_bomb(kind)
    (tmp_path / "weights.pth").write_bytes(raw)
    read_within("tensors", tmp_path / "weights.pth", reason, max_mib=128, max_seconds=10)


# -- the places that use it


def weights_of(arch: str, weights: Path) -> None:
    """`--model.weights` of a training."""
    build_model(tiny_config(arch, weights=str(weights)).model, 48, LabelSet())


def vit_folder(path: Path, name: str) -> None:
    """The file inside of a folder of save_pretrained, as `name`."""
    folder = path.with_name(f"folder {path.stem}")
    folder.mkdir()
    (folder / name).write_bytes(path.read_bytes())
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    (folder / "config.json").write_text(json.dumps(sizes | {"model_type": "vit", "image_size": 64, "patch_size": 16}))
    if name.startswith("shard"):
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    config = Config().override({"model.arch": "vit", "model.weights": str(folder)})
    build_model(config.model, 48, LabelSet())


def sealed(work: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a place that takes a checkpoint: its checksum is right, and nothing may be left next to it."""

    def place(path: Path) -> None:
        raw = path.read_bytes()
        if raw.startswith(b"PK"):
            raw = raw[:-2] + SEAL_BYTES.to_bytes(2, "little")
        path.write_bytes(raw + SEAL + hashlib.sha256(raw).hexdigest().encode())
        before = set(path.parent.iterdir())
        try:
            work(path)
        finally:
            assert set(path.parent.iterdir()) == before

    return place


def resumed(path: Path) -> None:
    """The only checkpoint of a run folder that a run would resume from."""
    (path.parent / "checkpoints").mkdir()
    path = path.rename(path.parent / "checkpoints" / "step-00000004.pth")
    try:
        newest(path.parents[1])
    finally:
        path.rename(path.parents[1] / "weights.pth")
        path.parent.rmdir()


def described(path: Path) -> None:
    """`python -m fer_dist.checkpoint`."""
    found = describe(path)
    assert not found["valid"]
    raise UserError(found["reason"], "(up to the caller)")


def judged(path: Path) -> None:
    """`python -m fer_dist.evaluate`."""
    evaluate(Task(paths=(path,), split=VAL), World(), print, lambda title, total: nullcontext(lambda done: None))


PLACES: dict[str, Callable[[Path], Any]] = {
    "read_state": read_state,
    "patt_lite": lambda path: weights_of("patt_lite", path),
    "timm:resnet18": lambda path: weights_of("timm:resnet18", path),
    "vit, pytorch_model.bin": lambda path: vit_folder(path, "pytorch_model.bin"),
    "vit, model.safetensors": lambda path: vit_folder(path, "model.safetensors"),
    "vit, a shard": lambda path: vit_folder(path, "shard-1.bin"),
    "checkpoint": sealed(load_checkpoint),
    "checkpoint.safetensors": lambda path: load_checkpoint(path.rename(path.with_suffix(".safetensors"))),
    "resume": sealed(resumed),
    "fer_dist.checkpoint": sealed(described),
    "model.weights": sealed(
        lambda path: starting_model(tiny_config("patt_lite", weights=str(path)).model, 48, LabelSet(), print)
    ),
    "export": sealed(lambda path: export(Wish(path=path))),
    "export.parity": sealed(settings_of),
    "fer_dist.evaluate": sealed(judged),
    "fer_dist.calibrate": sealed(lambda path: calibrate([str(path)])),
    "fer_dist.predict": sealed(lambda path: predict(["picture.png", "--model", str(path)])),
    "fer_dist.app": sealed(lambda path: app(["--no-browser", "--model", str(path)])),
    "open_runner": sealed(open_runner),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_refuses_with_the_reason_of_the_reader(place: str, tmp_path: Path) -> None:
    """Code in both formats, and what torch's own guard lets pass: that reason can only come from the reader."""
    trace = tmp_path / "trace"
    guarded = around(whole(called("builtins bytearray", number(2**10))))
    assert len(torch.load(io.BytesIO(guarded), weights_only=True)) == 2**10
    files = {"code": ATTACKS["in a state dict"][0](trace), "old": ATTACKS["old format"][0](trace), "guarded": guarded}
    for name, raw in files.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "weights.pth").write_bytes(raw)
        with pytest.raises(UserError, match=r"it names .*, which tensors do not need") as caught:
            PLACES[place](folder / "weights.pth")
        assert not trace.exists()
        assert caught.value.fix
        assert len(caught.value.problem.splitlines()) == 1


def test_a_good_file_comes_to_torch_at_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.pth").write_bytes(benign())
    assert read_state(tmp_path / "good.pth")["weight"].shape == (3, 4)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(pytest.fail.Exception):
        read_tensors(tmp_path / "good.pth")
