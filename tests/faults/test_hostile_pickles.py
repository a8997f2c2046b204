"""Files of tensors that would run code: refused at every place that loads one, and nothing of them runs.

To add a place (predict), add a line to PLACES.
"""

import hashlib
import json
import pickle
import time
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
from tests.helpers.malicious_pickles import ATTACKS, Attack, around, benign, called, whole
from tests.helpers.memory_meter import Meter
from tests.helpers.tensor_bombs import BOMBS, doubled, item, number
from tests.helpers.tiny_models import tiny_config

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def plainly(path: Path) -> None:
    """The reader itself, which leaves it to others to say what to do."""
    try:
        read_tensors(path)
    except NotTensors as error:
        raise UserError(str(error), "(up to the caller)") from None


def weights_of(arch: str, weights: Path, **options: Any) -> None:
    """`--model.weights` of a training."""
    config = tiny_config(arch, weights=str(weights), **options)
    build_model(config.model, 48, LabelSet())


def started_from(path: Path) -> None:
    """`--model.weights` of a training, where the file says that it is a checkpoint of ours."""
    starting_model(tiny_config("patt_lite", weights=str(path)).model, 48, LabelSet(), print)


def vit_folder(path: Path, name: str) -> None:
    """The file inside of a folder of save_pretrained, as `name`."""
    folder = path.with_name("folder")
    folder.mkdir()
    (folder / name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(SIZES | {"model_type": "vit", "image_size": 64, "patch_size": 16}))
    if name.startswith("shard"):
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"weight": name}}))
    config = Config().override({"model.arch": "vit", "model.weights": str(folder)})
    build_model(config.model, 48, LabelSet())


def seal(path: Path) -> None:
    """Give a file a checksum that is right."""
    raw = path.read_bytes()
    if raw.startswith(b"PK"):
        raw = raw[:-2] + SEAL_BYTES.to_bytes(2, "little")
    path.write_bytes(raw + SEAL + hashlib.sha256(raw).hexdigest().encode())


def resumed(path: Path) -> None:
    """The only checkpoint of a run folder that a run would go on from."""
    seal(path)
    folder = path.with_name("run") / "checkpoints"
    folder.mkdir(parents=True)
    path.rename(folder / "step-00000004.pth")
    newest(folder.parent)


def described(path: Path) -> None:
    """`python -m fer_dist.checkpoint`."""
    seal(path)
    found = describe(path)
    assert not found["valid"]
    raise UserError(found["reason"], "(up to the caller)")


def sealed_checkpoint(path: Path) -> None:
    """A checkpoint whose checksum is right."""
    seal(path)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert "checksum" not in caught.value.problem, "the seal is right, so something else must have refused it"
    raise caught.value


def sealed_for(path: Path, work: Callable[[], object]) -> None:
    """A place that takes a checkpoint, whose checksum is right; nothing is left beside it."""
    seal(path)
    before = set(path.parent.iterdir())
    try:
        work()
    finally:
        assert set(path.parent.iterdir()) <= before | {path.with_name("trace")}


def judged(path: Path) -> None:
    """`python -m fer_dist.evaluate`."""
    evaluate(Task(paths=(path,), split=VAL), World(), print, lambda title, total: nullcontext(lambda done: None))


PLACES: dict[str, Callable[[Path], object]] = {
    "read_tensors": plainly,
    "read_tensors of .safetensors": lambda path: plainly(path.rename(path.with_suffix(".safetensors"))),
    "read_state": read_state,
    "patt_lite": lambda path: weights_of("patt_lite", path),
    "timm:resnet18": lambda path: weights_of("timm:resnet18", path),
    "vit, pytorch_model.bin": lambda path: vit_folder(path, "pytorch_model.bin"),
    "vit, model.safetensors": lambda path: vit_folder(path, "model.safetensors"),
    "vit, a shard": lambda path: vit_folder(path, "shard-1.bin"),
    "checkpoint": load_checkpoint,
    "sealed checkpoint": sealed_checkpoint,
    "resume": resumed,
    "fer_dist.checkpoint": described,
    "model.weights, sealed": lambda path: sealed_for(path, lambda: started_from(path)),
    "export": lambda path: sealed_for(path, lambda: export(Wish(path=path))),
    "export.parity": lambda path: sealed_for(path, lambda: settings_of(path)),
    "fer_dist.evaluate": lambda path: sealed_for(path, lambda: judged(path)),
    "fer_dist.calibrate": lambda path: sealed_for(path, lambda: calibrate([str(path)])),
    "fer_dist.predict": lambda path: sealed_for(path, lambda: predict(["picture.png", "--model", str(path)])),
    "fer_dist.app": lambda path: sealed_for(path, lambda: app(["--no-browser", "--model", str(path)])),
    "open_runner": lambda path: sealed_for(path, lambda: open_runner(path)),
}


