"""The reader of tensors: what torch.save and safetensors write comes back, and nothing else reads such files."""

import ast
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fer_dist.tensors import NotTensors, read_tensors
from tests.conftest import ROOT
from tests.helpers.small_runs import same
from tests.test_import_order import named

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
]
NEW_DTYPES = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]


def back(content: Any, path: Path, legacy: bool = False) -> Any:
    """Saved and read again."""
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return read_tensors(path)


def test_every_type_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for dtype, legacy in [*((d, False) for d in (*DTYPES, *NEW_DTYPES)), *((d, True) for d in DTYPES)]:
        made: dict[str, Any] = {"x": torch.tensor([[0, 1, 2], [3, 1, 0]]).to(dtype), "dtype": dtype}
        found = back(made, path, legacy)
        assert found["dtype"] == found["x"].dtype == dtype
        assert same(found["x"].to(torch.complex128), made["x"].to(torch.complex128)), (dtype, legacy)


def checkpoint() -> dict[Any, Any]:
    """All that checkpoints hold: a model and its optimizer after a step, views, and plain values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    matrix = torch.rand(4, 6)
    return {
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "parameters": list(model.parameters()),
        "random": torch.get_rng_state(),
        "views": [matrix, matrix[1:, 2], matrix.t(), matrix[:0], torch.tensor(3.0), torch.rand(1).expand(5)],
        "plain": {"a": [1, -2, 2.5, None, True, "grün\ud800", 2**40, -(2**70)], "b": (), "c": ((1,), [])},
        "size": torch.Size([2, 3]),
        7: OrderedDict(b=1, a=2),
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_come_back_as_they_were(tmp_path: Path, legacy: bool) -> None:
    made = checkpoint()
    found = back(made, tmp_path / "x.pth", legacy)
    assert same(found, made)
    assert found["weights"]._metadata == made["weights"]._metadata
    assert found["weights"]["0.weight"].stride() == (27, 1, 9, 3), "channels_last"
    assert type(found["parameters"][0]) is nn.Parameter
    assert found["views"][1].untyped_storage().data_ptr() == found["views"][0].untyped_storage().data_ptr()


def test_what_it_is_goes_by_its_content(tmp_path: Path) -> None:
    made = {"x": torch.arange(3.0)}
    for suffix in ("pth", "safetensors", "bin", ""):
        for legacy in (False, True):
            assert same(back(made, tmp_path / f"x.{suffix}", legacy), made)
        save_file(made, tmp_path / f"x.{suffix}")
        assert same(read_tensors(str(tmp_path / f"x.{suffix}")), made)


def test_a_comment_behind_the_zip(tmp_path: Path) -> None:
    """The longest that there can be; where torch and zipfile take a part of it for the archive's end, it is refused."""
    path = tmp_path / "x.pth"
    torch.save(checkpoint(), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"x" * 65_535
    assert same(read_tensors(path), checkpoint())
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"x" * 100 + b"PK\5\6" + b"x" * 100
    with pytest.raises(NotTensors):
        read_tensors(path)


def test_values_that_our_checkpoints_never_hold_are_refused(tmp_path: Path) -> None:
    """As torch.save writes them; what it never writes: faults/test_hostile_pickles.py."""
    contents: list[tuple[Any, str]] = [
        ({"x": {1, 2}}, "it names __builtin__.set"),
        ({"x": torch.device("cpu")}, "it names torch.device"),
        ({"x": torch.zeros(2, 2).to_sparse()}, "it names torch"),
        ({"x": torch.zeros(2, dtype=torch.complex64).conj()}, "as torch.save does not"),
        ({"a\x1b[2J": OrderedDict}, r"a\?\[2J is neither a tensor nor a plain value"),
    ]
    for content, reason in contents:
        with pytest.raises(NotTensors, match=reason):
            back(content, tmp_path / "x.pth")


# -- no other place reads such files

HOME = "fer_dist/tensors.py"
LOADERS = ("torch.load", "safetensors.safe_open", "safetensors.torch.load_file")
"""Readers of tensors, which only HOME may name."""
UNSAFE = (
    *("torch.serialization", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.package"),
    *("timm.models.load_state_dict", "timm.models.load_checkpoint", "timm.models.resume_checkpoint"),
    *("safetensors.torch.load", "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "builtins"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader"),
)
"""Readers of tensors and functions that run code from a file, which no file may name."""


def unsafe(file: str, source: str) -> list[str]:
    """What in a source loads files in a way that only `fer_dist/tensors.py` may, or nobody; one line each."""
    wrong = [
        f"line {line} names {name}"
        for line, name in named(source)
        for loader in (*UNSAFE, *(LOADERS if file != HOME else ()))
        if name == loader or name.startswith(f"{loader}.")
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "__import__", "__builtins__"):
            wrong.append(f"line {node.lineno} uses {node.id}")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        given = {word.arg: word.value for word in node.keywords}
        if node.func.attr == "load" and not _is(given.get("weights_only"), True) and file == HOME:
            wrong.append(f"line {node.lineno}: a load without weights_only=True")
        if "allow_pickle" in given and not _is(given["allow_pickle"], False):
            wrong.append(f"line {node.lineno}: allow_pickle")
        if node.func.attr == "load" and len(node.args) > 2:
            wrong.append(f"line {node.lineno}: a load whose third argument may be allow_pickle or another unpickler")
    return wrong


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_files_are_loaded_in_one_place() -> None:
    paths = [path for part in ("fer_dist", "export", "tune", "benchmarks") for path in (ROOT / part).rglob("*.py")]
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    assert [(file, line) for file, source in found.items() for line in unsafe(file, source)] == []
    assert sum(name == "torch.load" for _, name in named(found[HOME])) == 1


def test_every_spelling_of_a_load_is_seen() -> None:
    for source in (
        "import torch\ntorch.load('x', weights_only=True)\n",
        "import torch as t\nload = t.load\n",
        "from torch.serialization import load\n",
        "from torch import hub\nhub.load('a', 'b')\n",
        "def f():\n    import pickle\n",
        "import importlib\nimportlib.import_module('pickle')\n",
        "import numpy as np\nnp.load('x', None, True)\n",
        "import numpy as np\nnp.load('x', allow_pickle=trusted)\n",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)\n",
        "from safetensors.torch import load_file\n",
        "run = exec\n",
    ):
        assert unsafe("fer_dist/engine/checkpoint.py", source) != [], source
    assert unsafe(HOME, "import torch\ntorch.load(file, map_location='cpu', weights_only=True)\n") == []
    assert unsafe(HOME, "import numpy as np\nimport yaml\nyaml.safe_load(text)\nmodel.eval()\n") == []
    for options in ("", ", weights_only=False", ", weights_only=safe", ", **options", ", None, pickle"):
        assert unsafe(HOME, f"import torch\ntorch.load(file{options})\n") != [], options
