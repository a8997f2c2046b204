"""Point 10: broken and hostile input of the export commands, full and read-only disks; JSON files of strangers."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from export import onnx as onnx_command
from export import trt
from fer_dist.engine.checkpoint import load
from fer_dist.errors import EXIT_USER_ERROR, UserError
from fer_dist.serve.artifact import ExportedModel, file_sha256, read_sidecar, sidecar, sidecar_json
from fer_dist.spec import ModelSpec
from tests.conftest import ROOT
from tests.helpers.exporting import command, content, exported, names, nothing_changes, saved, small_disk

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


def foreign(folder: Path, good: Path) -> Path:
    """ONNX, but not one of ours."""
    graph = onnx.load(good / "best.onnx")
    del graph.metadata_props[:]
    path = folder / "foreign.onnx"
    onnx.save(graph, path)
    return path


def outside(folder: Path, good: Path) -> Path:
    """Its weights are a file outside of its folder."""
    graph = onnx.load(good / "best.onnx")
    tensor = max(graph.graph.initializer, key=lambda t: len(t.raw_data))
    (folder.parent / "secret").write_bytes(tensor.raw_data)
    onnx.external_data_helper.set_external_data(tensor, "../secret")
    tensor.ClearField("raw_data")
    path = folder / "outside.onnx"
    path.write_bytes(graph.SerializeToString())
    return path


def truncated(name: str) -> Callable[[Path, Path], Path]:
    def make(folder: Path, good: Path) -> Path:
        raw = (good / name).read_bytes()
        path = folder / f"cut{Path(name).suffix}"
        path.write_bytes(raw[: len(raw) // 2])
        return path

    return make


def bytes_of(name: str, raw: bytes) -> Callable[[Path, Path], Path]:
    def make(folder: Path, good: Path) -> Path:
        path = folder / name
        path.write_bytes(raw)
        return path

    return make


def pipe(folder: Path, good: Path) -> Path:
    """Which nobody writes into."""
    os.mkfifo(folder / "best.onnx")
    return folder / "best.onnx"


def with_json(text: str) -> Callable[[Path, Path], Path]:
    """best.onnx with a JSON file beside it."""

    def make(folder: Path, good: Path) -> Path:
        shutil.copy(good / "best.onnx", folder)
        (folder / "best.onnx.json").write_text(text)
        return folder / "best.onnx"

    return make


BROKEN: dict[str, Callable[[Path, Path], Path]] = {
    "missing": lambda folder, good: folder / "best.pth",
    "missing.onnx": lambda folder, good: folder / "best.onnx",
    "folder": lambda folder, good: folder,
    "folder.pth": lambda folder, good: shutil.copytree(good, folder / "best.pth"),
    "another suffix": bytes_of("best.txt", b"hello"),
    "an engine": bytes_of("best.engine", b"hello"),
    "no checkpoint": bytes_of("best.pth", b"hello" * 100),
    "empty": bytes_of("best.pth", b""),
    "empty.onnx": bytes_of("best.onnx", b""),
    "truncated": truncated("best.pth"),
    "truncated.onnx": truncated("best.onnx"),
    "no ONNX": bytes_of("best.onnx", b"hello" * 100),
    "foreign": foreign,
    "outside": outside,
    "pipe": pipe,
    "json: none": with_json("no json"),
    "json: deep": with_json("[" * 100_000),
    "json: a list": with_json("[]"),
    "json: another": with_json('{"fer_dist_artifact": 99}'),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("main", [onnx_command.main, trt.main], ids=["onnx", "trt"])
def test_broken_input(
    main: Callable[[], None], what: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One error, the exit code of errors, and the folder as it was."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = BROKEN[what](folder, good)
    before = names(folder)
    words = ["--backend", "rtx"] if main is trt.main else []
    assert command(main, path, *words) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert "\n  -> " in err
    assert str(path) in err
    assert names(folder) == before


@pytest.mark.parametrize("module", ["export.onnx", "export.trt"])
def test_as_a_person_starts_it(module: str, good: Path, tmp_path: Path) -> None:
    """No traceback, no warning, the right exit code."""
    line = [sys.executable, "-m", module, str(truncated("best.pth")(tmp_path, good))]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 2
    assert names(tmp_path) == ["cut.pth"]


@pytest.mark.parametrize(
    "words", [["--precision", "int4"], ["--limit", "x"], ["--tolerance", "much"], ["--batch", "1"]]
)
def test_arguments(words: list[str], good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_changes(good):
        assert command(onnx_command.main, good / "best.pth", *words) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("batch", ["0,1,2", "8,1,64", "1,8", "1,8,64,128", "a,b,c", ""])
def test_batches(batch: str, good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_changes(good):
        assert command(trt.main, good / "best.pth", "--batch", batch) == EXIT_USER_ERROR
    assert "--batch" in capsys.readouterr().err


# -- disks, with a graph that was exported before


@pytest.mark.usefixtures("exported_before")
@pytest.mark.parametrize("more", [0, 0.5, 1.05, 1.5, 2.2, 3.0])
def test_a_full_disk(more: float, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real one, with room for so many graphs: what has its name is whole, and there is nothing else."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: no engine can be built here")
    size, graph = (good / "best.pth").stat().st_size, (good / "best.onnx").stat().st_size
    with small_disk(tmp_path / "disk", size + 8192 + int(more * graph)) as disk:
        shutil.copy(good / "best.pth", disk)
        code = command(trt.main, disk / "best.pth", "--backend", "rtx", "--limit", 5)
        err = capsys.readouterr().err
        found = set(names(disk))
        artifacts = {name for name in found if not name.endswith(".json")} - {"best.pth"}
        assert artifacts <= {"best.onnx", "best.engine"}
        assert found == {"best.pth"} | artifacts | {f"{name}.json" for name in artifacts}
        for name in artifacts:
            assert read_sidecar(disk / name).sha256 == file_sha256(disk / name)
        if code:
            assert code == EXIT_USER_ERROR
            assert err.startswith("error: cannot write into ")
            assert "No space left on device" in err
            assert err.count("error: ") == 1
        assert bool(code) == (artifacts != {"best.onnx", "best.engine"})
        if more == 0:
            assert not artifacts
        if more == 1.5:
            assert artifacts == {"best.onnx"}


@pytest.mark.usefixtures("exported_before")
def test_a_folder_that_cannot_be_written(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        shutil.copy(good / "best.pth", disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert command(onnx_command.main, disk / "best.pth", "--limit", 5) == EXIT_USER_ERROR
        err = capsys.readouterr().err
        assert err.startswith(f"error: cannot write into {disk}: Read-only file system")
        assert err.count("error: ") == 1
        assert names(disk) == ["best.pth"]


@pytest.mark.usefixtures("exported_before")
@pytest.mark.parametrize("name", ["best.onnx", "best.onnx.json"])
def test_a_folder_where_the_artifact_goes(
    name: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(good / "best.pth", tmp_path)
    (tmp_path / name / "mine").mkdir(parents=True)
    with nothing_changes(tmp_path):
        assert command(onnx_command.main, tmp_path / "best.pth", "--limit", 5) == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("error: cannot write into ")


# -- JSON files


def test_a_sidecar_comes_back(tmp_path: Path) -> None:
    told = ExportedModel(**FIELDS)
    sidecar(tmp_path / "best.engine").write_bytes(sidecar_json(told))
    assert names(tmp_path) == ["best.engine.json"]
    assert read_sidecar(tmp_path / "best.engine") == told
    plain = json.loads((tmp_path / "best.engine.json").read_text())
    assert plain["contract"]["labels"] == list(told.spec.labels.names)
    with pytest.raises(ValueError, match="JSON"):  # NaN is none
        sidecar_json(replace(told, parity={"max_abs": float("nan")}))
    assert names(tmp_path) == ["best.engine.json"]


HOSTILE: dict[str, Any] = {
    "parent": ["../best.onnx", "/etc/passwd", "", ".", "..", "a/b", "a\0b", 5, None],
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


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in HOSTILE for value in HOSTILE[field]])
def test_a_hostile_sidecar(field: str, value: object, tmp_path: Path) -> None:
    plain = ExportedModel(**FIELDS).to_dict()
    path = tmp_path / "best.engine"
    sidecar(path).write_text(json.dumps(plain | {field: value}))
    with pytest.raises(UserError, match="is not a description of an artifact"):
        read_sidecar(path)
    del plain[field]
    sidecar(path).write_text(json.dumps(plain))
    with pytest.raises(UserError, match="is not a description of an artifact"):
        read_sidecar(path)


@pytest.mark.parametrize(
    "raw", [b"", b"\xff\xfe", b"{", b"[" * 10**5, b"1" * 5000, b" " * (2**20 + 1), b"null", b'"x"']
)
def test_a_sidecar_that_is_none(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "best.engine"
    sidecar(path).write_bytes(raw)
    with pytest.raises(UserError, match="is not a description of an artifact"):
        read_sidecar(path)


def test_a_sidecar_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "best.engine"
    with pytest.raises(UserError, match="cannot read"):
        read_sidecar(path)
    os.mkfifo(sidecar(path))
    with pytest.raises(UserError, match="no regular file"):
        read_sidecar(path)
    with pytest.raises(UserError, match="no regular file"):
        file_sha256(sidecar(path))
    sidecar(path).unlink()
    sidecar(path).mkdir()
    with pytest.raises(UserError, match="no regular file"):
        read_sidecar(path)
    assert content(tmp_path) == {"best.engine.json/": b""}
