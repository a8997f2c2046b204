"""The wheel: its files, its requirements, that it works away from the repository; optional packages and extras."""

import ast
import email
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import fer_dist
from fer_dist.errors import UserError
from fer_dist.extras import require
from tests.conftest import ROOT
from tests.test_import_order import MODULES, PACKAGES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked; built offline from a copy, so that no earlier build/ lends it files and the tree stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "fer_dist" / "assets").mkdir(exist_ok=True)  # the model that ships may not be there yet
    (source / "fer_dist" / "assets" / "MODEL_CARD.md").touch()
    for other in ("tune_runs", "tests"):  # the first: a folder of results with a tempting name
        (source / other).mkdir()
        (source / other / "__init__.py").touch()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w"]
    done = subprocess.run([*pip, str(folder), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_it_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    kinds = ("**/*.py", "**/*.yaml", "**/py.typed")
    paths = (path for package in PACKAGES for kind in kinds for path in (ROOT / package).glob(kind))
    sources = {path.relative_to(ROOT).as_posix() for path in paths}
    (information,) = wheel.glob("*.dist-info")
    assert {path.name for path in wheel.iterdir()} == {*PACKAGES, information.name}
    held = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*")}
    assert {name for name in held if Path(name).suffix in (".py", ".yaml", ".typed")} == sources
    assert "fer_dist/assets/MODEL_CARD.md" in held
    assert (information / "licenses" / "LICENSE").exists()


def test_it_works_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r}); import fer_dist, export, tune; print(fer_dist.__file__); "
        "[fer_dist.load_config(name) for name in ('demo', 'vit', 'patt_lite', 'vit_mae')]"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(wheel / "fer_dist" / "__init__.py")


def test_version_license_and_requirements(wheel: Path) -> None:
    metadata = email.message_from_bytes(next(wheel.glob("*.dist-info/METADATA")).read_bytes())
    assert metadata["Version"] == fer_dist.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    pythons = SpecifierSet(metadata["Requires-Python"])
    assert [version for version in ("3.10", "3.11", "3.12", "3.13") if version in pythons] == ["3.11", "3.12"]
    assert set(metadata.get_all("Provides-Extra", [])) >= {"tensorrt", "tensorrt-rtx", "dev"}
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    # torch below 2.10 and onnx below 1.21 read files unsafely (docs/decisions/0002-dependencies.md).
    floors = {r.name: r.specifier for r in requirements}
    assert [version for version in ("2.9.1", "2.10.0") if version in floors["torch"]] == ["2.10.0"]
    assert "1.20.0" not in floors["onnx"]
    # onnxruntime-gpu has wheels for two platforms and for no other.
    for system, machine, wanted in (
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
        ("win32", "ARM64", "onnxruntime"),
    ):
        place = {"sys_platform": system, "platform_machine": machine, "extra": ""}
        found = [r.name for r in requirements if r.marker is None or r.marker.evaluate(place)]
        assert [name for name in found if name.startswith("onnxruntime")] == [wanted]
        assert {"torch", "torchvision", "transformers", "timm", "onnx", "onnxscript", "ray", "pyyaml"} <= set(found)
        assert not {name for name in found if name.startswith("tensorrt")}


def test_the_constraints_are_allowed() -> None:
    """Every version of constraints.txt satisfies pyproject.toml."""
    asked = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert {"torch", "torchvision"} <= {pin.name for pin in pins}
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert pin.name not in asked or exact.version in asked[pin.name].specifier


def test_scripts_and_public_names_have_a_home() -> None:
    homes = [f"{module}:{name}" for name, module in fer_dist._HOMES.items()]
    for module, name in (home.split(":") for home in (*homes, *PROJECT["scripts"].values())):
        assert hasattr(import_module(module), name), name
    assert {*fer_dist._HOMES, "__version__"} == set(fer_dist.__all__)
    assert isinstance(fer_dist.load_config(), fer_dist.Config)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        fer_dist.nothing  # noqa: B018


# -- packages that not every machine can have


def test_a_missing_or_broken_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = "is installed but does not load: "
    for name, source, problem in (
        ("missing", "", "the package 'fer_dist_missing' is not installed"),
        ("broken_a", "raise OSError('libnvinfer.so.11: cannot open shared object file')", f"{broken}libnvinfer.so.11"),
        ("broken_b", "raise ImportError('undefined symbol: x')", f"{broken}undefined symbol"),
        ("broken_c", "import fer_dist_no_such_library", f"{broken}No module named 'fer_dist_no_such_library'"),
    ):
        if source:
            (tmp_path / f"fer_dist_{name}.py").write_text(source, encoding="utf-8")
        with pytest.raises(UserError, match=problem) as caught:
            require(f"fer_dist_{name}", extra="tensorrt")
        assert "pip install 'fer-dist[tensorrt]'" in caught.value.fix


def test_every_extra_that_the_code_names_exists() -> None:
    assert require("json", extra="none") is sys.modules["json"]
    nodes = (node for path in MODULES.values() for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("require")]
    named = {word.value.value for call in calls for word in call.keywords if isinstance(word.value, ast.Constant)}
    assert {"tensorrt"} <= named <= set(PROJECT["optional-dependencies"])
