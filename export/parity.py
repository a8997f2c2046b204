"""`python -m export.parity A B`: is the artifact B the model that A is?"""

import sys
from collections.abc import Sequence
from pathlib import Path

from export.console import add_data
from fer_dist.commandline import Parser, run
from fer_dist.console import say
from fer_dist.errors import Rejected, printable

PROG = "python -m export.parity"
ABOUT = """\
Asks two artifacts (.pth, .safetensors, .onnx, .engine) for every picture of the validation set of the data that the
model was judged on, and compares the answers of B with those of A, the reference. Leaves with 3 where B is another
model: for float32 one answer that differs, for float16 0.3 % of them, for int8 3 %; see the report."""


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, with 2 after a UserError, or with 3: B is not A."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    parser = Parser(PROG, ABOUT)
    parser.add_argument("a", metavar="A", type=Path, help="the reference, such as best.pth")
    parser.add_argument("b", metavar="B", type=Path, help="what is compared with it, such as best.engine")
    add_data(parser)
    given = parser.parse_args(argv)

    from export.answers import ask_aloud
    from export.gate import compare, require_same_model, show, tolerance_of
    from fer_dist.serve.artifact import PRECISIONS
    from fer_dist.serve.dataset import open_data, settings_of
    from fer_dist.serve.runner import open_runner

    tolerance_of("fp32", given.tolerance)  # a wrong text is told before the work
    with open_runner(given.a) as reference, open_runner(given.b) as candidate:
        if len(reference.spec.labels) != len(candidate.spec.labels):
            counts = [len(runner.spec.labels) for runner in (candidate, reference)]
            raise Rejected(f"{given.b} has {counts[0]} classes, {given.a} {counts[1]}")
        if reference.checkpoint_sha256 != candidate.checkpoint_sha256:
            say(f"{given.a} and {given.b} were made from different checkpoints")
        settings = settings_of(given.a) or settings_of(given.b)
        pictures = open_data(settings, reference.spec, given.data, say).validation(given.limit)
        answers, names = [], []
        for runner in (reference, candidate):
            answers.append(ask_aloud(runner, pictures))
            names.append(printable(f"{runner.path} ({runner.runs_on})"))
        tolerance = tolerance_of(max(reference.precision, candidate.precision, key=PRECISIONS.index), given.tolerance)
        report = compare(answers[0], answers[1], pictures, tolerance, names=(names[0], names[1]))
        report = require_same_model(report, candidate, reference.spec, "")
    say(show(report))
    report.require()


if __name__ == "__main__":
    main()
