"""Broken and hostile input of the export commands, full and read-only disks, and untrusted sidecars."""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export import onnx as onnx_command
from export import trt
from fer_dist.engine.checkpoint import load
from fer_dist.errors import UserError
from fer_dist.serve.artifact import ExportedModel, file_sha256, read_sidecar, sidecar, sidecar_json
from fer_dist.spec import ModelSpec
from tests.helpers.commands import Capture, refused
from tests.helpers.exporting import exported, names, nothing_changes, saved

FIELDS: dict[str, Any] = {
    "kind": "engine",
    "precision": "fp16",
    "spec": ModelSpec(arch="vit"),
    "sha256": "a" * 64,
    "bytes": 5,
    "checkpoint_sha256": "b" * 64,
    "parent": "best.onnx",
    "parent_sha256": "c" * 64,
    "batch": (1, 8, 64),
    "built_with": {"torch": "2"},
    "data": {"seed": 0, "data": {"path": None}},
    "made": ("one", "two"),
    "calibration": {"method": "min-max"},
    "parity": {"passed": True, "max_abs": None},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pth and best.onnx; to be read only."""
    folder = tmp_path_factory.mktemp("good")
    path = saved(folder, "vit")
    graph = exported(load(path).model(), file_sha256(path))
    (folder / "best.onnx").write_bytes(graph.SerializeToString())
    return folder


@pytest.mark.parametrize(
    ("name", "break_source"),
    [
        pytest.param("gone.pth", lambda path: None, id="missing"),
        pytest.param("folder.pth", Path.mkdir, id="folder"),
        pytest.param("pipe.onnx", os.mkfifo, id="pipe"),
        pytest.param("best.engine", Path.touch, id="engine"),
        pytest.param("best.pth", lambda path: os.truncate(path, 5000), id="truncated_checkpoint"),
        pytest.param("best.onnx", lambda path: os.truncate(path, 5000), id="truncated_graph"),
        pytest.param("best.onnx", lambda path: sidecar(path).write_text("no json"), id="sidecar"),
    ],
)
def test_a_broken_source_is_refused(
    name: str, break_source: Callable[[Path], object], good: Path, tmp_path: Path, capsys: Capture
) -> None:
    """One error that names the file and what to do; nothing is written."""
    path = shutil.copytree(good, tmp_path / "folder") / name
    break_source(path)
    with nothing_changes(path.parent):
        problem = refused(capsys, onnx_command.main, path, "--precision", "fp16").splitlines()[0]
    assert str(path) in problem


@pytest.mark.parametrize(
    ("main", "words"),
    [
        *[(onnx_command.main, words) for words in ("--precision int4", "--limit x", "--tolerance much", "--batch 1")],
        *[(trt.main, f"--batch {sizes}") for sizes in ("0,1,2", "8,1,64", "1,8", "1,8,64,128", "a,b,c", "")],
    ],
)
def test_a_bad_argument_is_refused(main: Callable[[], None], words: str, good: Path, capsys: Capture) -> None:
    with nothing_changes(good):
        assert words.split(" ")[0] in refused(capsys, main, good / "best.pth", *words.split(" "))


# -- disks, with a graph that was exported before


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount a file system of so many bytes (rounded up to pages), which takes root; else skip the test."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.usefixtures("exported_before")
@pytest.mark.parametrize(("graphs", "artifacts"), [(0.5, []), (1.5, ["best.onnx"])])
def test_a_full_disk_keeps_whole_artifacts_only(
    graphs: float, artifacts: list[str], good: Path, tmp_path: Path, capsys: Capture
) -> None:
    """With room for so many graphs, whatever has its final name is whole, and nothing else remains."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: no engine can be built here")
    size, graph = (good / "best.pth").stat().st_size, (good / "best.onnx").stat().st_size
    with small_disk(tmp_path / "disk", size + 8192 + int(graphs * graph)) as disk:
        shutil.copy(good / "best.pth", disk)
        err = refused(capsys, trt.main, disk / "best.pth", "--backend", "rtx", "--limit", 5)
        assert err.startswith(f"error: cannot write into {disk}: No space left on device")
        assert names(disk) == [*artifacts, *(f"{name}.json" for name in artifacts), "best.pth"]
        for name in artifacts:
            assert read_sidecar(disk / name).sha256 == file_sha256(disk / name)


@pytest.mark.usefixtures("exported_before")
def test_a_read_only_folder_is_refused(good: Path, tmp_path: Path, capsys: Capture) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        shutil.copy(good / "best.pth", disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        err = refused(capsys, onnx_command.main, disk / "best.pth", "--limit", 5)
        assert err.startswith(f"error: cannot write into {disk}: Read-only file system")


@pytest.mark.usefixtures("exported_before")
@pytest.mark.parametrize("name", ["best.onnx", "best.onnx.json"])
def test_a_folder_with_the_name_of_the_artifact_stays(name: str, good: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copy(good / "best.pth", tmp_path)
    (tmp_path / name / "mine").mkdir(parents=True)
    with nothing_changes(tmp_path):
        err = refused(capsys, onnx_command.main, tmp_path / "best.pth", "--limit", 5)
    assert err.startswith("error: cannot write into ")


# -- sidecars


def test_a_sidecar_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = ExportedModel(**FIELDS)
    sidecar(tmp_path / "best.engine").write_bytes(sidecar_json(model))
    assert names(tmp_path) == ["best.engine.json"]
    assert read_sidecar(tmp_path / "best.engine") == model
    with pytest.raises(ValueError, match="JSON"):  # JSON has no NaN
        sidecar_json(replace(model, parity={"max_abs": float("nan")}))


HOSTILE: dict[str, list[Any]] = {
    "parent": ["../best.onnx", "/etc/passwd", "", ".", "..", "a/b", "a\0b", 5, None],
    "parent_sha256": ["short", None],
    "sha256": ["short", 7, "a" * 63, "\x1b" * 64, None],
    "checkpoint_sha256": ["x", None],
    "bytes": ["5", 5.0, True, None],
    "kind": ["program", ["onnx"], None],
    "precision": ["fp64", {"a": 1}, None],
    "batch": [[1], [0, 1, 2], [1, 2, 3.5], "123", [True, 2, 3], 5, None],
    "made": [5, None],
    "built_with": [[], "x", None, [["backend", 1]]],
    "data": [[], 5],
    "parity": [[], 5],
    "calibration": [[], 5],
    "spec": [{}, [], None, "x"],
    "fer_dist_artifact": [2, "1", None, {}],
}
NOT_JSON = [b"", b"\xff\xfe", b"{", b"[" * 10**5, b"1" * 5000, b" " * (2**20 + 1), b"null", b'"x"']


def test_a_hostile_sidecar_is_refused(tmp_path: Path) -> None:
    path, plain = tmp_path / "best.engine", ExportedModel(**FIELDS).to_dict()
    changed = [plain | {field: value} for field, values in HOSTILE.items() for value in values]
    shorter = [{name: value for name, value in plain.items() if name != field} for field in HOSTILE]
    for raw in (*NOT_JSON, *(json.dumps(content).encode() for content in changed + shorter)):
        sidecar(path).write_bytes(raw)
        with pytest.raises(UserError, match="is not a description of an artifact"):
            read_sidecar(path)


def test_a_sidecar_that_is_not_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.engine"
    with pytest.raises(UserError, match="cannot read"):
        read_sidecar(path)
    os.mkfifo(sidecar(path))
    for read in (lambda: read_sidecar(path), lambda: file_sha256(sidecar(path))):
        with pytest.raises(UserError, match="no regular file"):
            read()
