"""The reading order: a file imports only files above it in ORDER.

Also here: which file may name which package. A new file must be given its place in ORDER.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fer_dist

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("fer_dist", "export", "tune")

ORDER = (
    # plain Python: no torch
    "fer_dist",
    "fer_dist.errors",
    "fer_dist.spec",
    "fer_dist.options",
    "fer_dist.config",
    "fer_dist.commandline",
    "fer_dist.console",
    "fer_dist.extras",
    "fer_dist.archives",
    "fer_dist.pickles",
    # parts
    "fer_dist.device",
    "fer_dist.world",
    "fer_dist.tensors",
    "fer_dist.data",
    "fer_dist.data.faces",
    "fer_dist.data.drawing",
    "fer_dist.data.synthetic",
    "fer_dist.data.sheet",
    "fer_dist.data.gathering",
    "fer_dist.data.tables",
    "fer_dist.data.decoding",
    "fer_dist.data.parquet",
    "fer_dist.data.pictures",
    "fer_dist.data.readers",
    "fer_dist.data.copies",
    "fer_dist.data.split",
    "fer_dist.data.cache",
    "fer_dist.data.audit",
    "fer_dist.data.quality",
    "fer_dist.data.augment",
    "fer_dist.data.feed",
    "fer_dist.models.freeze",
    "fer_dist.models.base",
    "fer_dist.models.weights",
    "fer_dist.models.folders",
    "fer_dist.models.hf",
    "fer_dist.models.patt_lite",
    "fer_dist.models.vit",
    "fer_dist.models.vit_mae",
    "fer_dist.models.timm_backbone",
    "fer_dist.models",
    "fer_dist.engine",
    "fer_dist.engine.metrics",
    "fer_dist.engine.calibration",
    "fer_dist.engine.temperature",
    "fer_dist.engine.significance",
    "fer_dist.engine.optim",
    "fer_dist.engine.form",
    "fer_dist.engine.checkpoint",
    "fer_dist.engine.start",
    "fer_dist.engine.history",
    "fer_dist.engine.describe",
    "fer_dist.engine.plots",
    "fer_dist.engine.runlog",
    "fer_dist.engine.watch",
    "fer_dist.engine.same",
    "fer_dist.engine.rundir",
    # wholes
    "fer_dist.engine.score",
    "fer_dist.engine.state",
    "fer_dist.engine.step",
    "fer_dist.engine.run",
    "fer_dist.engine.trainer",
    "fer_dist.serve",
    "fer_dist.serve.artifact",
    "fer_dist.serve.onnxshapes",
    "fer_dist.serve.onnxfile",
    "fer_dist.serve.replay",
    "fer_dist.serve.ortsession",
    "fer_dist.serve.engine",
    "fer_dist.serve.runner",
    "fer_dist.serve.dataset",
    "fer_dist.serve.explain",
    "fer_dist.serve.exam",
    "fer_dist.serve.evaluation",
    "fer_dist.serve.htmlreport",
    "fer_dist.serve.photos",
    "fer_dist.serve.faces",
    "fer_dist.serve.predictor",
    "fer_dist.serve.shipped",
    "fer_dist.serve.overlay",
    "fer_dist.serve.listing",
    "fer_dist.serve.records",
    "fer_dist.serve.measured",
    "fer_dist.serve.viewer",
    "fer_dist.serve.pagehtml",
    "fer_dist.serve.page",
    # entries
    "fer_dist.train",
    "fer_dist.evaluate",
    "fer_dist.audit",
    "fer_dist.checkpoint",
    "fer_dist.calibrate",
    "fer_dist.launch",
    "fer_dist.predict",
    "fer_dist.app",
    # beside fer_dist: they import it, never each other
    "export",
    "export.console",
    "export.graph",
    "export.rewrite",
    "export.calibrate",
    "export.float16",
    "export.int8",
    "export.precision",
    "export.answers",
    "export.gate",
    "export.source",
    "export.delivery",
    "export.engines",
    "export.maker",
    "export.pipeline",
    "export.onnx",
    "export.trt",
    "export.parity",
    "export.bench",
    "tune",
    "tune.words",
    "tune.ledger",
    "tune.settings",
    "tune.space",
    "tune.spacefile",
    "tune.group",
    "tune.trial",
    "tune.cluster",
    "tune.tpe",
    "tune.driver",
    "tune.scale",
    "tune.pictures",
    "tune.table",
    "tune.report",
    "tune.board",
    "tune.asked",
    "tune.search",
)

PLAIN = ORDER[: ORDER.index("fer_dist.device")]
ENTRIES = (
    "fer_dist.train",
    "fer_dist.evaluate",
    "fer_dist.audit",
    "fer_dist.checkpoint",
    "fer_dist.calibrate",
    "fer_dist.launch",
    "fer_dist.predict",
    "fer_dist.app",
    "export.onnx",
    "export.trt",
    "export.parity",
    "export.bench",
    "tune.search",
)

# A package, and the only modules (with what lies below them) that may name it.
ONLY_IN = {
    "torch.distributed": ("fer_dist.world", "fer_dist.launch"),  # the second is torchrun itself
    "ray": ("tune",),
    "gradio": ("fer_dist.serve.page",),
    "tensorrt": ("export.engines", "fer_dist.serve.engine", "fer_dist.serve.ortsession"),
    "tensorrt_rtx": ("export.engines", "fer_dist.serve.engine"),
    "tune": ("tune",),
    "export": ("export",),
}


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def named(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that is imported, at any depth, or reached through an import.

    `import torch` and `torch.distributed.init_process_group` further down yield "torch",
    "torch.distributed" and "torch.distributed.init_process_group"; so do other spellings of it.
    """
    tree = ast.parse(source)
    local: dict[str, str] = {}  # a name in this file -> the dotted name that it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
                local[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the whole name"
            for alias in node.names:
                local[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__", "require", "find_spec"):
                yield node.lineno, str(node.args[0].value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (chain := _chain(node)):
            head, _, rest = chain.partition(".")
            if head in local:
                yield node.lineno, f"{local[head]}.{rest}"


def _chain(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := _chain(node.value)):
        return f"{inner}.{node.attr}"
    return ""


def _below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def upward(module: str, source: str) -> list[str]:
    """What in a module's source breaks the order, one line each."""
    wrong = []
    for line, name in named(source):
        head, _, last = name.rpartition(".")
        if head == "fer_dist" and last in fer_dist._HOMES:  # `from fer_dist import fit` is the trainer
            name = fer_dist._HOMES[last]
        home = next((known for known in reversed(_prefixes(name)) if known in ORDER), None)
        if home is None or home == module:
            continue
        if ORDER.index(home) > ORDER.index(module):
            wrong.append(f"line {line} names {home}, which comes below {module}")
        elif home in ENTRIES:
            wrong.append(f"line {line} names {home}, which is an entry: nobody imports it")
    return wrong


def misplaced(module: str, source: str) -> list[str]:
    """What a module names although another is its only home, one line each."""
    return [
        f"line {line} names {name}: {package} belongs to {', '.join(homes)}"
        for line, name in named(source)
        for package, homes in ONLY_IN.items()
        if _below(name, package) and not any(_below(module, home) for home in homes)
    ]


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def test_every_file_has_its_place() -> None:
    assert len(set(ORDER)) == len(ORDER)
    assert [name for name in MODULES if name not in ORDER] == [], "give each new file its place in ORDER"
    assert [name for name in ORDER if name not in MODULES] == [], "ORDER lists files that are gone"


@pytest.mark.parametrize("module", [name for name in MODULES if name in ORDER and name != "fer_dist"])
def test_imports_only_files_above(module: str) -> None:
    """`fer_dist/__init__.py` is the exception: its lazy table names homes of every height."""
    assert upward(module, MODULES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("module", MODULES)
def test_packages_stay_in_their_files(module: str) -> None:
    assert misplaced(module, MODULES[module].read_text(encoding="utf-8")) == []


def test_plain_files_load_no_torch() -> None:
    """`--help` and a wrong setting answer before torch is imported."""
    heavy = ("torch", "numpy", "matplotlib", "pyarrow", "PIL")
    code = f"import sys, {', '.join(PLAIN)}; print(*sorted(set(sys.modules) & set({heavy})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fer_dist.options", "def f():\n    from fer_dist.config import Config\n"),
        ("fer_dist.data.faces", "import fer_dist.engine.trainer\n"),
        ("fer_dist.data.faces", "from fer_dist import data\nx = data.cache.load\n"),
        ("fer_dist.engine.trainer", "from fer_dist.models import vit\nfrom fer_dist import train\n"),
        ("fer_dist.data.cache", "from fer_dist import fit\n"),
        ("export", "import fer_dist.train\n"),
        ("fer_dist.world", "import importlib\nimportlib.import_module('fer_dist.engine.trainer')\n"),
    ],
)
def test_the_order_can_fail(module: str, source: str) -> None:
    assert len(upward(module, source)) >= 1
    assert upward("tune", "import fer_dist.engine.trainer as t\nfrom fer_dist.models.vit import build\n") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fer_dist.engine.trainer", "import torch\ntorch.distributed.barrier()\n"),
        ("fer_dist.engine.trainer", "import torch as t\nt.distributed.barrier()\n"),
        ("fer_dist.data.feed", "from torch import distributed as dist\n"),
        ("fer_dist.data.feed", "def f():\n    import torch.distributed.nn\n"),
        ("fer_dist.engine.trainer", "from ray import train\n"),
        ("tune", "from fer_dist.extras import require\nrequire('tensorrt_rtx', extra='tensorrt-rtx')\n"),
        ("tune", "import export.onnx\n"),
        ("export", "from tune import space\n"),
        ("fer_dist.spec", "import tune\n"),
    ],
)
def test_the_homes_can_fail(module: str, source: str) -> None:
    assert len(misplaced(module, source)) >= 1
    assert misplaced("fer_dist.world", "import torch.distributed as dist\ndist.barrier()\n") == []
    assert misplaced("fer_dist.engine.trainer", "import torch\nrayon = torch.nn.Linear\n") == []
