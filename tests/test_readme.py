"""Run every command of the README as typed, with small data in place of FER2013 and small models.

`make demo` itself is run by `.ci/run`.
"""

import re
import shlex
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fer_dist.data.synthetic import draw_faces
from fer_dist.engine.checkpoint import load, save
from fer_dist.serve.dataset import open_data
from fer_dist.spec import EXPRESSIONS
from tests.conftest import ROOT
from tests.helpers.exporting import too_sure
from tests.helpers.processes import TORCHRUN, Process, free_port
from tests.helpers.synthetic_scenes import scene

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
SHORT = (
    "--train.epochs 1 --train.steps_per_epoch 2 --train.global_batch 8 --data.embedded_train 140 --data.embedded_val 28"
)
ENCODER = "--model.image_size 64 --model.options.hidden_size 32 --model.options.num_attention_heads 2"
DEPTH = "--model.options.num_hidden_layers 4 --model.options.intermediate_size 64"
NARROW = "--model.options.cut 5 --model.options.width_mult 0.25"
TINY = {"": NARROW, "vit": f"{ENCODER} {DEPTH}", "vit_mae": f"{ENCODER} {DEPTH} --train.micro_batch 4"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, with a small fer2013.csv and archive.zip in it, and pictures."""
    folder = tmp_path_factory.mktemp("user")
    faces = draw_faces(105, 35, 0, seed=3)
    usage = ("Training", "PublicTest", "PrivateTest")
    with (folder / "fer2013.csv").open("w") as file:
        file.write("emotion,pixels,Usage\n")
        for image_HW, label, part in zip(faces.images_NHW, faces.labels_N, faces.usage_N, strict=True):
            file.write(f"{label},{' '.join(map(str, image_HW.ravel()))},{usage[part]}\n")
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        for i, (image_HW, label, part) in enumerate(zip(faces.images_NHW, faces.labels_N, faces.usage_N, strict=True)):
            with archive.open(f"{('train', 'test')[part]}/{EXPRESSIONS[label]}/{usage[part]}_{i}.png", "w") as file:
                Image.fromarray(np.asarray(image_HW)).save(file, format="png")
    for name in ("photos", "crops"):
        (folder / name).mkdir()
    drawn = Image.fromarray(scene([150, 100], 1).rgb_HW3)
    for name in ("photo.jpg", "photos/party.jpg"):
        drawn.save(folder / name)
    Image.fromarray(faces.images_NHW[0]).save(folder / "crops" / "1.png")
    return folder


def run(words: list[str], folder: Path, *, fresh: bool = False) -> str:
    """Run a command of this environment in a folder, require that it succeeds, and return its output."""
    launchers = {"python": [sys.executable], "torchrun": TORCHRUN}
    tool = Path(sys.executable).parent / words[0]
    command = launchers.get(words[0]) if not fresh else [str(tool)] if tool.exists() else None
    done = Process([*(command or words[:1]), *words[1:]], cwd=folder, env={"CI": "1"}, fresh=fresh).wait()
    assert done.code == 0, f"{shlex.join(words)}\n{done.out}\n{done.err}"
    return done.out


def shortened(command: str) -> list[str]:
    """The command with small models and few steps, where it trains; nothing of it is taken away.

    A model of two steps predicts nearly one class, so other precisions are given loose bounds.
    """
    if "--precision" in command and "export" in command:
        return shlex.split(f"{command} --tolerance agreement=0,accuracy=1,kl=9 --calibration 16")
    if "tune.search" in command and "--resume" not in command:
        return shlex.split(f"{command} {SHORT} --trials 1 --model.pretrained false --model.image_size 48 --cpus 1")
    if "fer_dist.train" not in command or "--help" in command or "--print-config" in command:
        return shlex.split(command)
    config = re.search(r"--config (\w+)", command)
    short = SHORT.replace("--train.epochs 1", "--train.epochs 2") if "--run.resume" in command else SHORT
    tiny = TINY.get(config[1] if config else "", "")
    return shlex.split(f"{command} {short} --model.pretrained false {tiny}")


@pytest.fixture
def output(request: pytest.FixtureRequest, folder: Path) -> str:
    """Run the command that is the parameter; here, since a search takes longer than a test may."""
    command = request.param
    if re.search(r" best\.(pth|onnx)", command) and not (folder / "best.pth").exists():
        shutil.copy(folder / "runs" / "small" / "best.pth", folder)
    if "fer_dist.calibrate" in command:  # a model of two steps has no best temperature
        checkpoint = load(folder / "best.pth")
        pictures = open_data(checkpoint.config, checkpoint.spec, str(folder / "archive.zip"), print).validation()
        save(folder / "best.pth", replace(checkpoint, weights=too_sure(checkpoint, pictures)))
    return run(shortened(command), folder, fresh=command in FRESH)


RUN = [c for c in COMMANDS if not c.startswith("make") and all(x not in c for x in ("--nnodes", "pytest", "slurm/"))]
FRESH = (RUN[0], next(c for c in RUN if c.startswith("python")))
"""Started by the real `torchrun` and `python`; the others are forked (tests/helpers/warm_python.py)."""


@pytest.mark.parametrize(("command", "output"), [(c, c) for c in RUN], ids=RUN, indirect=["output"])
def test_command(command: str, output: str) -> None:
    if "fer_dist.train" in command and "--help" not in command and "--print-config" not in command:
        assert "best validation accuracy" in output
        assert ("embedded drawn faces" in output) == ("--data" not in command)
    else:
        assert output


def test_two_nodes(folder: Path) -> None:
    """Run the line for two nodes as two agents on the loopback, one rank each."""
    command = next(c for c in COMMANDS if "--nnodes=2" in c)
    here = command.replace("node1:29500", f"127.0.0.1:{free_port()}").replace(
        "--nproc_per_node=4", "--nproc_per_node=1"
    )
    words = [*TORCHRUN, *shortened(here)[1:], "--run.name", "two-nodes"]
    agents = [Process(words, cwd=folder) for _ in range(2)]
    printed = [agent.wait().ok().out for agent in agents]
    assert sum("2 ranks on cpu" in text for text in printed) == 1, "rank 0 prints, once"


@pytest.mark.parametrize("snippet", [snippet for snippet in SNIPPETS if "tensorrt" not in snippet])
def test_snippet(snippet: str, folder: Path) -> None:
    printed = run(["python", "-c", snippet], folder)
    assert re.search(r"^\S+ [01]\.\d+$", printed, re.M)


@pytest.mark.gpu
def test_tensorrt_snippet(folder: Path) -> None:
    pytest.importorskip("tensorrt")
    (snippet,) = (snippet for snippet in SNIPPETS if "tensorrt" in snippet)
    assert "device='cuda:0'" in run(["python", "-c", snippet], folder)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_knows_the_command(command: str) -> None:
    assert run(["make", "-n", *command.split()[1:]], ROOT)


def test_every_file_has_its_line() -> None:
    """The README's tree names every file of the packages."""
    files = [p for package in ("fer_dist", "export", "tune") for p in (ROOT / package).rglob("*.py")]
    tree = README[README.index("## Files") :]
    missing = [p.name for p in files if p.name != "__init__.py" and f"{p.name}" not in tree]
    assert not missing


def test_no_gap_is_left() -> None:
    """A line of capitals stands for something that was to be written later."""
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$", README, re.M)
