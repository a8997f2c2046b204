"""Int8 written into the graph as Q/DQ pairs, tuned until a judge is content."""

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata
from onnxruntime.quantization.shape_inference import quant_pre_process

from export.calibrate import (
    PERCENTILE,
    Ranges,
    batches,
    clipped_by_entropy,
    clipped_by_percentile,
    histograms,
    tensor_ranges,
)
from export.rewrite import (
    CannotRewriteError,
    checked,
    cpu_session,
    float_tensors,
    heads,
    preprocessing,
    tell_precision,
    working_copy,
)
from fer_dist.serve.artifact import LOGITS

LAYERS = ("Conv", "Gemm", "MatMul")
"""Operators that are quantised, where their second input is a constant; products of attention stay in float32."""
GROUPS = 24
"""Most groups of layers whose harm is measured one by one; larger networks have several neighbours in a group."""
PROBES = 32
"""Pictures that the harm of a group is measured on."""

Form = Literal["int8", "int8.cpu"]


class Verdict(Protocol):
    """What a judge says of a quantised graph."""

    @property
    def passed(self) -> bool: ...
    @property
    def top1_agreement(self) -> float: ...


Judge = Callable[[onnx.ModelProto], Verdict]


def to_int8(
    model: onnx.ModelProto, images_N1SS: NDArray[np.uint8], *, form: Form, judge: Judge
) -> tuple[onnx.ModelProto, list[str], dict[str, Any]]:
    """A float32 graph of ours in int8, the first of a ladder of attempts that the judge lets pass.

    The ladder: ranges by min-max, percentile, entropy; then the best of these with the layers
    left in float32 that hurt most, in growing steps up to half of them. The same input gives
    the same bytes.

    Args:
        model: float32 throughout; left as it is.
        images_N1SS: uint8 `[N, 1, S, S]`, the calibration pictures.
        form: `int8`: symmetric, as TensorRT reads it; `int8.cpu`: as ONNX Runtime is fast at it on CPUs.
        judge: compares a graph with the original. Its `passed` ends the search, its `top1_agreement` ranks.

    Returns:
        The graph that passed, or the best where none did; what was tried, a sentence each; the
        method, the count of pictures and what was left out. The last sentence says it where none passed.

    Raises:
        CannotRewriteError: the graph has control flow, or no layer to quantise.
    """
    search = _Search(_Quantisable(model, form), images_N1SS, judge)
    best = search.run()
    calibration = {
        "method": best.method,
        "pictures": len(images_N1SS),
        "layers": len(search.net.layers) - len(best.left_out),
        "left_out": [search.net.names[layer] for layer in search.net.layers if layer in best.left_out],
    }
    return best.graph, [search.net.told(), *search.made], calibration


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that onnxruntime.quantization gives the root logger; they name what is decided here."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    graph: onnx.ModelProto
    method: str
    left_out: frozenset[str]
    verdict: Verdict


