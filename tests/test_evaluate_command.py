"""`python -m fer_dist.evaluate`: what it prints, writes and refuses, for all kinds of artifacts, on 1 to 3 ranks."""

import json
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.answers import ask
from fer_dist.console import SPLIT_CODES
from fer_dist.engine.checkpoint import load, save, write_safetensors
from fer_dist.engine.metrics import wilson
from fer_dist.errors import EXIT_USER_ERROR
from fer_dist.evaluate import main
from fer_dist.serve.artifact import file_sha256
from fer_dist.serve.runner import open_runner
from fer_dist.spec import EXPRESSIONS, InputSpec, LabelSet
from tests.conftest import ROOT
from tests.helpers.artifacts import engine
from tests.helpers.exporting import command, content, drawn, exported, nothing_changes, saved
from tests.helpers.processes import torchrun

HOSTILE = ("<script>alert(1)<", "\"><img src='http:", "$\\frac{", "\u202egnp.exe", "怒り", "{{ 7*7 }}", "&amp;")
"""Class names that would do something where they are not escaped."""


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, raw: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(raw.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def require_harmless(self) -> None:
        """Raise AssertionError if anything in it could run, or be loaded from elsewhere."""
        known = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "table", "thead"}
        known |= {"tbody", "tr", "th", "td", "b", "i", "br", "small", "span", "figure", "figcaption", "img"}
        assert {tag for tag, _ in self.tags} <= known
        plain = {"class", "style", "alt", "src", "lang", "charset", "http-equiv", "content", "name", "scope"}
        assert {name for _, attributes in self.tags for name in attributes} <= plain
        sources = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        assert sources
        assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
        assert "url(" not in "".join(attributes.get("style") or "" for _, attributes in self.tags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best.pth, best.onnx and other.pth, which answers otherwise; all of patt_lite, judged on 140 drawn faces."""
    folder = tmp_path_factory.mktemp("evaluate")
    path = saved(folder, "patt_lite")
    checkpoint = load(path)
    (folder / "best.onnx").write_bytes(exported(checkpoint.model(), file_sha256(path)).SerializeToString())
    weights = {n: v.flip(0) if n.endswith("classifier.weight") else v for n, v in checkpoint.weights.items()}
    save(folder / "other.pth", replace(checkpoint, weights=weights))
    return folder


def report_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def test_one_checkpoint(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its accuracy is that of export.parity; the report has all that is promised."""
    out = tmp_path / "new" / "report"
    assert command(main, folder / "best.pth", "--out", out, "--mistakes", 9) == 0
    printed = capsys.readouterr().out
    report = report_of(out)
    assert sorted(content(out)) == ["report.html", "report.json"]
    model = load(folder / "best.pth").model()
    pictures = drawn(model)
    with open_runner(folder / "best.pth") as runner:
        right = int((ask(runner, pictures).by_picture().argmax(1) == pictures.labels_N).sum())
    assert (report["accuracy"], report["count"]) == (right / 140, 140)
    assert report["accuracy_interval_95"] == pytest.approx(wilson(right / 140, 140))
    assert (report["accuracy_clean"], report["count_clean"]) == (right / 140, 140)  # drawn faces have no copies
    (one,) = report["artifacts"]
    assert np.array(one["confusion"]).sum() == 140
    assert np.trace(one["confusion"]) == right
    assert list(one["classes"]) == list(EXPRESSIONS)
    assert sum(one["calibration"]["count"]) == 140
    assert len(one["calibration"]["count"]) == 15
    assert (one["kind"], one["precision"], one["arch"]) == ("pth", "fp32", "patt_lite")
    sure = [mistake["confidence"] for mistake in one["mistakes"]]
    assert len(sure) == 9
    assert sure == sorted(sure, reverse=True)
    assert all(mistake["true"] != mistake["predicted"] for mistake in one["mistakes"])
    assert report["comparisons"] == []
    assert f"{100 * right / 140:.2f}%" in printed
    assert "\x1b" not in printed
    assert "..." not in printed, "nothing is cut off where there is no terminal"
    assert "…" not in printed
    page = Page((out / "report.html").read_bytes())
    page.require_harmless()
    assert "Grad-CAM" in page.text
    answered = len({row.index(max(row)) for row in one["confusion"] if sum(row)})
    assert answered
    images = sum(tag == "img" for tag, _ in page.tags)
    assert images >= 1 + 2 * 9  # the diagram, and each mistake with its heat map


def test_without_out_nothing_is_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with nothing_changes(folder):
        assert command(main, folder / "best.pth") == 0
    assert "--out DIR writes the report" in capsys.readouterr().out


def test_several_artifacts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [folder / "best.pth", folder / "best.onnx", folder / "other.pth"]
    assert command(main, *paths, "--out", tmp_path) == 0
    report = report_of(tmp_path)
    assert [one["artifact"] for one in report["artifacts"]] == [str(path) for path in paths]
    first, same, other = report["artifacts"]
    assert first["confusion"] == same["confusion"]
    assert first["confusion"] != other["confusion"]
    assert report["accuracy"] == first["accuracy"]
    same_test, other_test, _ = report["comparisons"]
    assert (same_test["only_first"], same_test["only_second"], same_test["p"]) == (0, 0, 1.0)
    gained = other_test["only_first"] - other_test["only_second"]
    assert gained == round(140 * (first["accuracy"] - other["accuracy"]))
    assert other_test["only_first"] > 0
    assert other_test["p"] <= other_test["p_holm"]
    printed = capsys.readouterr().out
    assert "McNemar p 1 (exact binomial)" in printed
    assert "class, best.onnx " in printed
    page = Page((tmp_path / "report.html").read_bytes())
    page.require_harmless()
    assert page.text.count("Grad-CAM") == 4  # mistakes and right answers of the two checkpoints
    assert page.text.count("attention over its patches") == 2  # those of the ONNX file


def test_other_forms(folder: Path, tmp_path: Path) -> None:
    """Safetensors give the same; a transformer is explained by rollout; a backbone of timm by nothing."""
    write_safetensors(tmp_path / "best.safetensors", load(folder / "best.pth"))
    assert command(main, tmp_path / "best.safetensors", folder / "best.pth", "--out", tmp_path / "a") == 0
    first, second = report_of(tmp_path / "a")["artifacts"]
    assert first["confusion"] == second["confusion"]
    saved(tmp_path, "vit", "vit.pth")
    assert command(main, tmp_path / "vit.pth", "--out", tmp_path / "b") == 0
    assert "attention rollout" in Page((tmp_path / "b" / "report.html").read_bytes()).text
    saved(tmp_path, "timm:resnet18", "timm.pth")
    assert command(main, tmp_path / "timm.pth", "--out", tmp_path / "c") == 0
    assert "where it looked" not in Page((tmp_path / "c" / "report.html").read_bytes()).text


@pytest.mark.parametrize("tta", ["flip", "ten_crop"])
def test_augmentation(tta: str, folder: Path, tmp_path: Path) -> None:
    assert command(main, folder / "best.pth", "--out", tmp_path / "plain") == 0
    assert command(main, folder / "best.pth", folder / "best.onnx", "--tta", tta, "--out", tmp_path / "tta") == 0
    plain, augmented = report_of(tmp_path / "plain"), report_of(tmp_path / "tta")
    assert augmented["tta"] == tta
    assert augmented["loss"] != plain["loss"]
    first, second = augmented["artifacts"]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)


