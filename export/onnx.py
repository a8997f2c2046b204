"""`python -m export.onnx best.pth`: one ONNX file that takes stored pictures and has passed the gate."""

import sys
from collections.abc import Sequence

from export.console import add_export, wish_of
from fer_dist.commandline import Parser, run

PROG = "python -m export.onnx"
ABOUT = """\
Makes best.onnx (best.fp16.onnx; best.int8.onnx and best.int8.cpu.onnx) from best.pth, with a JSON file beside each,
after comparing each with the checkpoint over the whole validation set. An artifact that is not the model keeps the
name *.rejected, and the command leaves with 3.

int8 makes two files: best.int8.onnx is what TensorRT reads, best.int8.cpu.onnx what CPUs are fast at."""


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, with 2 after a UserError, or with 3: rejected."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    parser = Parser(PROG, ABOUT)
    add_export(parser)
    given = parser.parse_args(argv)

    from export.pipeline import export

    export(wish_of(given))


if __name__ == "__main__":
    main()