class _Search:
    """The ladder of attempts at one network."""

    def __init__(self, net: "_Quantisable", images_N1SS: NDArray[np.uint8], judge: Judge) -> None:
        self.net, self.images_N1SS, self.judge = net, images_N1SS, judge
        self.made: list[str] = []
        self._best: _Attempt | None = None  # of all graphs only this one is kept: each has the size of the model

    def run(self) -> _Attempt:
        ranges = tensor_ranges(self.net.graph, self.images_N1SS)
        if self._try("min-max", ranges):
            return self.best
        by_method = {"min-max": ranges} | self._clipped(ranges)
        if any(self._try(method, by_method[method]) for method in ("percentile", "entropy")):
            return self.best
        method = self.best.method
        if any(self._try(method, by_method[method], left_out) for left_out in self._growing(by_method[method])):
            return self.best
        self.made.append(f"none of these passed; this is the best, with {self.best.verdict.top1_agreement:.2%}")
        return self.best

    @property
    def best(self) -> _Attempt:
        """The attempt that passed, else the first of those with the highest agreement."""
        assert self._best is not None
        return self._best

    def _try(self, method: str, ranges: Ranges, left_out: frozenset[str] = frozenset()) -> bool:
        graph = self.net.quantised(ranges, left_out)
        verdict = self.judge(graph)
        if self._best is None or verdict.passed or verdict.top1_agreement > self._best.verdict.top1_agreement:
            self._best = _Attempt(graph=graph, method=method, left_out=left_out, verdict=verdict)
        what = f"{PERCENTILE}% percentile" if method == "percentile" else method
        what = f"{what} ranges over {len(self.images_N1SS)} pictures"
        if left_out:
            names = [self.net.names[layer] for layer in self.net.layers if layer in left_out]
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            what += f", {len(names)} of {len(self.net.layers)} layers left in float32 ({shown})"
        outcome = "passed" if verdict.passed else "did not pass"
        self.made.append(f"{what}: top-1 agreement {verdict.top1_agreement:.2%}, {outcome}")
        return verdict.passed

    def _clipped(self, ranges: Ranges) -> dict[str, Ranges]:
        wanted = {name: ranges[name] for name in self.net.activations()}
        counts = histograms(self.net.graph, self.images_N1SS, wanted)
        return {
            "percentile": ranges | clipped_by_percentile(wanted, counts),
            "entropy": ranges | clipped_by_entropy(wanted, counts),
        }

    def _growing(self, ranges: Ranges) -> Iterator[frozenset[str]]:
        """Layers to leave out, those of the most harmful groups first, in steps that double, up to half of them."""
        layers = self.net.layers
        width = -(-len(layers) // GROUPS)
        groups = [layers[start : start + width] for start in range(0, len(layers), width)]
        probes_N1SS = self.images_N1SS[:PROBES]
        truth_NK = _logits(self.net.graph, probes_N1SS)
        harm = []
        for group in groups:
            only = self.net.quantised(ranges, frozenset(layers) - frozenset(group))
            harm.append(float(np.square(_logits(only, probes_N1SS) - truth_NK).mean()))
        worst = [groups[i] for i in sorted(range(len(groups)), key=lambda i: -harm[i])]
        most = max((n for n in range(len(worst) + 1) if 2 * sum(map(len, worst[:n])) <= len(layers)), default=0)
        steps = [step for step in (2**power for power in range(len(worst))) if step < most] + [most]
        for step in steps:
            if step:
                yield frozenset(layer for group in worst[:step] for layer in group)


def _logits(model: onnx.ModelProto, images_N1SS: NDArray[np.uint8]) -> NDArray[np.float32]:
    session = cpu_session(model)
    return np.concatenate([session.run([LOGITS], feed)[0] for feed in batches(images_N1SS, 16)])


class _Quantisable:
    """A float32 graph, prepared, and the layers in it that can be quantised."""

    def __init__(self, model: onnx.ModelProto, form: Form) -> None:
        self.form: Form = form
        self.original = model
        self.graph = working_copy(_optimised(model))
        spared = preprocessing(self.graph) | heads(self.graph)
        nodes = [node for node in self.graph.graph.node if node.op_type in LAYERS and node.name not in spared]
        constant = {tensor.name for tensor in self.graph.graph.initializer} & float_tensors(self.graph)
        nodes = [node for node in nodes if node.input[1] in constant]
        self.layers = tuple(node.name for node in nodes)
        # The exporter keeps the names of parameters, but for those that it transposed.
        shown = {node.name: node.input[1] if "." in node.input[1] else node.output[0] for node in nodes}
        self.names = {layer: name.rpartition("model.network.")[2] for layer, name in shown.items()}
        self._counts = Counter(node.op_type for node in nodes)
        if not nodes:
            raise CannotRewriteError("the graph has no layer with constant weights that int8 could take")

    def told(self) -> str:
        counts = ", ".join(f"{count} {op_type}" for op_type, count in sorted(self._counts.items()))
        return f"int8: {counts}; preprocessing, normalisation, attention products and the last layer stay in float32"

    def quantised(self, ranges: Ranges, left_out: frozenset[str] = frozenset()) -> onnx.ModelProto:
        """The graph with Q/DQ pairs around all layers but those left out."""
        with _quiet():
            result = self._quantiser(ranges, left_out)
            result.quantize_model()
        result.model.topological_sort()
        model: onnx.ModelProto = result.model.model
        model.producer_name, model.producer_version = self.original.producer_name, self.original.producer_version
        del model.metadata_props[:]
        model.metadata_props.extend(self.original.metadata_props)
        used = {node.domain for node in model.graph.node}
        imports = [entry for entry in model.opset_import if entry.domain in used]
        kept = [onnx.helper.make_opsetid(entry.domain, entry.version) for entry in imports]
        del model.opset_import[:]
        model.opset_import.extend(kept)
        tell_precision(model, self.form)
        return checked(model)

    def activations(self) -> list[str]:
        """Names of the tensors that can get a scale: what the layers, and what _behind them, read and give."""
        floats, taken = float_tensors(self.graph), {*self.layers, *self._behind(frozenset())}
        constant = {tensor.name for tensor in self.graph.graph.initializer}
        nodes = [node for node in self.graph.graph.node if node.name in taken]
        names = dict.fromkeys(name for node in nodes for name in (*node.input, *node.output) if name in floats)
        return [name for name in names if name not in constant]

    def _behind(self, left_out: frozenset[str]) -> set[str]:
        """Names of the activations right behind quantised layers: on CPUs they cost nothing as limits of int8."""
        if self.form != "int8.cpu":
            return set()
        nodes = self.graph.graph.node
        given = {
            name for node in nodes if node.name in self.layers and node.name not in left_out for name in node.output
        }
        return {node.name for node in nodes if node.op_type in ("Relu", "Clip") and node.input[0] in given}

    def _quantiser(self, ranges: Ranges, left_out: frozenset[str]) -> Any:
        on_cpu = self.form == "int8.cpu"
        model = onnx.ModelProto()
        model.CopyFrom(self.graph)
        add_infer_metadata(model)  # its types are known: spares a round through a file
        bounds = {name: (np.float32(low), np.float32(high)) for name, (low, high) in ranges.items()}
        taken = {layer for layer in self.layers if layer not in left_out} | self._behind(left_out)
        return QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=on_cpu,  # 7 bits of weights: with 8, products saturate on processors that have no VNNI
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8 if on_cpu else QuantType.QInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, bounds),
            nodes_to_quantize=[node.name for node in model.graph.node if node.name in taken],
            nodes_to_exclude=[],
            op_types_to_quantize=[*LAYERS, "Relu", "Clip"],
            extra_options={
                "WeightSymmetric": True,
                "ActivationSymmetric": not on_cpu,
                "QuantizeBias": on_cpu,
                # TensorRT fuses better, and all are more exact, where sums leave a layer as they are. ONNX
                # Runtime has no convolution from int8 to float32, but has products of matrices.
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"] if on_cpu else list(LAYERS),
            },
        )


def _optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph after ONNX Runtime's own preparation for quantisation: constants folded, simple nodes joined."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        # By path: given a ModelProto it takes the weights out and then cannot read the graph.
        given, prepared = Path(folder) / "given.onnx", Path(folder) / "prepared.onnx"
        onnx.save(model, given)
        quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
        return onnx.load(prepared)
