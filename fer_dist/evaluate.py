"""`python -m fer_dist.evaluate [ARTIFACT...] --data PATH --split val|test`: how good models are, and where they err."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fer_dist.commandline import Parser, run
from fer_dist.console import SPLIT_CODES, counting, positive, say
from fer_dist.errors import UserError, printable

if TYPE_CHECKING:  # heavy at run time: --help must answer at once
    from fer_dist.serve.evaluation import Judged
    from fer_dist.serve.exam import Exam, Task

PROG = "python -m fer_dist.evaluate"
ABOUT = """\
Scores artifacts (.pth, .safetensors, .onnx, .engine) on the validation or test part of a data set: accuracy with its
95% interval, the same without pictures that have an exact copy in a part that trained or chose, macro-F1,
precision and recall of each class, calibration; of several artifacts also whether they differ (McNemar's test).
Runs under torchrun, too. With --out: report.json and report.html, one page with everything in it."""


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, or with 2 after a UserError."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    parser = _parser()
    given = parser.parse_args(argv)
    if given.batch > 65_536 or given.mistakes > 1000:
        parser.error(f"--batch is {given.batch}, --mistakes {given.mistakes}; expected at most 65536 and 1000")

    from fer_dist.serve.evaluation import evaluate
    from fer_dist.serve.exam import Task
    from fer_dist.serve.shipped import require_shipped
    from fer_dist.world import join

    task = Task(
        paths=tuple(given.paths) or (require_shipped(),),
        split=SPLIT_CODES[given.split],
        data=given.data,
        train_data=given.train_data,
        views=given.tta,
        batch=given.batch,
        device=given.device,
        provider=given.provider,
        threads=given.threads,
        shown=given.mistakes,
    )
    with join(given.device) as world:
        if given.out is not None:
            world.only_first(lambda: _require_writable(given.out))
        exam, judged = evaluate(task, world, say, counting)
        world.only_first(lambda: _tell(task, exam, judged, given.out))


def _parser() -> Parser:
    parser = Parser(PROG, ABOUT)
    parser.add_argument(
        "paths", metavar="ARTIFACT", type=Path, nargs="*", help="best.pth, ...; default: the model that ships"
    )
    parser.add_argument("--data", metavar="PATH", help="the data set; default: that of the first artifact's training")
    parser.add_argument("--split", choices=tuple(SPLIT_CODES), default="val", help="the part that judges; default: val")
    parser.add_argument(
        "--train-data", metavar="PATH", help="where pictures are that trained (and, for test, chose), if not in --data"
    )
    parser.add_argument(
        "--tta",
        choices=("none", "flip", "ten_crop"),
        default="none",
        help="average over the mirror image, or over five crops and theirs; default: none",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder for report.json and report.html")
    parser.add_argument("--mistakes", metavar="N", type=positive, default=24, help="shown in the report; default: 24")
    parser.add_argument("--batch", metavar="N", type=positive, default=64, help="pictures at a time; default: 64")
    parser.add_argument("--threads", metavar="N", type=positive, help="of the CPU, of each rank")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of checkpoints")
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda", "tensorrt"), default="auto", help="of ONNX files")
    return parser


def _tell(task: "Task", exam: "Exam", judged: "list[Judged]", out: Path | None) -> None:
    """Print the scores, and write the report."""
    from fer_dist.data.faces import SPLITS
    from fer_dist.serve.evaluation import to_dict
    from fer_dist.serve.htmlreport import html

    plain = to_dict(task, exam, judged)
    say(f"{len(exam.rows_M):,} pictures, {SPLITS[exam.split]} part of {exam.source}, tta {task.views}")
    for note in exam.notes:
        say(f"note: {note}")
    _print_scores(judged)
    for c in plain["comparisons"]:
        say(
            f"only {c['first']} is right: {c['only_first']:,}, only {c['second']}: {c['only_second']:,}; "
            f"McNemar p {c['p']:.2g} ({c['method']}), of all comparisons {c['p_holm']:.2g}"
        )
    if out is None:
        say("--out DIR writes the report, with pictures")
        return
    raw = json.dumps(plain, indent=1, allow_nan=False) + "\n"
    _write(out / "report.json", raw.encode())
    _write(out / "report.html", html(task, exam, judged))
    say(f"wrote {out / 'report.json'} and {out / 'report.html'}")


def _print_scores(judged: "list[Judged]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from fer_dist.serve.htmlreport import interval, percent, short_names

    console = Console(highlight=False, markup=False, soft_wrap=True, emoji=False)
    look = box.SIMPLE_HEAD if console.is_terminal else None
    if not console.is_terminal:
        console.width = 1000  # a file has no edge, and nothing of a number may be cut off
    table = Table("artifact", box=look)
    for name in ("accuracy", "95% interval", "without copies", "95% interval", "macro-F1", "calibration error"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in judged:
        clean = (
            ("?", "")
            if one.clean is None or not one.clean.count
            else (
                f"{percent(one.clean.accuracy)} of {one.clean.count:,}",
                interval(one.clean.accuracy, one.clean.count),
            )
        )
        scores = percent(one.whole.accuracy), interval(one.whole.accuracy, one.whole.count)
        name = printable(str(one.path))
        table.add_row(name, *scores, *clean, percent(one.whole.macro_f1), percent(one.calibration.ece))
    console.print(table)
    for one, short in zip(judged, short_names(judged), strict=True):
        title = "class" if len(judged) == 1 else f"class, {short}"
        table = Table(title, box=look)
        for name in ("precision", "recall", "F1", "pictures"):
            table.add_column(name, justify="right")
        rows = zip(one.whole.precision, one.whole.recall, one.whole.f1, one.whole.confusion_KK.sum(1), strict=True)
        for label, (precision, recall, f1, support) in zip(one.spec.labels.names, rows, strict=True):
            table.add_row(printable(label), percent(precision), percent(recall), percent(f1), f"{support:,}")
        console.print(table)


def _require_writable(out: Path) -> None:
    """Make the folder, and find out before the long work whether files can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(f"cannot write into {out}: {error.strerror or error}") from None


def _write(path: Path, raw: bytes) -> None:
    from fer_dist.engine.checkpoint import write_atomically

    try:
        write_atomically(path, lambda file: file.write(raw))
    except UserError as error:
        raise _unwritable(error.problem) from None


def _unwritable(problem: str) -> UserError:
    return UserError(printable(problem), "free some space, or --out DIR with a folder that can be written")


if __name__ == "__main__":
    main()
