"""`python -m fer_dist.calibrate best.pth`: make a model as sure as it is right."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from fer_dist.commandline import Parser, run
from fer_dist.console import SPLIT_CODES, counting, natural, positive, say
from fer_dist.errors import UserError, printable

if TYPE_CHECKING:  # heavy at run time: --help must answer at once
    from fer_dist.engine.temperature import Fit

PROG = "python -m fer_dist.calibrate"
ABOUT = """\
Takes the label smoothing of the training back and finds the temperature that a checkpoint's logits are to be divided
by, so that of answers given with 80% about 80% are right (Guo et al. 2017). Writes best.calibrated.pth with both; what
is exported from that has them inside. No answer changes, only how sure it is. Prints how far sureness and being right
are apart before, and after on pictures that the temperature was not chosen on (five folds). A checkpoint that has a
temperature gets a new one in its place."""


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, or with 2 after a UserError."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    given = _parse(argv)
    out = given.out or given.path.with_name(f"{given.path.stem}.calibrated.pth")
    _require_names(given.path, out)

    from dataclasses import asdict, replace

    from fer_dist.data.split import require_part
    from fer_dist.engine.checkpoint import load, save
    from fer_dist.engine.score import answers
    from fer_dist.engine.temperature import fit
    from fer_dist.models.base import unsmoothed
    from fer_dist.serve.artifact import file_sha256
    from fer_dist.serve.dataset import data_settings, open_data
    from fer_dist.serve.runner import open_runner
    from fer_dist.world import World

    saved, sha256 = load(given.path), file_sha256(given.path)
    data = open_data(data_settings(saved.config), saved.spec, given.data, say, substitute=False)
    require_part(data.faces, SPLIT_CODES[given.split])
    rows_M = data.faces.part(SPLIT_CODES[given.split])
    with (
        open_runner(given.path, device=given.device) as runner,
        counting(f"asking {printable(given.path.name)}", len(rows_M)) as told,
    ):
        log_p_MK = answers(runner, data.faces, rows_M, World(), batch=given.batch, progress=told)
    smoothing = saved.spec.smoothing or _smoothing(saved.config)
    cold_MK = log_p_MK * saved.spec.temperature
    if smoothing and not saved.spec.smoothing:
        cold_MK = unsmoothed(cold_MK, smoothing)
    labels_M = data.faces.labels_N[rows_M]
    found = fit(cold_MK.numpy(), labels_M, given.seed, before_NK=log_p_MK.numpy())
    say(f"{found.count:,} pictures, {given.split} part of {data.source}")
    say("\n".join(_lines(found, saved.spec.temperature, smoothing)))
    about = {"data": PurePath(data.source).name, "key": data.faces.key, "split": given.split}
    entry = {**asdict(found), "smoothing": smoothing, **about, "checkpoint_sha256": sha256}
    made = replace(
        saved,
        spec=replace(saved.spec, smoothing=smoothing, temperature=found.temperature),
        provenance={**saved.provenance, "calibration": entry},
        resume={},
    )
    save(out, made)
    say(f"wrote {out}, to be exported and evaluated like {given.path.name}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(PROG, ABOUT)
    parser.add_argument("path", metavar="PATH", type=Path, help="a checkpoint such as best.pth")
    parser.add_argument("--data", metavar="PATH", help="the data set; default: that of its training")
    parser.add_argument("--split", choices=tuple(SPLIT_CODES), default="val", help="the part to fit on; default: val")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: best.calibrated.pth, beside best.pth")
    parser.add_argument("--seed", metavar="S", type=natural, default=0, help="of the five folds; default: 0")
    parser.add_argument("--batch", metavar="N", type=positive, default=64, help="pictures at a time; default: 64")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the model")
    return parser.parse_args(argv)


def _require_names(path: Path, out: Path) -> None:
    """A checkpoint comes in, and a new one goes out."""
    if path.suffix not in (".pth", ".safetensors"):
        raise UserError(
            f"{path} is no checkpoint: the temperature goes into one, and from there into what is exported",
            f"{PROG} best.pth",
        )
    if out.suffix != ".pth":
        raise UserError(f"--out {out} does not end in .pth", f"--out {out.with_suffix('.pth')}")
    if out.exists():
        raise UserError(f"{out} exists, and is not replaced", "--out FILE with another name, or remove it")


def _smoothing(config: Mapping[str, Any]) -> float:
    """Label smoothing of the training; 0 where the settings, which may be a stranger's, say none of ours."""
    from fer_dist.spec import MOST_SMOOTHING

    train = config.get("train")
    said = train.get("label_smoothing") if isinstance(train, Mapping) else None
    return said if type(said) is float and 0 <= said <= MOST_SMOOTHING else 0.0


def _lines(found: "Fit", before: float, smoothing: float) -> list[str]:
    """The numbers, for people."""
    old = "" if before == 1 else f", in place of {before:.4f}"
    worse = found.ece_cross_fitted > found.ece_before
    note = "note: the calibration error grew: it is too sure in one range and not sure enough in another, which one "
    return [
        *([f"label smoothing     {smoothing:g} in training, taken back"] if smoothing else []),
        f"temperature         {found.temperature:.4f}{old}",
        f"calibration error   {100 * found.ece_before:.2f}% before, {100 * found.ece_cross_fitted:.2f}% after, on "
        "pictures that it was not fitted on (15 bins, five folds)",
        f"log-likelihood      {-found.nll_before:.4f} nats a picture before, {-found.nll_after:.4f} after, "
        f"{-found.nll_cross_fitted:.4f} on pictures that it was not fitted on",
        *([f"{note}temperature cannot mend"] if worse else []),
    ]


if __name__ == "__main__":
    main()
