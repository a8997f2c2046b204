"""From FER2013's archive to the files that ship, by the commands that anyone can type, each printed before it runs.

    python -m benchmarks.reproduce --data archive.zip --weights mobilenet_v2.pth
    python -m benchmarks.reproduce --data archive.zip --run runs/NAME            a model that is trained already
    python -m benchmarks.reproduce --data archive.zip --recipe ONE,TWO           TWO starts from the best of ONE
    python -m benchmarks.reproduce --data archive.zip --into fer_dist/assets     and puts it into the package

Trains a recipe, or several that go on from each other, fits the temperature, exports to int8 (float16 where int8 loses
more than 0.5 points), evaluates with and without mirror images, measures robustness, writes the model card. What is
there already, and was made by the same command from the same files, is not made again: after a break the same line goes
on, inside the training as well.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.model_card import CHECKPOINT, FLOAT, write
from fer_dist.commandline import run
from fer_dist.console import say
from fer_dist.engine.checkpoint import load, write_atomically, write_safetensors
from fer_dist.errors import EXIT_REJECTED, UserError
from fer_dist.serve.artifact import file_sha256, read_sidecar, sidecar
from fer_dist.serve.shipped import NAME, WEIGHTS

MOST_LOST = 0.005
"""How much accuracy int8 may lose."""
MOST_BYTES = 6_000_000
PATHS = (("data", "path"), ("data", "ferplus"), ("data", "cache_dir"), ("model", "weights"), ("run", "dir"))
"""Settings of a run that name folders of a machine."""
INT8, HALF = "best.calibrated.int8.cpu.onnx", "best.calibrated.fp16.onnx"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be made, and where.

    Attributes:
        data: the archive; its name alone stands in what ships.
        folder: everything is made in it.
        runs: the run folders of the training, one for each recipe.
    """

    data: Path
    folder: Path
    runs: tuple[Path, ...]


def main() -> None:
    """Run all steps; leaves with 2 after a UserError."""
    run(_main)


def _main() -> None:
    given = _parse()
    if not given.data.exists():
        raise UserError(f"{given.data} does not exist", "--data archive.zip with the pictures of FER2013")
    for path in (given.weights, given.failures):
        if path is not None and not path.is_file():
            raise UserError(f"{path} is no file", "name one that is there, or leave it out")
    (given.out / "ship").mkdir(parents=True, exist_ok=True)
    runs = given.run or [given.out / "runs" / name for name in given.recipe]
    work = Work(data=given.data, folder=given.out, runs=tuple(runs))
    if given.run is None:
        train(work, given)
    for run_folder in work.runs:
        if not (run_folder / "best.pth").is_file():
            raise UserError(f"{run_folder / 'best.pth'} is not there", "--run FOLDER with a run that has finished")
    calibrate(work, work.runs[-1] / "best.pth")
    ship(work, export(work))
    measure(work)
    write(work.folder, given.failures)
    say(f"wrote {work.folder / 'ship' / 'MODEL_CARD.md'}")
    if given.into is not None:
        deliver(work, given.into)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="PATH", type=Path, required=True)
    parser.add_argument("--weights", metavar="FILE", type=Path, help="MobileNetV2 of torchvision; default: its cache")
    parser.add_argument(
        "--recipe",
        metavar="NAME[,NAME]",
        type=lambda text: text.split(","),
        default=["patt_lite_best"],
        help="each goes on from the best model of the one before",
    )
    parser.add_argument(
        "--run",
        metavar="FOLDER",
        type=Path,
        action="append",
        help="a run that has finished, in place of a training; once for each that the last went on from, in order",
    )
    parser.add_argument("--ranks", metavar="N", type=int, default=2, help="of the training; default: 2")
    parser.add_argument("--failures", metavar="FILE", type=Path, help="for the card: what mistakes look like")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("reproduced"))
    parser.add_argument("--into", metavar="DIR", type=Path, help="a folder that gets what ships")
    return parser.parse_args()


