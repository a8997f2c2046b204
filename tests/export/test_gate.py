"""The numbers of the gate against numpy, what it lets pass and what not, and the pictures that it compares on."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from export.answers import BATCHES, Answers, ask, batches
from export.gate import ParityReport, Tolerance, compare, show, tolerance_of
from fer_dist.errors import Rejected, UserError
from fer_dist.serve.artifact import Precision
from fer_dist.serve.dataset import Pictures, open_data
from fer_dist.spec import InputSpec, LabelSet, ModelSpec
from tests.helpers.exporting import SETTINGS, Live, lively

SPEC = ModelSpec(arch="vit")
FP32 = tolerance_of("fp32")


def answers(logits_NK: torch.Tensor, probabilities_NK: torch.Tensor | None = None) -> Answers:
    """Answers to pictures in their order, in batches of two and of three."""
    count = len(logits_NK)
    return Answers(
        rows_M=torch.arange(count),
        batch_M=torch.tensor([2, 2, 3, 3, 3] * count)[:count],
        logits_MK=logits_NK.float(),
        probabilities_MK=(logits_NK.softmax(1) if probabilities_NK is None else probabilities_NK).float(),
        count=count,
    )


def labelled(count: int, meaningful: bool = True) -> Pictures:
    """Pictures of nothing."""
    labels_N = torch.arange(count) % 7
    images_N1SS = torch.zeros(count, 1, 48, 48, dtype=torch.uint8)
    return Pictures(images_N1SS=images_N1SS, labels_N=labels_N, source="none", meaningful=meaningful, of=count)


def report_of(
    reference: torch.Tensor | Answers,
    candidate: torch.Tensor | Answers,
    tolerance: Tolerance = FP32,
    pictures: Pictures | None = None,
) -> ParityReport:
    first, second = (answers(x) if isinstance(x, torch.Tensor) else x for x in (reference, candidate))
    return compare(first, second, pictures or labelled(first.count), tolerance, names=("a", "b"))


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


ONE_CLASS = 0.1 * noise(500) + 9 * torch.eye(7)[3]


def test_the_numbers_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    wanted = (3 * random.normal(size=(50, 7))).astype(np.float32)
    found = (wanted + 0.3 * random.normal(size=(50, 7))).astype(np.float32)
    report = report_of(torch.from_numpy(wanted), torch.from_numpy(found))
    a, b = wanted.astype(np.float64), found.astype(np.float64)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b))
    labels, size = np.arange(50) % 7, np.array([2, 2, 3, 3, 3] * 10)
    expected = {
        "max_abs": np.abs(b - a).max(),
        "mean_abs": np.abs(b - a).mean(),
        "relative": np.abs(b - a).max() / a.std(ddof=1),
        "probability_max_abs": np.abs(q - p).max(),
        "top1_agreement": (a.argmax(1) == b.argmax(1)).mean(),
        "accuracy_reference": (a.argmax(1) == labels).mean(),
        "accuracy_candidate": (b.argmax(1) == labels).mean(),
        "accuracy_delta": (b.argmax(1) == labels).mean() - (a.argmax(1) == labels).mean(),
        "kl": (p * np.log(p / q)).sum(1).mean(),
        "classes_answered": len(set(a.argmax(1))),
    }
    assert {name: getattr(report, name) for name in expected} == pytest.approx(expected, abs=1e-6)
    assert report.by_batch == {n: pytest.approx(np.abs(b - a)[size == n].max()) for n in (2, 3)}
    assert 0 < report.top1_agreement < 1


@pytest.mark.parametrize("where", ["logits", "probabilities", "reference"])
def test_one_value_that_is_not_finite_is_rejected(where: str) -> None:
    """All comparisons with NaN are false, in both directions."""
    good_NK = noise(2000)
    good = answers(good_NK)
    for bad in (math.nan, math.inf, -math.inf):
        bad_NK = good_NK.clone()
        bad_NK[1234, int(good_NK[1234].argmin())] = bad
        broken = answers(good_NK, bad_NK) if where == "probabilities" else answers(bad_NK, good_NK.softmax(1))
        report = report_of(*((broken, good) if where == "reference" else (good, broken)), tolerance_of("int8"))
        json.dumps(report.to_dict(), allow_nan=False)
        assert "REJECTED" in show(report)
        with pytest.raises(Rejected, match="a NaN or an infinity"):
            report.require()


@pytest.mark.parametrize(("precision", "most"), [("fp32", 0), ("fp16", 3), ("int8.cpu", 30)])
def test_the_bounds_of_agreement(precision: Precision, most: int) -> None:
    """Of 1000 pictures so many get another class, by a hair; their accuracy is the same."""
    logits_NK = torch.zeros(1000, 7)
    logits_NK[:, 0], logits_NK[:, 1] = 1, 1 - 1e-6
    logits_NK[500:, 2] = 2  # the other half answers something else
    pictures = replace(labelled(1000), labels_N=torch.full((1000,), 6))
    for changed in (most, most + 1):
        other_NK = logits_NK.clone()
        other_NK[:changed, 1] = 1 + 1e-6
        report = report_of(logits_NK, other_NK, tolerance_of(precision), pictures)
        assert report.passed == (changed == most), report.reasons
        assert report.top1_agreement == pytest.approx(1 - changed / 1000)


@pytest.mark.parametrize(("precision", "worse"), [("fp32", 0), ("fp16", 2), ("int8", 10)])
@pytest.mark.parametrize("meaningful", [True, False])
def test_the_bounds_of_accuracy(precision: Precision, worse: int, meaningful: bool) -> None:
    """Of 2000 pictures. Where accuracy means nothing it is not judged."""
    bounds = replace(tolerance_of(precision), agreement=0.0, relative=None, kl=9.0)
    pictures = labelled(2000, meaningful)
    right_NK = 9.0 * torch.nn.functional.one_hot(pictures.labels_N, 7)
    for wrong, passes in ((worse, True), (worse + 1, not meaningful)):
        other_NK = right_NK.clone()
        other_NK[:wrong] = other_NK[:wrong].roll(1, 1)
        for pair in ((right_NK, other_NK), (other_NK, right_NK)):  # better is another model as well
            report = report_of(*pair, bounds, pictures)
            assert report.passed == passes, report.reasons


@pytest.mark.parametrize(
    ("precision", "text", "reference", "candidate", "reason"),
    [
        ("fp32", "", noise(500), noise(500) + 5e-4, "relative difference"),
        ("fp32", "", 10 * noise(500), 10 * noise(500) + 5e-4, ""),
        ("int8", "", noise(500), answers(noise(500), noise(500).softmax(0)), "softmax of its own logits"),
        ("fp16", "", 3 * noise(500), 3 * noise(500) / 20, "KL divergence"),
        ("int8", "", 3 * noise(500), 3 * noise(500) / 20, "KL divergence"),
        ("fp16", "", ONE_CLASS, ONE_CLASS, "with one class"),  # not of the kind that the model knows
        ("fp16", "agreement=0", ONE_CLASS, ONE_CLASS, ""),
        ("fp32", "", ONE_CLASS, ONE_CLASS, ""),
    ],
)
def test_other_bounds(
    precision: Precision, text: str, reference: torch.Tensor, candidate: torch.Tensor | Answers, reason: str
) -> None:
    """All answer the same classes."""
    report = report_of(reference, candidate, tolerance_of(precision, text))
    assert report.top1_agreement == 1
    assert len(report.reasons) == (1 if reason else 0)
    assert reason in "".join(report.reasons)


def test_a_loosened_tolerance_is_recorded() -> None:
    found = tolerance_of("int8", "agreement=0.9,accuracy=0.02")
    loosened = ("agreement=0.9", "accuracy=0.02")
    assert found == replace(tolerance_of("int8"), agreement=0.9, accuracy=0.02, loosened=loosened)
    report = report_of(noise(80), noise(80), found)
    assert report.to_dict()["tolerance"]["loosened"] == loosened
    assert "loosened       agreement=0.9, accuracy=0.02" in show(report)


def test_a_tolerance_that_is_malformed_or_does_not_loosen_is_refused() -> None:
    for text in ("much", "agreement=", "agreement=x", "agreement=-1", "agreement=1.1", "relative=nan"):
        with pytest.raises(UserError, match=r"--tolerance .* expected agreement="):
            tolerance_of("fp32", text)
    for text in ("relative=1", "kl=1e-4", "agreement=0.999"):  # float16 has no bound of the relative difference
        with pytest.raises(UserError, match=f"--tolerance {text} does not loosen the gate of fp16"):
            tolerance_of("fp16", text)


# -- which pictures


def test_every_picture_comes_and_every_batch_size() -> None:
    for count in (1, 2, 7, 76, 77, 78, 200, 1000):
        found = list(batches(count))
        rows, sizes = torch.cat(found).tolist(), [len(batch) for batch in found]
        assert set(rows) == set(range(count))
        assert sizes[:5] == list(BATCHES)
        if count >= sum(BATCHES):
            assert rows == list(range(count)), "once each"
            assert set(sizes[:-1]) <= set(BATCHES)


def test_outputs_come_back_in_the_order_of_the_pictures() -> None:
    """Small sets repeat pictures; large ones end in the middle of a turn."""
    live = Live(lively("vit"))
    for count in (5, 90):
        images_N1SS = torch.randint(0, 256, (count, 1, 48, 48), dtype=torch.uint8)
        found = ask(live, replace(labelled(count), images_N1SS=images_N1SS))
        assert found.count == count
        torch.testing.assert_close(found.by_picture(), live.run(images_N1SS).logits_NK, atol=1e-5, rtol=0)


def test_the_data_of_the_checkpoint() -> None:
    said: list[str] = []
    data = open_data(SETTINGS, SPEC, None, said.append)
    assert (data.meaningful, data.source, said) == (True, "embedded drawn faces", [])
    few = data.validation(10)
    assert (len(few), few.of) == (10, 140)
    assert len(set(few.labels_N.tolist())) > 3, "spread over the set"
    samples = [data.calibration(20, seed).images_N1SS for seed in (3, 3, 4)]
    assert [torch.equal(samples[0], sample) for sample in samples] == [True, True, False]
    assert len(data.calibration(1000, 0)) <= 70


@pytest.mark.usefixtures("few_faces")
def test_without_the_data_accuracy_is_not_meaningful() -> None:
    """Drawn faces take its place, with one message."""
    for path in ("/nowhere/fer2013.csv", "~nobody-here/x", "a" * 5000, "x\0y"):
        said: list[str] = []
        data = open_data({"seed": 0, "data": {**SETTINGS["data"], "path": path}}, SPEC, None, said.append)
        assert not data.meaningful
        (message,) = said
        assert "which the model was judged on, is not here" in message
        assert "--data PATH" in message
    assert not open_data({}, SPEC, None, said.append).meaningful, "an ONNX file without its JSON file"
    labels = replace(SPEC, labels=LabelSet(names=("a", "b", "c")))
    data = open_data(SETTINGS, labels, None, said.append)
    assert not data.meaningful, "accuracy on seven expressions says nothing of a model of three"
    assert set(data.validation().labels_N.tolist()) == {0, 1, 2}


@pytest.mark.usefixtures("few_faces")
def test_hostile_settings_are_refused() -> None:
    hostile: list[dict[str, Any]] = [{"data": {}, "seed": seed} for seed in ("x", -1, [1])]
    hostile += [{"data": {"embedded_val": "999999999"}}, {"data": {"embedded_train": 10**9}}]
    hostile += [{"data": {"path": 7}}, {"data": {"on_error": "explode"}}]
    for settings in hostile:
        with pytest.raises(UserError, match="the model's settings"):
            open_data(settings, SPEC, None, print)
    data = open_data({"data": 5, "more": 1}, replace(SPEC, input=InputSpec(size=16, image_size=16)), None, print)
    assert data.validation(3).images_N1SS.shape == (3, 1, 16, 16), "what is not a setting is left out"
