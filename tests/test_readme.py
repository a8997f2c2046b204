"""Every command of the README is run as typed, with small data in place of FER2013 and small models.

`make demo` itself is marked slow; `make test` is what runs this file.
"""

import os
import re
import shlex
import shutil
import subprocess
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
from tests.helpers.synthetic_scenes import scene

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() if line]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
SHORT = (
    "--train.epochs 1 --train.steps_per_epoch 2 --train.global_batch 8 --data.embedded_train 140 --data.embedded_val 28"
)
ENCODER = "--model.image_size 64 --model.options.hidden_size 32 --model.options.num_attention_heads 2"
DEPTH = "--model.options.num_hidden_layers 4 --model.options.intermediate_size 64"
TINY = {"vit": f"{ENCODER} {DEPTH}", "vit_mae": f"{ENCODER} {DEPTH} --train.micro_batch 4"}


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


def run(words: list[str], folder: Path, timeout: float = 240) -> str:
    """Run a command of this environment in a folder; returns what it printed, and checks that it succeeded."""
    tool = Path(sys.executable).parent / words[0]  # an absolute path stays as it is
    words = [str(tool) if tool.exists() else words[0], *words[1:]]
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False, env={**os.environ, "CI": "1"}
    )
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shortened(command: str) -> list[str]:
    """The command with small models and few steps, where it trains; nothing of it is taken away.

    A model of two steps answers one class, more or less: other precisions are told to pass all the same.
    """
    if "--precision" in command and "export" in command:
        return shlex.split(f"{command} --tolerance agreement=0,accuracy=1,kl=9 --calibration 16")
    if "tune.search" in command and "--resume" not in command:
        return shlex.split(f"{command} {SHORT} --trials 2 --model.pretrained false --model.image_size 48 --cpus 2")
    if "fer_dist.train" not in command or "--help" in command or "--print-config" in command:
        return shlex.split(command)
    config = re.search(r"--config (\w+)", command)
    short = SHORT.replace("--train.epochs 1", "--train.epochs 2") if "--run.resume" in command else SHORT
    tiny = TINY.get(config[1], "") if config else ""
    return shlex.split(f"{command} {short} --model.pretrained false {tiny}")


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if not c.startswith("make") and all(x not in c for x in ("--nnodes", "pytest", "slurm/"))],
)
def test_command(command: str, folder: Path) -> None:
    if re.search(r" best\.(pth|onnx)", command) and not (folder / "best.pth").exists():
        shutil.copy(folder / "runs" / "small" / "best.pth", folder)
    if "fer_dist.calibrate" in command:  # a model of two steps has no best temperature
        checkpoint = load(folder / "best.pth")
        pictures = open_data(checkpoint.config, checkpoint.spec, str(folder / "archive.zip"), print).validation()
        save(folder / "best.pth", replace(checkpoint, weights=too_sure(checkpoint, pictures)))
    printed = run(shortened(command), folder)
    if "fer_dist.train" in command and "--help" not in command and "--print-config" not in command:
        assert "best validation accuracy" in printed
        assert ("embedded drawn faces" in printed) == ("--data" not in command)
    else:
        assert printed


def test_two_nodes(folder: Path) -> None:
    """The line for two nodes, as two agents on loopback, one rank each."""
    command = next(c for c in COMMANDS if "--nnodes=2" in c)
    here = command.replace("node1:29500", "127.0.0.1:29563").replace("--nproc_per_node=4", "--nproc_per_node=1")
    words = [*shortened(here), "--run.name", "two-nodes"]
    words[0] = str(Path(sys.executable).with_name(words[0]))
    agents = [subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(2)]
    printed = [agent.communicate(timeout=240)[0].decode() for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert sum("2 ranks on cpu" in text for text in printed) == 1, printed  # rank 0 speaks, once


@pytest.mark.parametrize("snippet", [snippet for snippet in SNIPPETS if "tensorrt" not in snippet])
def test_snippet(snippet: str, folder: Path) -> None:
    printed = run([sys.executable, "-c", snippet], folder)
    assert re.search(r"^\S+ [01]\.\d+$", printed, re.M)


@pytest.mark.gpu
def test_tensorrt_snippet(folder: Path) -> None:
    pytest.importorskip("tensorrt")
    (snippet,) = (snippet for snippet in SNIPPETS if "tensorrt" in snippet)
    assert "device='cuda:0'" in run([sys.executable, "-c", snippet], folder)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_knows_the_command(command: str) -> None:
    assert run(["make", "-n", *command.split()[1:]], ROOT)


@pytest.mark.slow
def test_demo_passes_90_percent() -> None:
    printed = run(["make", "demo"], ROOT, timeout=900)
    accuracy = re.search(r"best validation accuracy ([\d.]+)%", printed)
    assert accuracy
    assert float(accuracy[1]) > 90


def test_every_file_has_its_line() -> None:
    """The README's tree names every file of the packages."""
    files = [p for package in ("fer_dist", "export", "tune") for p in (ROOT / package).rglob("*.py")]
    tree = README[README.index("## Files") :]
    missing = [p.name for p in files if p.name != "__init__.py" and f"{p.name}" not in tree]
    assert not missing


def test_no_gap_is_left() -> None:
    """A line of capitals stands for something that was to be written later."""
    assert not re.findall(r"^[A-Z]+_[A-Z_]+$", README, re.M)
