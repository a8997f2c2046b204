"""`python -m export.trt best.pth`: the whole way from a checkpoint to a TensorRT engine that has passed the gate."""

import sys
from collections.abc import Sequence

from export.console import add_export, numbers, wish_of
from fer_dist.commandline import Parser, run
from fer_dist.errors import UserError

PROG = "python -m export.trt"
ABOUT = """\
Makes best.onnx and best.engine (best.fp16.engine, best.int8.engine) from best.pth, with a JSON file beside each,
after comparing each with the checkpoint over the whole validation set. An artifact that is not the model keeps the
name *.rejected, and the command leaves with 3. Takes an .onnx of fer_dist as well.

With a GPU and the package tensorrt the engine is a native one and is executed for the comparison. Elsewhere TensorRT
for RTX (the package tensorrt-rtx) builds a portable engine ahead of time; the comparison is then that of the ONNX
graph, and the report says so, and how to execute the engine."""


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, with 2 after a UserError, or with 3: rejected."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    parser = Parser(PROG, ABOUT)
    add_export(parser)
    parser.add_argument(
        "--backend", choices=("auto", "tensorrt", "rtx"), default="auto", help="auto: tensorrt where there is a GPU"
    )
    parser.add_argument(
        "--batch", metavar="MIN,BEST,MAX", type=numbers, default=(1, 8, 64), help="batch sizes (default: 1,8,64)"
    )
    parser.add_argument(
        "--compute-capability",
        metavar="LIST",
        default="",
        help="rtx: for these GPUs, e.g. 8.6,8.9 (default: 8.0 and later)",
    )
    given = parser.parse_args(argv)
    if len(given.batch) != 3 or sorted(given.batch) != list(given.batch):
        raise UserError(f"--batch {','.join(map(str, given.batch))} is not smallest, best, largest", "--batch 1,8,64")

    from export.engines import choose_builder
    from export.pipeline import export

    builder = choose_builder(given.backend, given.batch, tuple(filter(None, given.compute_capability.split(","))))
    export(wish_of(given), builder)


if __name__ == "__main__":
    main()