def test_the_same_numbers_on_any_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    """Bit for bit: report.json of 1, 2 and 3 ranks, batches that do not divide evenly, both kinds of runners."""
    words = ["-m", "fer_dist.evaluate", str(folder / "best.pth"), str(folder / "best.onnx"), "--tta", "flip"]
    words += ["--batch", "32", "--threads", "1", "--device", "cpu", "--provider", "cpu", "--out"]
    for ranks in (1, 2, 3):
        done = torchrun(ranks, *words, str(tmp_path / str(ranks))).ok()
        assert done.out.count("wrote ") == 1, "rank 0 speaks, once"
    one, two, three = ((tmp_path / str(ranks) / "report.json").read_bytes() for ranks in (1, 2, 3))
    assert one == two == three
    assert (tmp_path / "1" / "report.html").read_bytes() == (tmp_path / "3" / "report.html").read_bytes()


def test_an_error_is_told_once_by_two_ranks(folder: Path) -> None:
    done = torchrun(2, "-m", "fer_dist.evaluate", str(folder / "gone.pth"))
    assert done.code != 0
    assert done.err.count("error: ") == 1
    assert "gone.pth" in done.err


# -- copies, splits, data


def data_folder(root: Path, parts: dict[str, list[tuple[str, int]]]) -> Path:
    """Class folders of noise; `parts`: name of the part -> class and seed of each picture."""
    marks = {"train": "Training", "val": "PublicTest", "test": "PrivateTest"}
    for part, pictures in parts.items():
        for place, (label, seed) in enumerate(pictures):
            image = np.random.default_rng(seed).integers(0, 256, (48, 48), dtype=np.uint8)
            path = root / ("train" if part == "train" else "test") / label / f"{marks[part]}_{part}{place}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


