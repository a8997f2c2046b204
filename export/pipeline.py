"""From a checkpoint to artifacts that have passed the gate: the whole way of `export.onnx` and `export.trt`."""

from pathlib import Path

from export.answers import ask_aloud
from export.console import Wish
from export.delivery import workshop
from export.gate import tolerance_of
from export.maker import FP16_SAMPLE, Builder, Maker, Reference
from export.source import Source, open_source
from fer_dist.console import say
from fer_dist.errors import UserError
from fer_dist.serve.artifact import Precision
from fer_dist.serve.dataset import Pictures, open_data
from fer_dist.serve.runner import open_runner


def export(wish: Wish, builder: Builder | None = None) -> list[Path]:
    """Make what was wished for; each artifact gets its name only when it has passed the gate.

    Args:
        builder: makes an engine of the last graph; None: no engine.

    Returns:
        The artifacts, in the order in which they were made.

    Raises:
        UserError: the source or the data cannot be read, or the folder not written.
        Rejected: an artifact did not pass; it lies there as `*.rejected`, with its report.
    """
    source = open_source(wish.path)
    precision = wish.precision or source.precision
    _require_possible(source, precision, builder)
    tolerance_of(precision, wish.tolerance)  # a wrong text is told before the work
    data = open_data(source.settings, source.spec, wish.data, say)
    pictures = data.validation(wish.limit)
    sample = None
    if precision != source.precision:
        sample = data.calibration(FP16_SAMPLE if precision == "fp16" else wish.calibration, wish.seed)
    with workshop(wish.path.parent) as shop:
        reference = _ask_reference(source, pictures)
        maker = Maker(wish=wish, asked=precision, source=source, pictures=pictures, reference=reference, shop=shop)
        graph = maker.given() if source.checkpoint is None else maker.float32()
        if sample and precision == "fp16":
            graph = maker.float16(graph, sample)
        elif sample:
            graph = maker.int8(graph, sample, ("int8",) if builder else ("int8", "int8.cpu"))
        if builder:
            maker.engine(graph, builder)
    return maker.done


def _require_possible(source: Source, precision: Precision, builder: Builder | None) -> None:
    """Raises UserError where a source cannot become what is wished for, or is it already."""
    path = source.path
    if source.precision not in ("fp32", precision):
        raise UserError(f"{path} is {source.precision} already and cannot become {precision}", "name the checkpoint")
    if builder and precision == "int8.cpu":
        raise UserError(f"{path} is quantised for CPUs; TensorRT does not take it", "name the int8.onnx")
    if precision == source.precision and source.graph and not builder:
        raise UserError(f"{path} is what it would become", f"python -m export.parity best.pth {path}")


def _ask_reference(source: Source, pictures: Pictures) -> Reference:
    """What artifacts of a source are compared with."""
    itself = " itself, which had passed" if source.reference == source.path and source.graph else ""
    with open_runner(source.reference) as runner:
        return Reference(
            answers=ask_aloud(runner, pictures),
            name=f"{source.reference.name}{itself} ({runner.runs_on})",
            spec=runner.spec,
            checkpoint_sha256=runner.checkpoint_sha256,
        )
