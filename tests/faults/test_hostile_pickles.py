"""Files of tensors that would run code or fill the memory: refused by the one reader, which every place uses.

To add a place that loads a file, add a line to WEIGHTS or CHECKPOINTS.
"""

import io
import json
import pickle
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from export.console import Wish
from export.pipeline import export
from fer_dist.app import _main as app
from fer_dist.calibrate import _main as calibrate
from fer_dist.config import Config
from fer_dist.engine.checkpoint import _seal
from fer_dist.engine.checkpoint import load as load_checkpoint
from fer_dist.engine.start import starting_model
from fer_dist.errors import UserError
from fer_dist.evaluate import _main as evaluate
from fer_dist.models import build_model
from fer_dist.models.weights import read_state
from fer_dist.predict import _main as predict
from fer_dist.serve.runner import open_runner
from fer_dist.spec import LabelSet
from fer_dist.tensors import NotTensors, read_tensors
from tests.helpers.malicious_pickles import ATTACKS, around, called, whole
from tests.helpers.memory_meter import read_within
from tests.helpers.tensor_bombs import BOMBS, number
from tests.helpers.tiny_models import tiny_config

# -- the reader


@pytest.mark.parametrize("kind", ATTACKS)
def test_an_attack_is_refused(kind: str, tmp_path: Path) -> None:
    """Loaded without the reader, the same file acts: its refusal means something."""
    make, reason = ATTACKS[kind]
    trace, path = tmp_path / "trace", tmp_path / "weights.pth"
    with warnings.catch_warnings(action="ignore"):  # of members that are there twice
        path.write_bytes(make(trace))
    with pytest.raises(NotTensors, match=reason):
        read_tensors(path)
    assert not trace.exists()
    with suppress(Exception):  # some fail after they have acted
        torch.load(path, weights_only=False)
    with suppress(Exception):
        pickle.loads(path.read_bytes())
    assert trace.exists()


def test_names_that_tensors_do_not_need_are_refused(tmp_path: Path) -> None:
    act = ("os system", "builtins eval", "builtins getattr", "torch load", "torch._utils os.mkdir", "numpy load")
    fill_the_memory = ("builtins bytearray", "torch FloatTensor", "torch._utils _rebuild_meta_tensor_no_storage")
    for name in (*act, *fill_the_memory):  # torch's own guard permits the latter
        (tmp_path / "x.pth").write_bytes(around(whole(called(name))))
        with pytest.raises(NotTensors, match=f"it names {name.replace(' ', '.')}, which tensors do not need"):
            read_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_takes_neither_memory_nor_time(kind: str, tmp_path: Path) -> None:
    make, reason = BOMBS[kind]
    (tmp_path / "weights.pth").write_bytes(make())
    read_within("tensors", tmp_path / "weights.pth", reason, max_mib=128)


# -- the places that use it


def load_weights(arch: str, weights: Path) -> None:
    """Build a model as `--model.weights` does."""
    build_model(tiny_config(arch, weights=str(weights)).model, 48, LabelSet())


def load_shard(path: Path) -> None:
    """Build a vit from a folder of save_pretrained with the file as its only shard."""
    config = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    (path.parent / "config.json").write_text(json.dumps(config | {"image_size": 64, "patch_size": 16}))
    (path.parent / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"weight": path.name}}))
    build_model(Config().override({"model.arch": "vit", "model.weights": str(path.parent)}).model, 48, LabelSet())


WEIGHTS: dict[str, Callable[[Path], object]] = {
    "read_state": read_state,
    "patt_lite": lambda path: load_weights("patt_lite", path),
    "timm:resnet18": lambda path: load_weights("timm:resnet18", path),
    "vit, a shard": load_shard,
    "checkpoint.safetensors": lambda path: load_checkpoint(path.rename(path.with_suffix(".safetensors"))),
}
CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    "checkpoint": load_checkpoint,
    "model.weights": lambda path: starting_model(
        tiny_config("patt_lite", weights=str(path)).model, 48, LabelSet(), print
    ),
    "export": lambda path: export(Wish(path=path)),
    "fer_dist.evaluate": lambda path: evaluate([str(path)]),
    "fer_dist.calibrate": lambda path: calibrate([str(path)]),
    "fer_dist.predict": lambda path: predict(["picture.png", "--model", str(path)]),
    "fer_dist.app": lambda path: app(["--no-browser", "--model", str(path)]),
    "open_runner": open_runner,
}
"""These compare the checksum first, which is right here, and leave nothing next to the file."""


@pytest.mark.parametrize("place", [*WEIGHTS, *CHECKPOINTS])
def test_every_place_refuses_with_the_reason_of_the_reader(place: str, tmp_path: Path) -> None:
    """Code in both formats, and what torch's own guard lets pass: that reason can only come from the reader."""
    trace = tmp_path / "trace"
    guarded = around(whole(called("builtins bytearray", number(2**10))))
    assert len(torch.load(io.BytesIO(guarded), weights_only=True)) == 2**10
    files = {"new": ATTACKS["state dict"][0](trace), "old": ATTACKS["old format"][0](trace), "guarded": guarded}
    for name, raw in files.items():
        path = tmp_path / name / "weights.pth"
        path.parent.mkdir()
        path.write_bytes(raw)
        if place in CHECKPOINTS:
            with path.open("r+b") as file:
                _seal(file)
        with pytest.raises(UserError, match=r"it names .*, which tensors do not need") as caught:
            (WEIGHTS | CHECKPOINTS)[place](path)
        assert not trace.exists()
        assert place in WEIGHTS or list(path.parent.iterdir()) == [path]
        assert caught.value.fix
        assert len(caught.value.problem.splitlines()) == 1
