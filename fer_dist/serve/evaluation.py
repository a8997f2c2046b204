"""Artifacts judged on one part of a data set: scores, what they mean, and how far two of them differ."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fer_dist.data.faces import SPLITS
from fer_dist.engine.calibration import Calibration, calibration
from fer_dist.engine.metrics import Metrics, wilson
from fer_dist.engine.score import answers
from fer_dist.engine.significance import McNemar, holm, mcnemar
from fer_dist.errors import UserError, printable
from fer_dist.serve.dataset import Say
from fer_dist.serve.exam import Exam, Task, open_exam
from fer_dist.serve.explain import look
from fer_dist.serve.runner import Runner, open_runner
from fer_dist.spec import ModelSpec
from fer_dist.world import World

MOST_SURE = 12
"""Classes of which the surest right answer is shown, at most."""

Counting = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""What shows progress: called with a title and a total, gives what is told the number done since."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One picture of a report.

    Attributes:
        image_SS: uint8 `[S, S]`.
        heat_SS: float32 `[S, S]`, 0..1, where the model looked; None: nothing says it.
        confidence: probability of the answer.
    """

    name: str
    true: str
    predicted: str
    confidence: float
    image_SS: NDArray[np.uint8]
    heat_SS: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One artifact and its answers.

    Attributes:
        about: what it is, plain values.
        right_M: bool, whether each picture was answered right.
        whole, clean: counts of all pictures, and of those without a copy (None: unknown).
        mistakes: the most confident wrong answers, surest first.
        sure: the surest right answer of each class.
        method: how heat maps were made; empty: there are none.
    """

    path: Path
    spec: ModelSpec
    about: dict[str, Any]
    right_M: NDArray[np.bool_]
    whole: Metrics
    clean: Metrics | None
    calibration: Calibration
    mistakes: tuple[Shown, ...]
    sure: tuple[Shown, ...]
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the scores first; class names as they are, file names made printable."""
        report = self.whole.report(self.spec.labels.names)
        scores = {
            "accuracy": report.pop("accuracy"),
            "accuracy_interval_95": report.pop("accuracy_interval_95"),
            "accuracy_clean": None,
            "accuracy_clean_interval_95": None,
            "count": report.pop("count"),
            "count_clean": None,
            "ece": self.calibration.ece,
        }
        if self.clean is not None and self.clean.count:
            scores["accuracy_clean"] = self.clean.accuracy
            scores["accuracy_clean_interval_95"] = list(wilson(self.clean.accuracy, self.clean.count))
            scores["count_clean"] = self.clean.count
        found = self.calibration
        bins = {"count": found.count_B, "confidence": found.confidence_B, "accuracy": found.accuracy_B}
        mistakes = [
            {name: getattr(m, name) for name in ("name", "true", "predicted", "confidence")} for m in self.mistakes
        ]
        return (
            scores
            | report
            | {"calibration": {name: values.tolist() for name, values in bins.items()}}
            | {"artifact": printable(str(self.path)), **self.about, "mistakes": mistakes}
        )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Two artifacts, by their place in the list; `p_holm` is p for all comparisons of the report together."""

    first: int
    second: int
    test: McNemar
    p_holm: float


def evaluate(task: Task, world: World, say: Say, counting: Counting) -> tuple[Exam, list[Judged]]:
    """Judge artifacts on the same pictures; called by all ranks alike.

    Args:
        say: is told what was taken, on rank 0.
        counting: shows progress, on rank 0.

    Returns:
        The same scores on every rank at any world size; pictures with heat maps on rank 0.

    Raises:
        UserError: an artifact or the data cannot be read, or they do not go together.
    """
    speak: Say = say if world.first else lambda text: None
    judged: list[Judged] = []
    exam: Exam | None = None
    for path in task.paths:
        threads = task.threads or (torch.get_num_threads() if world.size > 1 else None)
        with world.together(
            lambda path=path, threads=threads: open_runner(  # type: ignore[misc]
                path, device=task.device, provider=task.provider, threads=threads
            )
        ) as runner:
            if exam is None:
                exam = world.node_first(lambda runner=runner: open_exam(task, runner.spec, speak))  # type: ignore[misc]
            _require_same_pictures(judged, runner)
            judged.append(_judge(task, exam, runner, world, counting))
    assert exam is not None, "no artifact"
    return exam, judged


def compare(judged: Sequence[Judged]) -> list[Compared]:
    """McNemar's test between all pairs."""
    pairs = list(combinations(range(len(judged)), 2))
    tests = [mcnemar(judged[a].right_M, judged[b].right_M) for a, b in pairs]
    adjusted = holm([test.p for test in tests])
    return [
        Compared(first=a, second=b, test=test, p_holm=p) for (a, b), test, p in zip(pairs, tests, adjusted, strict=True)
    ]


