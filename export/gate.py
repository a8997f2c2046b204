"""The parity gate: is an artifact the model that it was made from?"""

import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from export.answers import Answers
from fer_dist.engine.metrics import Metrics
from fer_dist.errors import Rejected, UserError, printable
from fer_dist.serve.artifact import Precision
from fer_dist.serve.dataset import Pictures
from fer_dist.serve.runner import Runner
from fer_dist.spec import InputSpec, ModelSpec

SELF_CONSISTENT = 1e-4
"""Largest difference between an artifact's probabilities and the softmax of its own logits."""


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an artifact may be from its reference.

    Attributes:
        agreement: least part of the pictures whose highest logit is the same class.
        relative: largest |difference| of a logit over the standard deviation of the reference's logits; None: any.
        accuracy: largest difference of accuracy, either way; only asked where accuracy means something.
        kl: largest mean Kullback-Leibler divergence of the probabilities [nats].
        loosened: what was set by hand.
    """

    agreement: float
    relative: float | None
    accuracy: float
    kl: float
    loosened: tuple[str, ...] = ()


_OF_PRECISION = {
    "fp32": Tolerance(agreement=1.0, relative=1e-4, accuracy=0.0, kl=1e-6),
    "fp16": Tolerance(agreement=0.997, relative=None, accuracy=0.001, kl=1e-3),
    "int8": Tolerance(agreement=0.97, relative=None, accuracy=0.005, kl=5e-2),
}


_LOOSER = {"agreement": -1, "relative": 1, "accuracy": 1, "kl": 1}
"""What can be set by hand, and in which direction that is looser."""


def tolerance_of(precision: Precision, given: str = "") -> Tolerance:
    """The tolerance of a precision, loosened by a text such as `agreement=0.95,accuracy=0.01`.

    Raises:
        UserError: the text is another, or would tighten the gate.
    """
    found = _OF_PRECISION[precision.partition(".")[0]]
    for part in filter(None, given.split(",")):
        name, _, text = part.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        most = 1.0 if name == "agreement" else sys.float_info.max
        if name not in _LOOSER or not 0 <= value <= most:
            raise UserError(
                f"--tolerance {part!r} is none; expected {'=, '.join(_LOOSER)}= and a number of at least 0 "
                "(agreement: a part of 1)",
                "--tolerance agreement=0.95,accuracy=0.01",
            )
        usual = getattr(_OF_PRECISION[precision.partition(".")[0]], name)
        if usual is None or _LOOSER[name] * (value - usual) < 0:
            limit = "it has no bound there" if usual is None else f"its bound is {usual:g}"
            raise UserError(f"--tolerance {part} does not loosen the gate of {precision}: {limit}", "leave it out")
        changed: dict[str, Any] = {name: value, "loosened": (*found.loosened, part)}
        found = replace(found, **changed)
    return found


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How an artifact compares with its reference over an evaluation set.

    Attributes:
        reference, candidate: what was compared, and on what it ran.
        data: the pictures; `count` of `of` were taken, `meaningful` says whether accuracy says anything.
        max_abs, mean_abs: |difference| of logits; `relative` is max_abs over the deviation of the reference's.
        probability_max_abs, probability_mean_abs: |difference| of probabilities; `inconsistent` is the largest
            between an artifact's probabilities and the softmax of its own logits.
        top1_agreement: part of the answers with the same class.
        kl: mean Kullback-Leibler divergence of the candidate from the reference [nats].
        by_batch: batch size -> largest |difference| of logits.
        classes_answered: how many classes the reference answers at all; with one, agreement says little.
        reasons: why it is rejected; empty: it passed.
        executed: False: the numbers are those of the graph that an engine was built from; `execute` is what to
            type where there is a GPU.
    """

    reference: str
    candidate: str
    data: str
    count: int
    of: int
    meaningful: bool
    max_abs: float
    mean_abs: float
    relative: float
    probability_max_abs: float
    probability_mean_abs: float
    inconsistent: float
    top1_agreement: float
    accuracy_reference: float
    accuracy_candidate: float
    kl: float
    by_batch: dict[int, float]
    classes_answered: int
    tolerance: Tolerance
    reasons: tuple[str, ...] = ()
    executed: bool = True
    execute: str = ""

    @property
    def passed(self) -> bool:
        return not self.reasons

    @property
    def accuracy_delta(self) -> float:
        return self.accuracy_candidate - self.accuracy_reference

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: such a number becomes None."""
        plain = asdict(self) | {"passed": self.passed, "accuracy_delta": self.accuracy_delta}
        plain["by_batch"] = {str(size): value for size, value in self.by_batch.items()}
        return {name: _json_safe(value) for name, value in plain.items()}

    def require(self) -> None:
        """Raises Rejected unless it passed."""
        if not self.passed:
            raise Rejected(f"{self.candidate} is not {self.reference}: {'; '.join(self.reasons)}")


def compare(
    reference: Answers, candidate: Answers, pictures: Pictures, tolerance: Tolerance, *, names: tuple[str, str]
) -> ParityReport:
    """Measure how far the answers of a candidate are from those of its reference, and judge.

    Args:
        names: of reference and candidate, for people.
    """
    wanted_MK, found_MK = reference.by_picture()[candidate.rows_M].double(), candidate.logits_MK.double()
    distance_M = (found_MK - wanted_MK).abs().amax(1)
    log_p_MK, log_q_MK = wanted_MK.log_softmax(1), found_MK.log_softmax(1)
    q_MK = candidate.probabilities_MK.double()
    accuracy = [_accuracy(answers.by_picture(), pictures.labels_N) for answers in (reference, candidate)]
    sound = bool(wanted_MK.isfinite().all())
    finite = bool(found_MK.isfinite().all() and q_MK.isfinite().all())
    spread = float(reference.by_picture().double().std())
    report = ParityReport(
        reference=names[0],
        candidate=names[1],
        data=pictures.source,
        count=len(pictures),
        of=pictures.of,
        meaningful=pictures.meaningful,
        max_abs=_largest(distance_M),
        mean_abs=float((found_MK - wanted_MK).abs().mean()),
        relative=_largest(distance_M) / spread if spread else math.inf,
        probability_max_abs=_largest((q_MK - log_p_MK.exp()).abs()),
        probability_mean_abs=float((q_MK - log_p_MK.exp()).abs().mean()),
        inconsistent=_largest((q_MK - log_q_MK.exp()).abs()),
        top1_agreement=float((found_MK.argmax(1) == wanted_MK.argmax(1)).double().mean()) if finite else 0.0,
        accuracy_reference=accuracy[0],
        accuracy_candidate=accuracy[1] if finite else 0.0,
        kl=float((log_p_MK.exp() * (log_p_MK - log_q_MK)).sum(1).mean()),
        by_batch={
            size: _largest(distance_M[candidate.batch_M == size]) for size in sorted(set(candidate.batch_M.tolist()))
        },
        classes_answered=len(set(wanted_MK.argmax(1).tolist())),
        tolerance=tolerance,
    )
    return replace(report, reasons=tuple(_reasons(report, sound, finite)))


def require_same_model(report: ParityReport, runner: Runner, spec: ModelSpec, checkpoint_sha256: str) -> ParityReport:
    """The same report, with a reason against an artifact that says itself that it is of another model.

    Args:
        spec: of the reference.
        checkpoint_sha256: of the checkpoint that it should be made from; empty: any.
    """
    reasons = list(report.reasons)
    if _network(runner.spec) != _network(spec):
        reasons.append(f"it says that it is {_told(runner.spec)}, not {_told(spec)}")
    if runner.spec.labels != spec.labels:
        reasons.append(f"its labels are {_listed(runner.spec)}, not {_listed(spec)}")
    if checkpoint_sha256 and runner.checkpoint_sha256 != checkpoint_sha256:
        other = printable(runner.checkpoint_sha256[:12])
        reasons.append(f"it was made from checkpoint {other}, not {checkpoint_sha256[:12]}")
    return replace(report, reasons=tuple(reasons))


def show(report: ParityReport) -> str:
    """A report as lines for people."""
    if not report.executed:
        return (
            f"the engine was NOT executed; the parity in its JSON file is that of {report.candidate}, which it was "
            f"built from.\n  where there is a GPU for it:  {report.execute}"
        )
    asked, percent = report.tolerance, 100
    relative = "" if asked.relative is None else f"; at most {asked.relative:.0e}"
    meaning = (
        f"{report.accuracy_reference:.2%} -> {report.accuracy_candidate:.2%}, {percent * report.accuracy_delta:+.2f} "
        f"points (at most {percent * asked.accuracy:.2f})"
        if report.meaningful
        else f"not meaningful: these are not the pictures that the model was made for ({report.accuracy_candidate:.1%})"
    )
    few = "; it answers one class only, which says little" if report.classes_answered == 1 else ""
    rows = {
        "pictures": f"{report.count:,} of {report.of:,}, {report.data}",
        "logits": f"max {report.max_abs:.1e}, mean {report.mean_abs:.1e}, relative {report.relative:.1e}{relative}",
        "probabilities": f"max {report.probability_max_abs:.1e}, mean {report.probability_mean_abs:.1e}, "
        f"KL {report.kl:.1e} nats; at most {asked.kl:.0e}",
        "agreement": f"{_part(report.top1_agreement)} (at least {asked.agreement:.2%}){few}",
        "accuracy": meaning,
        "by batch": ", ".join(f"{size}: {value:.1e}" for size, value in report.by_batch.items()),
    }
    if asked.loosened:
        rows["loosened"] = ", ".join(asked.loosened)
    verdict = "passed" if report.passed else f"REJECTED: {'; '.join(report.reasons)}"
    lines = [f"  {name:<14} {text}" for name, text in rows.items()]
    return "\n".join([f"parity of {report.candidate} with {report.reference}: {verdict}", *lines])


def _reasons(report: ParityReport, sound: bool, finite: bool) -> list[str]:
    """Why the gate does not let it pass."""
    allowed, found = report.tolerance, []
    if not sound:
        found.append("some answers of the reference are a NaN or an infinity")
    if not finite:
        found.append("some answers are a NaN or an infinity")
    if report.top1_agreement < allowed.agreement:
        found.append(f"top-1 agreement {_part(report.top1_agreement)}, expected at least {allowed.agreement:.2%}")
    if allowed.relative is not None and not report.relative <= allowed.relative:
        found.append(f"relative difference {report.relative:.1e}, expected at most {allowed.relative:.1e}")
    if not report.kl <= allowed.kl:
        found.append(f"KL divergence {report.kl:.1e} nats, expected at most {allowed.kl:.1e}")
    if report.classes_answered == 1 and allowed.relative is None and allowed.agreement > 0:
        found.append("the reference answers all pictures with one class: agreement says nothing; --data PATH")
    # A thousandth of a point more: 0.001 is no binary number.
    if report.meaningful and not abs(report.accuracy_delta) <= allowed.accuracy + 1e-5:
        found.append(f"accuracy {100 * report.accuracy_delta:+.2f} points, at most {100 * allowed.accuracy:.2f} apart")
    if not report.inconsistent <= SELF_CONSISTENT:
        found.append(f"its probabilities are up to {report.inconsistent:.1e} from the softmax of its own logits")
    return found


def _part(of_one: float) -> str:
    """A percentage that is never rounded up to what is expected."""
    return f"{math.floor(of_one * 1e4 + 1e-6) / 100:.2f}%"


def _told(spec: ModelSpec) -> str:
    arch, shown, smoothing, temperature = _network(spec)
    return printable(f"{arch} {shown}, smoothing {smoothing:.4g}, temperature {temperature:.4g}"[:300])


def _network(spec: ModelSpec) -> tuple[str, InputSpec, float, float]:
    """What an artifact must have in common with its reference, labels aside."""
    return spec.arch, spec.input, spec.smoothing, spec.temperature


def _listed(spec: ModelSpec) -> str:
    return printable(", ".join(spec.labels.names)[:300])


def _largest(values: Tensor) -> float:
    """The largest value; infinity where one is no number."""
    worst = float(values.max())
    return worst if math.isfinite(worst) else math.inf


def _accuracy(logits_NK: Tensor, labels_N: Tensor) -> float:
    return Metrics.of(torch.nan_to_num(logits_NK.double()).log_softmax(1), labels_N).accuracy


def _json_safe(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return {name: _json_safe(x) for name, x in value.items()} if isinstance(value, dict) else value