def test_copies_are_left_out_once_more(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Picture 1 is in train, val and test; 2 in val and test: test's clean part leaves out both, val's the first."""
    parts = {
        "train": [("angry", 1), ("sad", 11)],
        "val": [("angry", 1), ("fear", 2), ("happy", 3), ("happy", 3)],
        "test": [("sad", 1), ("fear", 2), ("happy", 4), ("neutral", 5), ("sad", 6)],
    }
    data = data_folder(tmp_path / "data", parts)
    for split, whole, clean in (("val", 4, 3), ("test", 5, 3)):
        out = tmp_path / split
        assert command(main, folder / "best.pth", "--data", data, "--split", split, "--out", out) == 0
        report = report_of(out)
        assert (report["split"], report["count"], report["count_clean"]) == (split, whole, clean)
        page = Page((out / "report.html").read_bytes())
        assert f"{whole - clean} of {whole} pictures have an exact copy" in page.text


def test_the_training_part_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    alone = data_folder(tmp_path / "alone", {"test": [("angry", 1), ("fear", 2), ("sad", 6)]})
    words = [folder / "best.pth", "--data", alone, "--split", "test", "--out", tmp_path / "out"]
    assert command(main, *words) == 0
    report = report_of(tmp_path / "out")
    assert (report["accuracy_clean"], report["count_clean"]) == (None, None)
    assert any("--train-data" in note for note in report["notes"])
    assert "not known" in Page((tmp_path / "out" / "report.html").read_bytes()).text
    parts = {"train": [("angry", 1), ("sad", 7)], "val": [("fear", 2)], "test": [("sad", 6)]}
    trained = data_folder(tmp_path / "trained", parts)
    assert command(main, *words, "--train-data", trained) == 0
    assert report_of(tmp_path / "out")["count_clean"] == 1  # test parts train nobody


def test_every_picture_is_a_copy(folder: Path, tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", {"train": [("angry", 1)], "val": [("angry", 1)]})
    assert command(main, folder / "best.pth", "--data", data, "--out", tmp_path / "out") == 0
    report = report_of(tmp_path / "out")
    assert (report["count"], report["accuracy_clean"]) == (1, None)


def test_another_held_out_part_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two models trained with different seeds have different validation parts of the same folder."""
    data = data_folder(
        tmp_path / "data", {"train": [(label, 10 * i + j) for i, label in enumerate(EXPRESSIONS) for j in range(5)]}
    )
    saved(tmp_path, "patt_lite", "other.pth", seed=5)
    assert command(main, folder / "best.pth", tmp_path / "other.pth", "--data", data) == 0
    told = capsys.readouterr().out
    assert "note: other.pth was not trained with this held-out validation part" in told
    assert "best.pth was not" not in told


def test_real_data(real_archive: Path, folder: Path, tmp_path: Path) -> None:
    assert command(main, folder / "best.pth", "--data", real_archive, "--batch", 256, "--out", tmp_path) == 0
    report = report_of(tmp_path)
    assert (report["count"], report["count_clean"]) == (3589, 3309)


# -- hostile names


def test_hostile_names(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of classes, files and the artifact: shown as text, and nothing more."""
    checkpoint = load(folder / "best.pth")
    path = tmp_path / "<b>best\x1b[31m.pth"
    save(path, replace(checkpoint, spec=replace(checkpoint.spec, labels=LabelSet(names=HOSTILE))))
    data = data_folder(tmp_path / "data", {"val": [(str(i), i) for i in range(7)]})
    for i, file in enumerate(sorted(data.rglob("*.png"))):
        file.rename(file.with_name(f"PublicTest_<img src=x onerror=alert({i})>\u202e.png"))
    assert command(main, path, "--data", data, "--out", tmp_path / "out") == 0
    raw = (tmp_path / "out" / "report.html").read_bytes()
    page = Page(raw)
    page.require_harmless()
    assert b"default-src 'none'" in raw
    for name in ("<script>alert(1)<", "\"><img src='http:", "$\\frac{", "怒り", "{{ 7*7 }}", "&amp;"):
        assert name in page.text
    assert "<img src=x onerror=alert(0)>" in page.text
    assert "\u202e" not in raw.decode()
    printed = capsys.readouterr().out
    assert "\x1b" not in printed + (tmp_path / "out" / "report.json").read_text()
    assert "\u202e" not in printed
    assert list(report_of(tmp_path / "out")["artifacts"][0]["classes"]) == list(HOSTILE)


def test_many_classes(folder: Path, tmp_path: Path) -> None:
    """A model of 60 classes: no matrix that nobody could read."""
    checkpoint = load(folder / "best.pth")
    weights = {
        n: v.repeat(9, *[1] * (v.ndim - 1))[:60] if "classifier" in n else v for n, v in checkpoint.weights.items()
    }
    labels = LabelSet(names=tuple(f"class{i}" for i in range(60)))
    save(tmp_path / "many.pth", replace(checkpoint, spec=replace(checkpoint.spec, labels=labels), weights=weights))
    data = data_folder(tmp_path / "data", {"val": [(f"class{i}", i) for i in range(60)]})
    assert command(main, tmp_path / "many.pth", "--data", data, "--out", tmp_path / "out") == 0
    assert "too many for a matrix" in Page((tmp_path / "out" / "report.html").read_bytes()).text


# -- the run beside a checkpoint


def test_training_curves(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.pth").write_bytes((folder / "best.pth").read_bytes())
    epochs = [
        {"epoch": e, "lr": 1e-3, "train_loss": 2.0 / e, "val": {"loss": 1.9, "accuracy": 0.1 * e, "macro_f1": 0.1}}
        for e in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    assert command(main, run / "best.pth", "--out", tmp_path / "out") == 0
    page = Page((tmp_path / "out" / "report.html").read_bytes())
    assert "training curves" in [attributes.get("alt") for _, attributes in page.tags]
    assert f"The run in {run}" in page.text


@pytest.mark.parametrize(
    "text",
    [
        "nonsense\n",
        "[1]\n",
        '{"epoch": 1, "lr": NaN, "train_loss": 1, "val": {"loss": 1, "accuracy": 1, "macro_f1": 1}}\n',
        '{"epoch": "<script>", "lr": 1, "train_loss": 1, "val": {"loss": 1, "accuracy": 1, "macro_f1": 1}}\n',
        '{"epoch": 1, "lr": 1, "train_loss": 1e300, "val": {"loss": 1, "accuracy": 1, "macro_f1": 1}}\n',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_damaged_curves_cost_a_sentence(text: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "best.pth").write_bytes((folder / "best.pth").read_bytes())
    (tmp_path / "metrics.jsonl").write_text(text, encoding="latin-1")
    assert command(main, tmp_path / "best.pth", "--out", tmp_path / "out") == 0
    page = Page((tmp_path / "out" / "report.html").read_bytes())
    page.require_harmless()
    assert "is no history of a run" in page.text
    assert "training curves" not in [attributes.get("alt") for _, attributes in page.tags]


# -- what is refused


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run the command, which must fail with one clear error; what it says."""
    assert command(main, *words) == EXIT_USER_ERROR
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert "\n  -> " in err
    return err


def test_bad_arguments(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = folder / "best.pth"
    (tmp_path / "file").touch()
    for words, told in (
        (["--data", tmp_path / "nothing.csv", "--split", "train"], "--split"),
        ([best, "--split", "train"], "--split"),
        ([best, "--tta", "twelve"], "--tta"),
        ([best, "--batch", "0"], "--batch"),
        ([best, "--batch", "99999"], "at most 65536"),
        ([best, "--mistakes", "9999"], "at most 65536 and 1000"),
        ([best, "--unknown"], "--unknown"),
        ([folder / "gone.pth"], "gone.pth"),
        ([tmp_path / "file"], ".pth"),
        ([best, "--data", tmp_path / "nothing.csv"], "does not exist"),
        ([best, "--train-data", tmp_path / "nothing.csv"], "does not exist"),
        ([best, "--split", "test", "--data", data_folder(tmp_path / "v", {"val": [("sad", 1)]})], "test part is empty"),
        ([best, "--out", tmp_path / "file"], "cannot write"),
        ([best, "--out", tmp_path / "file" / "deeper"], "cannot write"),
    ):
        with nothing_changes(folder):
            assert told in refused(capsys, *words), words


def test_models_that_do_not_go_together(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = load(folder / "best.pth")
    labels = replace(checkpoint.spec, labels=LabelSet(names=tuple(sorted(EXPRESSIONS))))
    save(tmp_path / "labels.pth", replace(checkpoint, spec=labels))
    size = replace(checkpoint.spec, input=InputSpec(size=32, image_size=48))
    save(tmp_path / "size.pth", replace(checkpoint, spec=size))
    told = refused(capsys, folder / "best.pth", tmp_path / "labels.pth", "--out", tmp_path / "out")
    assert "has the labels angry, disgust, fear, happy, neutral" in told
    assert "takes pictures of 32 pixels" in refused(capsys, folder / "best.pth", tmp_path / "size.pth")
    assert content(tmp_path / "out") == {}


def test_data_that_are_gone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No drawn faces in place of those that the model was made for: their accuracy would say nothing."""
    saved(tmp_path, "patt_lite", "moved.pth", data__path="/nowhere/fer2013.csv")
    told = refused(capsys, tmp_path / "moved.pth")
    assert "/nowhere/fer2013.csv, its data, is not here" in told
    assert "--data PATH" in told
    assert "nothing says what the model was judged on" in refused(capsys, folder / "best.onnx")


def test_answers_that_are_no_numbers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = load(folder / "best.pth")
    weights = {n: v * 3e38 if "classifier.weight" in n else v for n, v in checkpoint.weights.items()}
    save(tmp_path / "spoilt.pth", replace(checkpoint, weights={n: v.clamp(-3e38, 3e38) for n, v in weights.items()}))
    told = refused(capsys, tmp_path / "spoilt.pth", "--out", tmp_path / "out")
    assert "pictures with NaN or infinity" in told
    assert content(tmp_path / "out") == {}


def test_a_gpu_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice names an option of this command."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    told = refused(capsys, folder / "best.pth", "--device", "cuda")
    assert "no CUDA device is visible\n  -> --device cpu " in told


def test_an_engine_without_a_gpu(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    told = refused(capsys, engine(tmp_path, b"engine", built_with={"backend": "rtx"}))
    assert "TensorRT-RTX" in told


HELP = """
import runpy, sys
sys.argv = ["evaluate", "--help"]
try:
    runpy.run_module("fer_dist.evaluate", run_name="__main__")
except SystemExit:
    print("heavy:", *{"torch", "numpy", "matplotlib", "jinja2"} & set(sys.modules))
"""


def test_help_is_quick() -> None:
    """No torch for it."""
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "heavy:"
    assert "--train-data" in done.stdout


def test_split_codes() -> None:
    from fer_dist.data.faces import SPLITS

    assert {name: SPLITS.index(name) for name in SPLIT_CODES} == SPLIT_CODES
