"""The reading order: a file imports only files above it in ORDER.

Also here: which file may name which package. A new file must be given its place in ORDER.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fer_dist
from tests.conftest import ROOT

PACKAGES = ("fer_dist", "export", "tune")


def below(package: str, names: str) -> tuple[str, ...]:
    """Return the dotted names of modules of one package."""
    return tuple(f"{package}.{name}" for name in names.split())


# plain Python: no torch
PLAIN = (
    "fer_dist",
    *below("fer_dist", "errors spec options config commandline console extras archives pickles"),
)
PARTS = (
    *below("fer_dist", "device world tensors data"),
    *below("fer_dist.data", "faces drawing synthetic sheet gathering tables decoding parquet pictures readers"),
    *below("fer_dist.data", "copies split cache audit quality augment feed"),
    *below("fer_dist.models", "freeze base weights folders hf patt_lite vit vit_mae timm_backbone"),
    *below("fer_dist", "models engine"),
    *below("fer_dist.engine", "metrics calibration temperature significance optim form checkpoint start history"),
    *below("fer_dist.engine", "describe plots runlog watch same rundir"),
)
WHOLES = (
    *below("fer_dist.engine", "score state step run trainer"),
    "fer_dist.serve",
    *below("fer_dist.serve", "artifact onnxshapes onnxfile replay ortsession engine runner dataset explain exam"),
    *below("fer_dist.serve", "evaluation htmlreport photos faces predictor shipped overlay listing records"),
    *below("fer_dist.serve", "measured viewer pagehtml page"),
)
COMMANDS = below("fer_dist", "train evaluate audit checkpoint calibrate launch predict app")
EXPORT = ("export", *below("export", "console graph rewrite calibrate float16 int8 precision answers gate source"))
EXPORT += below("export", "delivery engines maker pipeline")
EXPORT_COMMANDS = below("export", "onnx trt parity bench")
TUNE = ("tune", *below("tune", "words ledger settings space spacefile group trial cluster tpe driver scale"))
TUNE += below("tune", "pictures table report board asked")
ENTRIES = (*COMMANDS, *EXPORT_COMMANDS, "tune.search")
ORDER = (*PLAIN, *PARTS, *WHOLES, *COMMANDS, *EXPORT, *EXPORT_COMMANDS, *TUNE, "tune.search")

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
                top = alias.name.split(".")[0]
                local[alias.asname or top] = alias.name if alias.asname else top
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


def upward(module: str, source: str) -> list[str]:
    """What in a module's source breaks the order, one line each."""
    wrong = []
    for line, name in named(source):
        head, _, last = name.rpartition(".")
        if head == "fer_dist" and last in fer_dist._HOMES:  # `from fer_dist import fit` is the trainer
            name = fer_dist._HOMES[last]
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
        home = next((known for known in prefixes if known in ORDER), None)
        if home is None or home == module:
            continue
        if ORDER.index(home) > ORDER.index(module):
            wrong.append(f"{module}, line {line} names {home}, which comes below {module}")
        elif home in ENTRIES:
            wrong.append(f"{module}, line {line} names {home}, which is an entry: nobody imports it")
    return wrong


def misplaced(module: str, source: str) -> list[str]:
    """What a module names although another is its only home, one line each."""
    return [
        f"{module}, line {line} names {name}: {package} belongs to {', '.join(homes)}"
        for line, name in named(source)
        for package, homes in ONLY_IN.items()
        if f"{name}.".startswith(f"{package}.") and not f"{module}.".startswith(tuple(f"{home}." for home in homes))
    ]


def test_every_file_has_its_place() -> None:
    assert len(set(ORDER)) == len(ORDER)
    assert [name for name in MODULES if name not in ORDER] == [], "give each new file its place in ORDER"
    assert [name for name in ORDER if name not in MODULES] == [], "ORDER lists files that are gone"


def test_imports_only_files_above_and_packages_in_their_files() -> None:
    """`fer_dist/__init__.py` is an exception: its lazy table names homes of every height."""
    sources = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    assert [line for name, source in sources.items() if name != "fer_dist" for line in upward(name, source)] == []
    assert [line for name, source in sources.items() for line in misplaced(name, source)] == []


def test_plain_files_load_no_torch() -> None:
    """A wrong setting is refused before torch is imported, and a script gets `Config` without torch."""
    heavy = {"torch", "numpy", "matplotlib", "pyarrow", "PIL"}
    code = f"import sys, {', '.join(PLAIN)}; fer_dist.Config, fer_dist.UserError; print(set(sys.modules) & {heavy})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_every_spelling_of_an_import_is_seen() -> None:
    for module, source in (
        ("fer_dist.options", "def f():\n    from fer_dist.config import Config\n"),
        ("fer_dist.data.faces", "from fer_dist import data\nx = data.cache.load\n"),
        ("fer_dist.data.cache", "from fer_dist import fit\n"),
        ("export", "import fer_dist.train\n"),
        ("fer_dist.world", "import importlib\nimportlib.import_module('fer_dist.engine.trainer')\n"),
    ):
        assert upward(module, source) != [], source
    assert upward("tune", "import fer_dist.engine.trainer as t\nfrom fer_dist.models.vit import build\n") == []
    for module, source in (
        ("fer_dist.engine.trainer", "import torch as t\nt.distributed.barrier()\n"),
        ("fer_dist.data.feed", "from torch import distributed as dist\n"),
        ("fer_dist.data.feed", "def f():\n    import torch.distributed.nn\n"),
        ("tune", "from fer_dist.extras import require\nrequire('tensorrt_rtx', extra='tensorrt-rtx')\n"),
        ("export", "from tune import space\n"),
    ):
        assert misplaced(module, source) != [], source
    assert misplaced("fer_dist.world", "import torch.distributed as dist\ndist.barrier()\n") == []
    assert misplaced("fer_dist.engine.trainer", "import torch\nrayon = torch.nn.Linear\n") == []