def made(attack: Attack, trace: Path) -> Path:
    """The file of an attack beside its trace."""
    path = trace.with_name("weights.pth")
    with warnings.catch_warnings(action="ignore"):  # of names that are there twice, of TorchScript
        path.write_bytes(attack.make(trace))
    return path


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ATTACKS)
def test_nothing_runs_at_any_place(kind: str, place: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = made(ATTACKS[kind], trace)
    with pytest.raises(UserError) as caught:
        PLACES[place](path)
    assert not trace.exists()
    assert ATTACKS[kind].reason in caught.value.problem or place == "checkpoint"  # which looks at its checksum first
    assert caught.value.fix
    assert len(caught.value.problem.splitlines()) == 1


@pytest.mark.parametrize("kind", [kind for kind in ATTACKS if ATTACKS[kind].proof])
def test_it_would_run_without_a_guard(kind: str, tmp_path: Path) -> None:
    """The same file, loaded plainly, leaves its trace: its being refused means something."""
    trace = tmp_path / "trace"
    path = made(ATTACKS[kind], trace)
    with suppress(Exception), warnings.catch_warnings(action="ignore"):  # some fail when they have acted
        if ATTACKS[kind].proof == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("place", ["read_tensors", "read_state"])
def test_the_wall_stands_before_the_guard(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own guard taken away, nothing of the corpus comes as far as torch.load."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    for index, attack in enumerate(ATTACKS.values()):
        (tmp_path / str(index)).mkdir()
        path = made(attack, tmp_path / str(index) / "trace")
        with pytest.raises(UserError):
            PLACES[place](path)
    (tmp_path / "good.pth").write_bytes(benign())
    with pytest.raises(pytest.fail.Exception):
        PLACES[place](tmp_path / "good.pth")


# -- files that would take memory or time

MOST_BYTES, MOST_SECONDS = 128 * 2**20, 10


@pytest.fixture(scope="module")
def usual(meter: Meter, tmp_path_factory: pytest.TempPathFactory) -> int:
    """The memory that a good file takes."""
    path = tmp_path_factory.mktemp("usual") / "weights.pth"
    path.write_bytes(benign())
    answer = meter.ask("tensors", path)
    assert answer.error == ""
    return answer.grown


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_takes_neither_memory_nor_time(kind: str, tmp_path: Path, meter: Meter, usual: int) -> None:
    path = tmp_path / "weights.pth"
    make, reason = BOMBS[kind]
    path.write_bytes(make())
    answer = meter.ask("tensors", path)
    assert answer.error == "NotTensors", answer
    assert reason in answer.problem
    assert answer.grown - usual < MOST_BYTES, f"{answer.grown / 2**20:.0f} MiB against {usual / 2**20:.0f}"
    assert answer.seconds < MOST_SECONDS


@pytest.mark.parametrize("place", ["patt_lite", "vit, pytorch_model.bin", "sealed checkpoint"])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_at_every_place(kind: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(BOMBS[kind][0]())
    with pytest.raises(UserError) as caught:
        PLACES[place](path)
    assert caught.value.fix


def test_the_guard_alone_would_make_a_bytearray(tmp_path: Path) -> None:
    """64 MiB from a kilobyte, with weights_only: `bytearray` is in torch's own list of harmless functions."""
    path = tmp_path / "weights.pth"
    path.write_bytes(around(whole(called("builtins bytearray", number(2**26)))))
    assert path.stat().st_size < 2000
    assert len(torch.load(path, weights_only=True)) == 2**26
    with pytest.raises(NotTensors, match=r"it names builtins\.bytearray"):
        read_tensors(path)


def test_the_guard_alone_would_hash_for_years(tmp_path: Path) -> None:
    """Each level of tuples doubles the time of the key's hash, which a tuple does not remember."""
    path = tmp_path / "weights.pth"
    path.write_bytes(around(item(b"N", key=doubled(18, b"\x86", b")"))))
    start = time.perf_counter()
    torch.load(path, weights_only=True)
    short = time.perf_counter() - start
    path.write_bytes(around(item(b"N", key=doubled(23, b"\x86", b")"))))
    start = time.perf_counter()
    torch.load(path, weights_only=True)
    assert time.perf_counter() - start > 4 * short, "32 times as long, but for what both take"
    start = time.perf_counter()
    with pytest.raises(NotTensors, match="a key is of type tuple"):
        read_tensors(path)
    assert time.perf_counter() - start < short + 1