def train(work: Work, given: argparse.Namespace) -> None:
    """Each recipe, from its newest checkpoint; of a run that has finished, nothing."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={given.ranks}"]
    weights: Path | None = given.weights
    inputs: tuple[Path, ...] = ()
    for recipe, folder in zip(given.recipe, work.runs, strict=True):
        words = ["fer_dist.train", "--config", recipe, "--data", str(work.data)]
        words += ["--model.weights", str(weights)] if weights else []
        words += ["--run.dir", str(folder.parent), "--run.name", folder.name, "--run.resume", "auto"]
        best = folder / "best.pth"
        _once(work, f"train-{recipe}", [*launcher, "-m", *words], inputs=inputs, outputs=(best, folder / "report.json"))
        weights, inputs = best, (best,)


def calibrate(work: Work, best: Path) -> None:
    """The temperature."""
    out = work.folder / CHECKPOINT
    words = ["fer_dist.calibrate", str(best), "--data", str(work.data), "--out", str(out)]
    _once(work, "calibrate", _python(*words), inputs=(best, work.data), outputs=(out,), replaces=True)


def export(work: Work) -> Path:
    """The ONNX file that ships: int8 for CPUs, or float16 where that loses too much or is refused."""
    source, int8, half = (work.folder / name for name in (CHECKPOINT, INT8, HALF))
    words = ["export.onnx", str(source), "--data", str(work.data), "--precision"]
    inputs = (source, work.data)
    # Refused, it leaves with 3, and what was made of the other form of int8 may be there nevertheless.
    _once(work, "export-int8", _python(*words, "int8"), inputs=inputs, outputs=(), may_reject=True)
    if (lost := _lost(int8, source)) is not None and lost <= MOST_LOST:
        say(f"int8 is {-100 * lost:+.2f} points from the checkpoint: it ships")
        return int8
    told = "was refused" if lost is None else f"loses {100 * lost:.2f} points"
    say(f"int8 {told}, at most {100 * MOST_LOST:.1f} are allowed: float16 ships")
    _once(work, "export-fp16", _python(*words, "fp16"), inputs=inputs, outputs=(half, work.folder / FLOAT))
    return half


def _lost(path: Path, checkpoint: Path) -> float | None:
    """Accuracy that an artifact of a checkpoint loses, 0..1; None: there is none that passed."""
    if not path.exists():
        return None
    about = read_sidecar(path)
    if about.checkpoint_sha256 != file_sha256(checkpoint) or about.parity["passed"] is not True:
        return None
    return float(-about.parity["accuracy_delta"])


def ship(work: Work, made: Path) -> None:
    """A copy under its own name, with its JSON file, and the weights; in none of them stand folders of this machine."""
    about = json.loads(sidecar(made).read_text(encoding="utf-8"))
    whole = about["parity"]
    if whole["count"] != whole["of"] or about["bytes"] > MOST_BYTES:
        raise UserError(
            f"{made} has {about['bytes']:,} bytes (at most {MOST_BYTES:,}) and was judged on {whole['count']:,} of "
            f"{whole['of']:,} pictures",
            "export it again without --limit, or train a smaller model",
        )
    checkpoint = load(work.folder / CHECKPOINT)
    paths = {checkpoint.config[part].get(name) for part, name in PATHS} | {about["data"].get("data", {}).get("path")}
    paths = {str(work.data), *filter(None, paths)}
    plain = json.dumps(_named(about, paths), indent=1) + "\n"
    target = work.folder / "ship" / NAME
    write_atomically(target, lambda file: file.write(made.read_bytes()))
    write_atomically(sidecar(target), lambda file: file.write(plain.encode()))
    read_sidecar(target)
    named = {part: _named(getattr(checkpoint, part), paths) for part in ("config", "provenance")}
    write_safetensors(work.folder / "ship" / WEIGHTS, replace(checkpoint, **named), half=True)


def _named(tree: Any, paths: set[str]) -> Any:
    """The same plain values, with paths in texts shortened to their names."""
    if isinstance(tree, dict):
        return {name: _named(value, paths) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_named(value, paths) for value in tree]
    if isinstance(tree, str):
        for path in sorted(paths, key=len, reverse=True):
            tree = tree.replace(path, Path(path).name)
    return tree


def measure(work: Work) -> None:
    """Scores of the shipped file and of the float32 one, with and without mirror images; robustness; the training."""
    both = (work.folder / "ship" / NAME, work.folder / FLOAT)
    artifacts, inputs = [str(path) for path in both], (*both, work.data)
    for tta in ("none", "flip"):
        out = work.folder / f"evaluation-{tta}"
        words = ["fer_dist.evaluate", *artifacts, "--data", str(work.data), "--split", "val", "--tta", tta]
        words += ["--out", str(out)]
        _once(work, f"evaluate-{tta}", _python(*words), inputs=inputs, outputs=(out / "report.json",))
    table, record = work.folder / "robustness.json", work.folder / "training.json"
    words = ["benchmarks.robustness", *artifacts, "--data", str(work.data), "--json", str(table)]
    _once(work, "robustness", _python(*words), inputs=inputs, outputs=(table,))
    words = ["benchmarks.training_record", *map(str, work.runs), "--json", str(record)]
    bests = [folder / "best.pth" for folder in work.runs]
    _once(work, "training-record", _python(*words), inputs=bests, outputs=(record,))


def deliver(work: Work, into: Path) -> None:
    """Copy what ships, whole files only."""
    into.mkdir(parents=True, exist_ok=True)
    for name in (NAME, f"{NAME}.json", WEIGHTS, "measured.json", "MODEL_CARD.md"):
        raw = (work.folder / "ship" / name).read_bytes()
        write_atomically(into / name, lambda file, raw=raw: file.write(raw))  # type: ignore[misc]
        say(f"wrote {into / name} ({len(raw):,} bytes)")


def _python(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def _once(
    work: Work,
    name: str,
    command: Sequence[str],
    *,
    inputs: Sequence[Path],
    outputs: Sequence[Path],
    may_reject: bool = False,
    replaces: bool = False,
) -> None:
    """Run a command, unless it has run with the same words on the same files, and its outputs are there.

    Args:
        may_reject: leaving because an artifact was refused is an answer, too.
        replaces: remove the outputs first: the command replaces nothing.

    Raises:
        UserError: it failed.
    """
    stamp = work.folder / "steps" / f"{name}.json"
    asked = {"command": list(command[1:]), "inputs": {str(path): _digest(path) for path in inputs}}
    if stamp.exists() and json.loads(stamp.read_text()) == asked and all(path.exists() for path in outputs):
        say(f"== {name}: done before")
        return
    stamp.parent.mkdir(exist_ok=True)
    stamp.unlink(missing_ok=True)
    for path in outputs if replaces else ():
        path.unlink(missing_ok=True)
    say(f"== {name}: python {' '.join(command[1:])}")
    began = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code not in ((0, EXIT_REJECTED) if may_reject else (0,)):
        raise UserError(f"{name} left with exit code {code}", "put right what it says; the same line then goes on")
    if lacks := [str(path) for path in outputs if not path.exists()]:
        raise UserError(f"{name} has not made {', '.join(lacks)}", "the same line tries again")
    say(f"== {name}: {time.monotonic() - began:.0f} s")
    write_atomically(stamp, lambda file: file.write(json.dumps(asked, indent=1).encode()))


def _digest(path: Path) -> str:
    """SHA-256 of a file; of a folder, the names and sizes below it."""
    if path.is_dir():
        return repr([(str(p.relative_to(path)), p.stat().st_size) for p in sorted(path.rglob("*")) if p.is_file()])
    return file_sha256(path)


if __name__ == "__main__":
    main()
