"""`python -m fer_dist.evaluate`: what it prints, writes and refuses, for all kinds of artifacts, on 1 to 3 ranks."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.answers import ask
from fer_dist.engine.checkpoint import load, save, write_safetensors
from fer_dist.engine.metrics import wilson
from fer_dist.evaluate import main
from fer_dist.serve.artifact import file_sha256
from fer_dist.serve.htmlreport import history
from fer_dist.serve.runner import open_runner
from fer_dist.spec import EXPRESSIONS, InputSpec, LabelSet
from tests.helpers.artifacts import engine
from tests.helpers.commands import Capture, data_folder, refused
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
        tags = "html head meta title style body h1 h2 h3 p div table thead tbody tr th td b i br small span figure img"
        assert {tag for tag, _ in self.tags} <= {*tags.split(), "figcaption"}
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


def judged(out: Path, *words: object) -> tuple[dict[str, Any], Page]:
    """Run the command, which must succeed, and return its report and its page, which must be harmless."""
    assert command(main, *words, "--out", out) == 0
    assert sorted(content(out)) == ["report.html", "report.json"]
    page = Page((out / "report.html").read_bytes())
    page.require_harmless()
    return json.loads((out / "report.json").read_text()), page


def test_one_checkpoint(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """Its accuracy is that of export.parity; the report has all that is promised."""
    report, page = judged(tmp_path / "new" / "report", folder / "best.pth", "--mistakes", 9)
    printed = capsys.readouterr().out
    pictures = drawn(load(folder / "best.pth").model())
    with open_runner(folder / "best.pth") as runner:
        right = int((ask(runner, pictures).by_picture().argmax(1) == pictures.labels_N).sum())
    assert (report["accuracy"], report["count"]) == (right / 140, 140)
    assert report["accuracy_interval_95"] == pytest.approx(wilson(right / 140, 140))
    assert (report["accuracy_clean"], report["count_clean"]) == (right / 140, 140)  # drawn faces have no copies
    assert report["comparisons"] == []
    (one,) = report["artifacts"]
    assert (np.sum(one["confusion"]), np.trace(one["confusion"])) == (140, right)
    assert list(one["classes"]) == list(EXPRESSIONS)
    assert (sum(one["calibration"]["count"]), len(one["calibration"]["count"])) == (140, 15)
    assert (one["kind"], one["precision"], one["arch"]) == ("pth", "fp32", "patt_lite")
    sure = [mistake["confidence"] for mistake in one["mistakes"]]
    assert len(sure) == 9
    assert sure == sorted(sure, reverse=True)
    assert all(mistake["true"] != mistake["predicted"] for mistake in one["mistakes"])
    assert f"{100 * right / 140:.2f}%" in printed
    assert not re.search("\x1b|…|\\.\\.\\.", printed), "nothing is cut off where there is no terminal"
    assert "Grad-CAM" in page.text
    assert sum(tag == "img" for tag, _ in page.tags) >= 1 + 2 * 9  # the diagram, and each mistake with its heat map


def test_several_artifacts(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    paths = [folder / "best.pth", folder / "best.onnx", folder / "other.pth"]
    report, page = judged(tmp_path, *paths)
    assert [one["artifact"] for one in report["artifacts"]] == [str(path) for path in paths]
    first, same, other = report["artifacts"]
    assert first["confusion"] == same["confusion"] != other["confusion"]
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
    assert page.text.count("Grad-CAM") == 4  # mistakes and right answers of the two checkpoints
    assert page.text.count("attention over its patches") == 2  # those of the ONNX file


def test_views_of_a_picture_are_averaged_alike_for_both_kinds_of_files(folder: Path, tmp_path: Path) -> None:
    report, _ = judged(tmp_path, folder / "best.pth", folder / "best.onnx", "--tta", "ten_crop")
    assert report["tta"] == "ten_crop"
    assert report["artifacts"][0]["loss"] == pytest.approx(report["artifacts"][1]["loss"], rel=1e-5)


def test_other_architectures(folder: Path, tmp_path: Path) -> None:
    """Also as safetensors: a transformer is explained by rollout, a backbone of timm by nothing."""
    write_safetensors(tmp_path / "vit.safetensors", load(saved(tmp_path, "vit", "vit.pth")))
    assert "attention rollout" in judged(tmp_path / "a", tmp_path / "vit.safetensors")[1].text
    assert "where it looked" not in judged(tmp_path / "b", saved(tmp_path, "timm:resnet18", "timm.pth"))[1].text


def test_the_same_numbers_on_any_number_of_ranks(folder: Path, tmp_path: Path) -> None:
    """Bit for bit: reports of 1 and 3 ranks, batches that do not divide evenly, both kinds of runners."""
    words = ["-m", "fer_dist.evaluate", str(folder / "best.pth"), str(folder / "best.onnx"), "--tta", "flip"]
    words += ["--batch", "32", "--threads", "1", "--device", "cpu", "--provider", "cpu", "--out"]
    for ranks in (1, 3):
        done = torchrun(ranks, *words, str(tmp_path / str(ranks))).ok()
        assert done.out.count("wrote ") == 1, "rank 0 speaks, once"
    assert content(tmp_path / "1") == content(tmp_path / "3")
    first, second = json.loads((tmp_path / "1" / "report.json").read_text())["artifacts"]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)


def test_copies_are_left_out_once_more(folder: Path, tmp_path: Path) -> None:
    """Picture 1 is in train, val and test; 2 in val and test: test's clean part leaves out both, val's the first."""
    parts = {
        "train": [("angry", 1), ("sad", 11)],
        "val": [("angry", 1), ("fear", 2), ("happy", 3), ("happy", 3)],
        "test": [("sad", 1), ("fear", 2), ("happy", 4), ("neutral", 5), ("sad", 6)],
    }
    data, out = data_folder(tmp_path / "data", parts), tmp_path / "out"
    for split, whole, clean in (("val", 4, 3), ("test", 5, 3)):
        report, page = judged(out, folder / "best.pth", "--data", data, "--split", split)
        assert (report["split"], report["count"], report["count_clean"]) == (split, whole, clean)
        assert f"{whole - clean} of {whole} pictures have an exact copy" in page.text
    data = data_folder(tmp_path / "only", {"train": [("angry", 1)], "val": [("angry", 1)]})
    report, _ = judged(out, folder / "best.pth", "--data", data)
    assert (report["count"], report["accuracy_clean"]) == (1, None)


def test_the_training_part_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    alone = data_folder(tmp_path / "alone", {"test": [("angry", 1), ("fear", 2), ("sad", 6)]})
    out, words = tmp_path / "out", [folder / "best.pth", "--data", alone, "--split", "test"]
    report, page = judged(out, *words)
    assert (report["accuracy_clean"], report["count_clean"]) == (None, None)
    assert any("--train-data" in note for note in report["notes"])
    assert "not known" in page.text
    parts = {"train": [("angry", 1), ("sad", 7)], "val": [("fear", 2)], "test": [("sad", 6)]}
    report, _ = judged(out, *words, "--train-data", data_folder(tmp_path / "trained", parts))
    assert report["count_clean"] == 1  # test parts train nobody


def test_another_held_out_part_is_noted_and_nothing_is_written_without_out(
    folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Two models trained with different seeds have different validation parts of the same folder."""
    data = data_folder(
        tmp_path / "data", {"train": [(label, 10 * i + j) for i, label in enumerate(EXPRESSIONS) for j in range(5)]}
    )
    saved(tmp_path, "patt_lite", "other.pth", seed=5)
    with nothing_changes(folder), nothing_changes(tmp_path):
        assert command(main, folder / "best.pth", tmp_path / "other.pth", "--data", data) == 0
    printed = capsys.readouterr().out
    assert "note: other.pth was not trained with this held-out validation part" in printed
    assert "best.pth was not" not in printed
    assert "--out DIR writes the report" in printed


