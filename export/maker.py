"""What makes the artifacts of one export, has each judged, and gives it the name that it deserves."""

import hashlib
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import onnx

from export.answers import Answers, ask_aloud
from export.console import Wish
from export.delivery import deliver, put
from export.gate import ParityReport, compare, require_same_model, show, tolerance_of
from export.graph import has_attention, to_onnx
from export.precision import CannotRewriteError, Form, to_float16, to_int8
from export.source import Source
from fer_dist.console import say
from fer_dist.errors import UserError
from fer_dist.extras import versions
from fer_dist.serve.artifact import ExportedModel, Precision, file_sha256, sidecar, sidecar_json
from fer_dist.serve.dataset import Pictures
from fer_dist.serve.runner import open_runner
from fer_dist.spec import ModelSpec

PACKAGES = ("fer-dist", "torch", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")
"""Whose versions an artifact records."""
FP16_SAMPLE = 64
"""Training pictures whose activations show where float16 would overflow."""


class Builder(Protocol):
    """Makes engines; `export/engines.py` has it."""

    @property
    def executes(self) -> bool:
        """Whether engines of it run on this machine."""

    @property
    def batch(self) -> tuple[int, ...]:
        """Smallest, best and largest batch."""

    def build(self, raw: bytes, name: str, spec: ModelSpec) -> tuple[bytes, dict[str, Any]]:
        """The engine of an ONNX file's bytes, and what it was built with."""

    def told(self) -> str:
        """What it builds with and for, for people."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """An ONNX file that has been judged."""

    name: str
    precision: Precision
    model: onnx.ModelProto
    sha256: str
    report: ParityReport
    made: tuple[str, ...] = ()
    calibration: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What artifacts are compared with: its answers, and what it says that it is."""

    answers: Answers
    name: str
    spec: ModelSpec
    checkpoint_sha256: str


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes one artifact after the other in a folder of its own, and delivers each when it has been judged.

    Attributes:
        asked: the precision that was wished for, which a tolerance is about; what it is made from is judged as ever.
    """

    wish: Wish
    asked: Precision
    source: Source
    pictures: Pictures
    reference: Reference
    shop: Path
    done: list[Path] = field(default_factory=list)

    def given(self) -> Graph:
        """The ONNX file that was given, judged where it lies."""
        source = self.source
        assert source.graph is not None
        report = self._judge(source.path)
        say(show(report))
        report.require()
        return Graph(
            name=source.path.name,
            precision=source.precision,
            model=source.graph,
            sha256=file_sha256(source.path),
            report=report,
            made=source.made,
            calibration=source.calibration,
        )

    def float32(self) -> Graph:
        """The graph of the checkpoint."""
        source = self.source
        assert source.checkpoint is not None
        began = time.monotonic()
        model = to_onnx(source.checkpoint.model(), source.checkpoint_sha256)
        say(f"exported to ONNX in {time.monotonic() - began:.1f} s")
        graph = self._deliver_graph(model, "fp32", source.path.name, source.checkpoint_sha256)
        graph.report.require()
        return graph

    def float16(self, graph: Graph, sample: Pictures) -> Graph:
        """The graph with float16 inside, but where it would drift.

        Args:
            sample: pictures whose activations show where that is.
        """
        with _rewriting(graph.name, "fp16"):
            model, made = to_float16(graph.model, sample.images_N1SS.numpy())
        say("\n  ".join(made))
        half = self._deliver_graph(model, "fp16", graph.name, graph.sha256, made=tuple(made))
        half.report.require()
        return half

    def int8(self, graph: Graph, sample: Pictures, forms: Sequence[Form]) -> Graph:
        """The graph quantised in each form; returns the first.

        Args:
            sample: pictures to calibrate with.
        """
        found = []
        if not sample.meaningful:
            say(f"int8: calibrated with the {sample.source}, which the model was not made for; --data PATH takes yours")
        for form in forms:
            began = time.monotonic()
            judge = partial(self._judge_trial, form=form)
            with _rewriting(graph.name, form):
                model, made, calibration = to_int8(graph.model, sample.images_N1SS.numpy(), form=form, judge=judge)
            say("\n  ".join([f"{form}, {time.monotonic() - began:.0f} s", *made]))
            calibration |= {"data": sample.source, "meaningful": sample.meaningful, "seed": self.wish.seed}
            more = {"made": tuple(made), "calibration": calibration}
            found.append(self._deliver_graph(model, form, graph.name, graph.sha256, **more))
        for made_of in found:
            made_of.report.require()
        return found[0]

    def engine(self, graph: Graph, builder: Builder) -> None:
        """The engine of a graph; judged by running it, where this machine can."""
        precision = graph.precision
        target = self.source.name(precision, ".engine")
        began = time.monotonic()
        raw, built_with = builder.build(graph.model.SerializeToString(deterministic=True), graph.name, self.source.spec)
        say(f"built {target.name} in {time.monotonic() - began:.1f} s with {builder.told()}")
        exported = replace(
            self._exported("engine", precision, raw, graph.name, graph.sha256),
            batch=builder.batch,
            made=graph.made,
            calibration=graph.calibration,
            built_with=versions(PACKAGES) | built_with,
        )
        made = self.shop / target.name
        put(made, raw)
        if builder.executes:
            put(sidecar(made), sidecar_json(exported))
            report = self._judge(made)
        else:
            words = ["python", "-m", "export.parity", str(self.source.reference), str(target), *self._as_asked()]
            report = replace(graph.report, executed=False, execute=shlex.join(words))
        self.done.append(deliver(made, target, exported, report))
        report.require()

    def _deliver_graph(
        self, model: onnx.ModelProto, precision: Precision, parent: str, parent_sha256: str, **more: Any
    ) -> Graph:
        """Judge a graph and give it the name that it deserves; the caller asks `report.require()`."""
        target = self.source.name(precision, ".onnx")
        raw = model.SerializeToString(deterministic=True)
        exported = self._exported("onnx", precision, raw, parent, parent_sha256)
        exported = replace(exported, attends=has_attention(model), **more)
        made = self.shop / target.name
        put(made, raw)
        report = self._judge(made)
        self.done.append(deliver(made, target, exported, report))
        return Graph(name=target.name, precision=precision, model=model, sha256=exported.sha256, report=report, **more)

    def _exported(
        self, kind: Literal["onnx", "engine"], precision: Precision, raw: bytes, parent: str, parent_sha256: str
    ) -> ExportedModel:
        return ExportedModel(
            kind=kind,
            precision=precision,
            spec=self.source.spec,
            sha256=hashlib.sha256(raw).hexdigest(),
            bytes=len(raw),
            checkpoint_sha256=self.source.checkpoint_sha256,
            parent=parent,
            parent_sha256=parent_sha256,
            built_with=versions(PACKAGES),
            data=self.source.settings,
        )

    def _judge_trial(self, model: onnx.ModelProto, *, form: Form) -> ParityReport:
        """What the gate says of one attempt at a precision."""
        trial = self.shop / f"trial.{form}.onnx"
        put(trial, model.SerializeToString(deterministic=True))
        report = self._judge(trial)
        trial.unlink()
        return report

    def _judge(self, path: Path) -> ParityReport:
        """Ask an artifact the pictures of the reference; it must also say that it is of the same model."""
        with open_runner(path) as runner:
            answers = ask_aloud(runner, self.pictures)
            about = runner.precision.partition(".")[0] == self.asked.partition(".")[0]
            tolerance = tolerance_of(runner.precision, self.wish.tolerance if about else "")
            if self.wish.limit is not None:
                tolerance = replace(tolerance, loosened=(*tolerance.loosened, f"limit={self.wish.limit}"))
            names = (self.reference.name, f"{path.name} ({runner.runs_on})")
            report = compare(self.reference.answers, answers, self.pictures, tolerance, names=names)
            return require_same_model(report, runner, self.reference.spec, self.reference.checkpoint_sha256)

    def _as_asked(self) -> list[str]:
        """The words that say what an artifact was compared on, and how strictly."""
        wish = self.wish
        given = {"--data": wish.data, "--limit": wish.limit, "--tolerance": wish.tolerance or None}
        return [word for name, value in given.items() if value is not None for word in (name, str(value))]


@contextmanager
def _rewriting(name: str, precision: str) -> Iterator[None]:
    """Turns what a rewriter cannot do, and a full disk under its temporary files, into a UserError."""
    try:
        yield
    except CannotRewriteError as error:
        raise UserError(f"{name} cannot be made {precision}: {error}", "--precision fp32") from None
    except OSError as error:
        raise UserError(f"{precision}: no temporary file: {error.strerror}", "free some space, or set TMPDIR") from None
