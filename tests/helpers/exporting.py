"""What the tests of the export share: checkpoints of tiny networks, the gate on any graph, commands in this process."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest
import torch
from torch import Tensor

from export.answers import Answers, ask
from export.gate import ParityReport, compare, require_same_model, tolerance_of
from fer_dist.config import Config
from fer_dist.engine.checkpoint import Checkpoint, save
from fer_dist.models import FaceModel
from fer_dist.serve.artifact import Precision, onnx_metadata
from fer_dist.serve.dataset import Pictures, open_data
from fer_dist.serve.runner import Outputs, Runner, open_runner
from tests.helpers.onnx_graphs import copied, graph_of
from tests.helpers.tiny_models import make_lively, tiny_model

SHORTER = {"patt_lite": {"options": {"cut": 3, "width_mult": 0.25, "channels": 32}}}
"""The first blocks of MobileNetV2 will do: the exporter takes a second for each, and all are alike."""
DRAWN = {"data.embedded_train": 70, "data.embedded_val": 140}
"""Settings of a small set of drawn faces."""
SETTINGS = {name: value for name, value in Config().override(DRAWN).to_dict().items() if name in ("data", "seed")}
SHA256 = "0" * 64


def lively(arch: str) -> FaceModel:
    """A tiny network whose logits differ between pictures, in evaluation mode; the same at every call."""
    return make_lively(tiny_model(arch, **SHORTER.get(arch, {}))).eval()


def saved(folder: Path, arch: str, name: str = "best.pth", **settings: object) -> Path:
    """A checkpoint of `lively(arch)`, as after training on a small set of drawn faces.

    Args:
        settings: of its config, dots written as __.
    """
    model = lively(arch)
    config = Config().override(DRAWN).override({key.replace("__", "."): value for key, value in settings.items()})
    path = folder / name
    save(
        path,
        Checkpoint(
            spec=model.spec, weights=model.state_dict(), config=config.to_dict(), record={}, provenance={}, resume={}
        ),
    )
    return path


def exported(model: FaceModel, checkpoint_sha256: str) -> onnx.ModelProto:
    """`to_onnx` of `lively(arch)` without the seconds that the exporter takes: its graph is made once."""
    graph = copied(graph_of(model.spec.arch))
    attends = model.shows_attention
    properties = onnx_metadata(model.spec, precision="fp32", checkpoint_sha256=checkpoint_sha256, attends=attends)
    onnx.helper.set_model_props(graph, properties)
    return graph


class Live:
    """A model in memory, asked as a runner is."""

    def __init__(self, model: FaceModel) -> None:
        self.model = model

    @torch.no_grad()
    def run(self, images_N1SS: Tensor) -> Outputs:
        """As `Runner.run`."""
        logits_NK = self.model(images_N1SS)
        return Outputs(logits_NK=logits_NK, probabilities_NK=logits_NK.softmax(1))


def drawn(model: FaceModel) -> Pictures:
    """140 drawn faces."""
    return open_data(SETTINGS, model.spec, None, lambda text: None).validation()


def too_sure(checkpoint: Checkpoint, asked: Pictures) -> dict[str, Tensor]:
    """The weights of a `patt_lite` whose last layer knows these pictures, every third one wrong, and exaggerates."""
    model = checkpoint.model()
    features: list[Tensor] = []
    layer: Any = model.get_submodule("network.classifier")
    layer.register_forward_hook(lambda layer, given, answer: features.append(given[0].detach().double()))
    model(asked.images_N1SS)
    mean_F, deviation_F = features[0].mean(0), features[0].std(0) + 1e-6
    z_NF = (features[0] - mean_F) / deviation_F
    learned_N = torch.where(torch.arange(len(asked)) % 3 == 0, (asked.labels_N + 1) % 7, asked.labels_N)
    y_NK = torch.nn.functional.one_hot(learned_N, 7).double()
    weight_FK = torch.linalg.solve(z_NF.T @ z_NF + 10 * torch.eye(z_NF.shape[1]).double(), z_NF.T @ y_NK)
    weight_KF = 40 * (weight_FK / deviation_F[:, None]).T
    last = {"network.classifier.weight": weight_KF.float(), "network.classifier.bias": (-weight_KF @ mean_F).float()}
    return checkpoint.weights | last


class Gate:
    """The gate of a model in memory, for graphs that say they are it."""

    def __init__(self, model: FaceModel, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.pictures = drawn(model)
        self.reference: Answers = ask(_as_runner(Live(model)), self.pictures)

    def ask(self, runner: Runner) -> Answers:
        """What a runner answers to the pictures."""
        return ask(runner, self.pictures)

    def judge(self, graph: onnx.ModelProto, precision: Precision = "fp32") -> ParityReport:
        """As `Maker._judge` does it."""
        path = self.folder / "judged.onnx"
        path.write_bytes(graph.SerializeToString())
        with open_runner(path, provider="cpu") as runner:
            report = self._compare(ask(runner, self.pictures), precision)
            return require_same_model(report, runner, self.model.spec, SHA256)

    def judge_model(self, model: FaceModel) -> ParityReport:
        """A model in memory against this one."""
        return self._compare(ask(_as_runner(Live(model)), self.pictures), "fp32")

    def _compare(self, candidate: Answers, precision: Precision) -> ParityReport:
        return compare(self.reference, candidate, self.pictures, tolerance_of(precision), names=("a", "b"))


def _as_runner(live: Live) -> Runner:
    return live  # type: ignore[return-value]


def command(main: Callable[[], None], *argv: object) -> int:
    """Run a command in this process; its exit code."""
    with mock.patch.object(sys, "argv", ["command", *map(str, argv)]), pytest.raises(SystemExit) as left:
        main()
    assert isinstance(left.value.code, int)
    return left.value.code


@contextlib.contextmanager
def nothing_changes(folder: Path) -> Iterator[None]:
    """Raise AssertionError if a folder holds something else afterwards."""
    before = content(folder)
    yield
    assert content(folder) == before


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; folders end in /."""
    return {
        f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}": b"" if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes (rounded up to pages), which root can mount here and there; else skips."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