@pytest.mark.slow
def test_real_data(real_archive: Path, folder: Path, tmp_path: Path) -> None:
    report, _ = judged(tmp_path, folder / "best.pth", "--data", real_archive, "--batch", 256)
    assert (report["count"], report["count_clean"]) == (3589, 3309)


def test_hostile_names(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """Of classes, files and the artifact: shown as text, and nothing more."""
    checkpoint = load(folder / "best.pth")
    path = tmp_path / "<b>best\x1b[31m.pth"
    save(path, replace(checkpoint, spec=replace(checkpoint.spec, labels=LabelSet(names=HOSTILE))))
    data = data_folder(tmp_path / "data", {"val": [(str(i), i) for i in range(7)]})
    for i, file in enumerate(sorted(data.rglob("*.png"))):
        file.rename(file.with_name(f"PublicTest_<img src=x onerror=alert({i})>\u202e.png"))
    report, page = judged(tmp_path / "out", path, "--data", data)
    raw = (tmp_path / "out" / "report.html").read_text()
    assert "default-src 'none'" in raw
    assert all(name in page.text for name in HOSTILE if "\u202e" not in name)
    assert "<img src=x onerror=alert(0)>" in page.text
    printed = capsys.readouterr().out
    assert "\u202e" not in raw + printed
    assert "\x1b" not in printed + (tmp_path / "out" / "report.json").read_text()
    assert list(report["artifacts"][0]["classes"]) == list(HOSTILE)


def test_many_classes(folder: Path, tmp_path: Path) -> None:
    """A model of 60 classes: no matrix that nobody could read."""
    checkpoint = load(folder / "best.pth")
    weights = dict(checkpoint.weights)
    weights |= {n: torch.cat([v] * 9)[:60] for n, v in weights.items() if "classifier" in n}
    labels = LabelSet(names=tuple(f"class{i}" for i in range(60)))
    save(tmp_path / "many.pth", replace(checkpoint, spec=replace(checkpoint.spec, labels=labels), weights=weights))
    data = data_folder(tmp_path / "data", {"val": [(f"class{i}", i) for i in range(60)]})
    assert "too many for a matrix" in judged(tmp_path / "out", tmp_path / "many.pth", "--data", data)[1].text


# -- the run beside a checkpoint


def test_training_curves(folder: Path, tmp_path: Path) -> None:
    """A damaged history costs a sentence."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "best.pth").write_bytes((folder / "best.pth").read_bytes())
    line = '{"epoch": 1, "lr": 1, "train_loss": 1, "val": {"loss": 1, "accuracy": 1, "macro_f1": 1}}\n'
    for text, curves, words in ((line * 3, 1, f"The run in {run}"), ("nonsense\n", 0, "is no history of a run")):
        (run / "metrics.jsonl").write_text(text)
        _, page = judged(tmp_path / "out", run / "best.pth")
        assert [attributes.get("alt") for _, attributes in page.tags].count("training curves") == curves
        assert words in page.text
    changes = (('"lr": 1', '"lr": NaN'), ('"epoch": 1', '"epoch": "<script>"'), ('s": 1, "v', 's": 1e300, "v'))
    for text in ("[1]\n", *(line.replace(*change) for change in changes), "[" * 100_000, "\x00\xff"):
        (run / "metrics.jsonl").write_text(text, encoding="latin-1")
        records, problem = history(run / "best.pth")
        assert records == []
        assert "is no history of a run" in problem
        assert "\x00" not in problem


def test_bad_arguments_are_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    best = folder / "best.pth"
    (tmp_path / "file").touch()
    cases: list[tuple[list[object], str]] = [
        ([best, "--split", "train"], "--split"),
        ([best, "--tta", "twelve"], "--tta"),
        ([best, "--batch", "0"], "--batch"),
        ([best, "--batch", "99999"], "at most 65536"),
        ([best, "--mistakes", "9999"], "at most 65536 and 1000"),
        ([folder / "gone.pth"], "gone.pth"),
        ([tmp_path / "file"], ".pth"),
        ([best, "--data", tmp_path / "nothing.csv"], "does not exist"),
        ([best, "--split", "test", "--data", data_folder(tmp_path / "v", {"val": [("sad", 1)]})], "test part is empty"),
        ([best, "--train-data", tmp_path / "nothing.csv"], "does not exist"),
        ([best, "--out", tmp_path / "file"], "cannot write"),
        ([best, "--out", tmp_path / "file" / "deeper"], "cannot write"),
    ]
    if not torch.cuda.is_available():
        # The fix names an option of this command.
        cases.append(([best, "--device", "cuda"], "no CUDA device is visible\n  -> --device cpu "))
        cases.append(([engine(tmp_path, b"engine", built_with={"backend": "rtx"})], "TensorRT-RTX"))
    for words, message in cases:
        with nothing_changes(folder):
            assert message in refused(capsys, main, *words), words


def test_bad_models_are_refused(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """Other labels, another size, NaN; no drawn faces replace data that are gone: their accuracy would say nothing."""
    best, out = folder / "best.pth", tmp_path / "out"
    checkpoint = load(best)
    labels = replace(checkpoint.spec, labels=LabelSet(names=tuple(sorted(EXPRESSIONS))))
    size = replace(checkpoint.spec, input=InputSpec(size=32, image_size=48))
    huge = {n: (v * 3e38).clamp(-3e38, 3e38) if "classifier.weight" in n else v for n, v in checkpoint.weights.items()}
    save(tmp_path / "labels.pth", replace(checkpoint, spec=labels))
    save(tmp_path / "size.pth", replace(checkpoint, spec=size))
    save(tmp_path / "huge.pth", replace(checkpoint, weights=huge))
    saved(tmp_path, "patt_lite", "moved.pth", data__path="/nowhere/fer2013.csv")
    for words, message in (
        ([best, tmp_path / "labels.pth"], "has the labels angry, disgust, fear, happy, neutral"),
        ([best, tmp_path / "size.pth"], "takes pictures of 32 pixels"),
        ([tmp_path / "huge.pth"], "pictures with NaN or infinity"),
        ([tmp_path / "moved.pth"], "/nowhere/fer2013.csv, its data, is not here"),
        ([folder / "best.onnx"], "nothing says what the model was judged on"),
    ):
        assert message in refused(capsys, main, *words, "--out", out), words
    assert content(out) == {}
