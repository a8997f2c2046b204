"""What needs a CUDA device; skipped elsewhere, with the reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fer_dist.data.cache import open_faces
from fer_dist.data.faces import VAL
from fer_dist.data.feed import evaluation_batches
from fer_dist.engine.checkpoint import load
from fer_dist.engine.score import score
from fer_dist.engine.trainer import Result, fit
from fer_dist.errors import Stopped
from fer_dist.spec import LabelSet
from fer_dist.world import World, join
from tests.helpers.fault_runs import Ledger, breaking, run_whole
from tests.helpers.processes import torchrun
from tests.helpers.small_runs import AUGMENTED, everything, no_pictures, same, stateful, tiny

pytestmark = pytest.mark.gpu
ARCHS = ["vit", "vit_mae", "patt_lite"]


def train(arch: str, folder: Path, **values: Any) -> Result:
    """Train ten steps, on the GPU unless `train__device` says otherwise."""
    settings = {**AUGMENTED, "train__device": "cuda", "train__epochs": 1, "train__steps_per_epoch": 10, **values}
    with no_pictures():
        return fit(tiny(arch, folder, **settings))


@pytest.mark.parametrize("arch", ARCHS)
def test_losses_and_evaluation_are_those_of_the_cpu(arch: str, tmp_path: Path) -> None:
    """In float64, since a GPU adds in another order."""
    gpu = train(arch, tmp_path, run__name="gpu", train__precision="float64")
    cpu = train(arch, tmp_path, run__name="cpu", train__precision="float64", train__device="cpu")
    # Augmentation is in float32 on either device: about 1e-4 of 255 grey levels.
    np.testing.assert_allclose(gpu.losses, cpu.losses, rtol=0, atol=1e-3)
    saved = load(gpu.folder / "best.pth")
    faces = open_faces(tiny(arch, tmp_path).data, LabelSet())
    scores = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        batches = evaluation_batches(faces, faces.part(VAL), batch=32, rank=0, size=1, device=device)
        scores.append(score(saved.model().double().to(device), batches, World(device=device), classes=7))
    assert scores[0].confusion_KK.tolist() == scores[1].confusion_KK.tolist()
    assert scores[0].loss == pytest.approx(scores[1].loss, abs=1e-9)
    assert scores[1].accuracy == pytest.approx(saved.record["val"]["accuracy"])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_autocast(arch: str, precision: str, tmp_path: Path) -> None:
    """Mixed precision is close to float32, but not equal; weights stay float32."""
    half = train(arch, tmp_path, run__name="half", train__precision=precision)
    full = train(arch, tmp_path, run__name="full")
    assert half.losses != full.losses
    np.testing.assert_allclose(half.losses, full.losses, rtol=0, atol=0.1)
    last = load(half.folder / "last.pth")
    assert {value.dtype for value in last.weights.values() if value.is_floating_point()} == {torch.float32}
    assert bool(last.resume["scaler"]) == (precision == "float16"), "loss scaling for float16 only"


@pytest.mark.parametrize("arch", ["vit", "patt_lite"])
def test_compile(arch: str, tmp_path: Path) -> None:
    compiled = train(arch, tmp_path, run__name="compiled", train__compile=True)
    eager = train(arch, tmp_path, run__name="eager")
    np.testing.assert_allclose(compiled.losses, eager.losses, rtol=0, atol=2e-2)
    assert load(compiled.folder / "best.pth").weights.keys() == load(eager.folder / "best.pth").weights.keys()


def test_nccl_with_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's variables: a group with NCCL for CUDA tensors and gloo for the rest."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with join("cuda") as world:
        assert world.device.type == "cuda"
        assert dist.get_backend_config() == "cpu:gloo,cuda:nccl"
        for device in ("cuda", "cpu"):
            x = torch.ones(3, device=device)
            dist.all_reduce(x)
            assert x.tolist() == [1, 1, 1]
    assert not dist.is_initialized()


def test_torchrun_with_one_gpu(tmp_path: Path) -> None:
    command = ["-m", "fer_dist.train", "--config", "demo", "--train.device", "cuda", "--run.name", "gpu"]
    command += ["--data.embedded_train", "140", "--data.embedded_val", "21", "--train.epochs", "1"]
    torchrun(1, *command, cwd=tmp_path).ok()
    origin = json.loads((tmp_path / "runs" / "gpu" / "provenance.json").read_text())
    assert origin["device"] == torch.cuda.get_device_name(0)


@pytest.mark.parametrize(("begins", "ends"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_run_resumes_on_another_device(begins: str, ends: str, tmp_path: Path) -> None:
    """Weights on disk are CPU tensors."""
    values = {"train__epochs": 2, "train__ema": 0.9, "run__name": "mine", "run__resume": "auto"}
    settings = {"train__steps_per_epoch": 3, "train__precision": "float64", **values}
    first = train("patt_lite", tmp_path, **{**settings, "train__epochs": 1, "train__device": begins})
    as_stored = torch.load(first.folder / "last.pth", weights_only=True)  # no map_location
    assert {value.device.type for value in as_stored["weights"].values()} == {"cpu"}
    second = train("patt_lite", tmp_path, **settings, train__device=ends)
    assert [record["epoch"] for record in second.records] == [1, 2]
    whole = train("patt_lite", tmp_path, **{**settings, "run__name": "whole", "run__resume": "never"})
    np.testing.assert_allclose(first.losses + second.losses, whole.losses, rtol=0, atol=1e-3)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_resumed_run_is_the_same_run(arch: str, tmp_path: Path) -> None:
    """`train.deterministic`: to the bit, as on the CPU; in bfloat16, as the recipes train."""
    settings = {"train__device": "cuda", "train__precision": "bfloat16"}
    whole, expected = run_whole(stateful(arch, tmp_path, run__name="whole", **settings))
    ledger = Ledger()
    for at in (5, 14):
        with breaking(at, "signal", ledger), pytest.raises(Stopped):
            fit(stateful(arch, tmp_path, **settings))
    with breaking(-1, "", ledger):
        result = fit(stateful(arch, tmp_path, **settings))
    assert [number for number, _ in ledger] == [number for number, _ in expected]
    assert same(everything(result.folder / "last.pth"), everything(whole.folder / "last.pth"))