def to_dict(task: Task, exam: Exam, judged: Sequence[Judged]) -> dict[str, Any]:
    """The content of report.json: the scores of the first artifact at the top, then everything."""
    plain = [one.to_dict() for one in judged]
    top = ("accuracy", "accuracy_interval_95", "accuracy_clean", "accuracy_clean_interval_95")
    names = [one["artifact"] for one in plain]
    return {
        **{name: plain[0][name] for name in (*top, "count", "count_clean", "macro_f1", "ece", "loss")},
        "artifact": names[0],
        "data": exam.source,
        "key": exam.faces.key,
        "split": SPLITS[exam.split],
        "tta": task.views,
        "notes": list(exam.notes),
        "artifacts": plain,
        "comparisons": [
            {"first": names[c.first], "second": names[c.second], **asdict(c.test), "p_holm": c.p_holm}
            for c in compare(judged)
        ],
    }


def _require_same_pictures(judged: Sequence[Judged], runner: Runner) -> None:
    """Artifacts of one report have the labels and the size of the first."""
    if not judged:
        return
    first, spec = judged[0], runner.spec
    if spec.labels != first.spec.labels:
        told = [", ".join(s.labels.names) for s in (spec, first.spec)]
        problem = f"{runner.path} has the labels {told[0]}; {first.path} has {told[1]}"
    elif spec.input.size != first.spec.input.size:
        problem = f"{runner.path} takes pictures of {spec.input.size} pixels, {first.path} of {first.spec.input.size}"
    else:
        return
    raise UserError(printable(problem), "evaluate them one by one")


def _judge(task: Task, exam: Exam, runner: Runner, world: World, counting: Counting) -> Judged:
    title = f"asking {printable(runner.path.name)}"
    with counting(title, -(-len(exam.rows_M) // world.size)) if world.first else nullcontext(lambda done: None) as told:
        log_p_MK = answers(runner, exam.faces, exam.rows_M, world, batch=task.batch, kind=task.views, progress=told)
    if spoilt := int((~log_p_MK.isfinite()).any(1).sum()):
        raise UserError(
            f"{printable(str(runner.path))} answers {spoilt:,} of {len(log_p_MK):,} pictures with NaN or infinity",
            "train or export it again",
        )
    labels_M = torch.from_numpy(exam.labels_M)
    p_MK = log_p_MK.exp().numpy()
    predicted_M = log_p_MK.argmax(1).numpy()
    right_M = predicted_M == exam.labels_M
    order = np.argsort(-p_MK.max(1), kind="stable")
    wrong = order[~right_M[order]][: task.shown]
    sure = _one_a_class(order[right_M[order]], predicted_M)
    shown, method = _shown(exam, runner, np.concatenate([wrong, sure]), predicted_M, p_MK, draws=world.first)
    kept = torch.from_numpy(exam.clean_M) if exam.clean_M is not None else None
    return Judged(
        path=runner.path,
        spec=runner.spec,
        about={
            "kind": runner.kind,
            "precision": runner.precision,
            "arch": runner.spec.arch,
            "runs_on": runner.runs_on,
            "checkpoint_sha256": runner.checkpoint_sha256,
        },
        right_M=right_M,
        whole=Metrics.of(log_p_MK, labels_M),
        clean=None if kept is None else Metrics.of(log_p_MK[kept], labels_M[kept]),
        calibration=calibration(p_MK, exam.labels_M),
        mistakes=tuple(shown[: len(wrong)]),
        sure=tuple(shown[len(wrong) :]),
        method=method,
    )


def _one_a_class(order: NDArray[np.int64], classes_M: NDArray[np.int64]) -> NDArray[np.int64]:
    """The first of each class in this order, by class; of MOST_SURE classes."""
    _, first = np.unique(classes_M[order], return_index=True)
    return order[first][:MOST_SURE]


def _shown(
    exam: Exam,
    runner: Runner,
    which: NDArray[np.int64],
    predicted_M: NDArray[np.int64],
    p_MK: NDArray[np.float64],
    *,
    draws: bool,
) -> tuple[list[Shown], str]:
    """Some pictures of the exam with their heat maps, and how these were made."""
    images = exam.faces.images_NHW[exam.rows_M[which]]
    heat, method = None, ""
    if draws and len(which):
        heat, method = look(runner, torch.from_numpy(images).unsqueeze(1), torch.from_numpy(predicted_M[which]))
    names, labels_M = runner.spec.labels.names, exam.labels_M
    return [
        Shown(
            name=printable(exam.faces.names[exam.rows_M[index]]),
            true=names[labels_M[index]],
            predicted=names[predicted_M[index]],
            confidence=float(p_MK[index].max()),
            image_SS=images[place],
            heat_SS=None if heat is None else heat[place],
        )
        for place, index in enumerate(which)
    ], method
