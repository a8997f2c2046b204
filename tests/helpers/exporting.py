"""Share what tests of the export need: tiny networks, their graphs, the parity gate, and commands in this process."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import pytest
import torch
from torch import Tensor

from export.answers import Answers, ask
from export.gate import ParityReport, compare, require_same_model, tolerance_of
from export.graph import to_onnx
from fer_dist.config import Config
from fer_dist.engine.checkpoint import Checkpoint, save
from fer_dist.models import FaceModel
from fer_dist.serve.artifact import onnx_metadata
from fer_dist.serve.dataset import Pictures, open_data
from fer_dist.serve.runner import Runner, open_runner
from tests.helpers.shared import shared_folder
from tests.helpers.tiny_models import make_lively, tiny_model

SHORTER: dict[str, dict[str, Any]] = {
    "patt_lite": {"options": {"cut": 3, "width_mult": 0.25, "channels": 32}},
    "timm:convnext_atto": {"options": {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]}},
}
"""Model options for fewer blocks: the exporter takes a second for each, and all blocks are alike."""
DRAWN = {"data.embedded_train": 70, "data.embedded_val": 140}
"""Settings of a small set of drawn faces."""
SETTINGS = {name: value for name, value in Config().override(DRAWN).to_dict().items() if name in ("data", "seed")}
SHA256 = "0" * 64
LOOSE = ("--tolerance", "agreement=0,accuracy=0.5,kl=9")
"""Two classes of a random network are almost equal, so a few pictures may change class with the precision."""


def lively(arch: str) -> FaceModel:
    """A tiny network whose logits differ between pictures, in evaluation mode; the same at every call."""
    return make_lively(tiny_model(arch, **SHORTER.get(arch, {}))).eval()


@cache
def graph_of(arch: str) -> onnx.ModelProto:
    """Export `lively(arch)` in float32, once per run of pytest. The graph must not be changed."""
    folder = shared_folder(
        f"graph-{arch}", lambda new: (new / "graph.onnx").write_bytes(to_onnx(lively(arch), SHA256).SerializeToString())
    )
    return onnx.load(folder / "graph.onnx")


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that may be changed."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def exported(model: FaceModel, checkpoint_sha256: str) -> onnx.ModelProto:
    """Replace `to_onnx` for a model made by `lively`: take the cached graph instead of exporting for seconds."""
    graph = copied(graph_of(model.spec.arch))
    attends = model.shows_attention
    properties = onnx_metadata(model.spec, precision="fp32", checkpoint_sha256=checkpoint_sha256, attends=attends)
    onnx.helper.set_model_props(graph, properties)
    return graph


def saved(folder: Path, arch: str, name: str = "best.pth", **settings: object) -> Path:
    """A checkpoint of `lively(arch)`, as after training on a small set of drawn faces.

    Args:
        settings: of its config, dots written as __.
    """
    model = lively(arch)
    config = Config().override(DRAWN | {key.replace("__", "."): value for key, value in settings.items()}).to_dict()
    checkpoint = Checkpoint(
        spec=model.spec, weights=model.state_dict(), config=config, record={}, provenance={}, resume={}
    )
    save(folder / name, checkpoint)
    return folder / name


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


class Live(Runner):
    """Run a model in memory as if it were an artifact."""

    kind = "pth"

    def __init__(self, model: FaceModel) -> None:
        super().__init__(Path("live"), model.spec, "fp32", SHA256)
        self.model = model

    def _run(self, images_N1SS: Tensor) -> tuple[Tensor, Tensor]:
        logits_NK = self.model(images_N1SS)
        return logits_NK, logits_NK.softmax(1)

    def _close(self) -> None: ...


@cache
def truth_of(arch: str) -> tuple[Answers, Pictures]:
    """Return the outputs of `lively(arch)` for 140 drawn faces, and the faces."""
    model = lively(arch)
    pictures = drawn(model)
    return ask(Live(model), pictures), pictures


def judge(arch: str, candidate: onnx.ModelProto | FaceModel) -> ParityReport:
    """Compare a float32 graph or a model in memory with `lively(arch)`, as `Maker._judge` does."""
    reference, pictures = truth_of(arch)
    if isinstance(candidate, FaceModel):
        runner: Runner = Live(candidate)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "judged.onnx"
            path.write_bytes(candidate.SerializeToString())
            runner = open_runner(path, provider="cpu")
    with runner:
        report = compare(reference, ask(runner, pictures), pictures, tolerance_of("fp32"), names=("a", "b"))
    return require_same_model(report, runner, lively(arch).spec, SHA256)


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
        f"{path.relative_to(folder)}{'/' if path.is_dir() else ''}": path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def names(folder: Path) -> list[str]:
    """List the names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def sidecar_of(path: Path) -> dict[str, Any]:
    """Return the content of an artifact's JSON file."""
    found: dict[str, Any] = json.loads(path.with_name(f"{path.name}.json").read_text())
    return found
