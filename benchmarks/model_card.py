"""The model card: every number out of JSON files that were measured, the words around them from a template.

    python -m benchmarks.model_card reproduced --failures docs/failures.md

Reads what `python -m benchmarks.reproduce` leaves in a folder, and writes ship/measured.json, which holds all numbers,
and ship/MODEL_CARD.md, which is `render(measured.json)` and nothing else.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fer_dist.engine.checkpoint import load, write_atomically
from fer_dist.errors import UserError
from fer_dist.serve.artifact import file_sha256, read_sidecar
from fer_dist.serve.shipped import NAME, WEIGHTS

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
CHECKPOINT, FLOAT = "best.calibrated.pth", "best.calibrated.onnx"
_SCORES = (
    "accuracy",
    "accuracy_interval_95",
    "accuracy_clean",
    "accuracy_clean_interval_95",
    "count",
    "count_clean",
    "macro_f1",
    "loss",
    "ece",
    "classes",
    "confusion",
)
_PARITY = ("top1_agreement", "accuracy_reference", "accuracy_candidate", "accuracy_delta", "kl", "count", "of")


def main() -> None:
    """Write measured.json and MODEL_CARD.md into FOLDER/ship."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--failures", metavar="FILE", type=Path, help="what the mistakes look like, Markdown, by hand")
    given = parser.parse_args()
    write(given.folder, given.failures)
    print(f"wrote {given.folder / 'ship' / 'MODEL_CARD.md'} and measured.json")


def write(folder: Path, failures: Path | None) -> None:
    """Both files of `folder/ship`.

    Raises:
        UserError: a file is missing or of another model.
    """
    facts = gather(folder, failures.read_text(encoding="utf-8").strip() if failures else "")
    raw = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "ship" / "measured.json", lambda file: file.write(raw.encode()))
    write_atomically(folder / "ship" / "MODEL_CARD.md", lambda file: file.write(render(facts).encode()))


def gather(folder: Path, failures: str) -> dict[str, Any]:
    """Every number of the card, plain values; names of files, no folders.

    Args:
        failures: what mistakes look like; empty: nobody has looked.

    Raises:
        UserError: a file is missing or of another model.
    """
    shipped = folder / "ship" / NAME
    about = read_sidecar(shipped)
    reports = {tta: _json(folder / f"evaluation-{tta}" / "report.json") for tta in ("none", "flip")}
    for report in reports.values():
        found = {one["checkpoint_sha256"] for one in report["artifacts"]}
        if found != {about.checkpoint_sha256} or report["split"] != "val":
            raise UserError(
                f"the reports in {folder} are of another model, or not of the validation part",
                "python -m benchmarks.reproduce makes them again",
            )
    robustness = _json(folder / "robustness.json") if (folder / "robustness.json").exists() else {"rows": []}
    if robustness.get("limit") is not None:
        raise UserError(
            f"{folder / 'robustness.json'} is of {robustness['limit']} pictures, not of all", "measure without --limit"
        )
    return {
        "artifact": {
            "name": NAME,
            "precision": about.precision,
            "bytes": about.bytes,
            "float_bytes": (folder / FLOAT).stat().st_size,
            "sha256": about.sha256,
            "weights": WEIGHTS,
            "weights_bytes": (folder / "ship" / WEIGHTS).stat().st_size,
            "weights_sha256": file_sha256(folder / "ship" / WEIGHTS),
            "checkpoint_sha256": about.checkpoint_sha256,
            "built_with": about.built_with,
            "made": list(about.made),
        },
        "data": {"name": Path(reports["none"]["data"]).name, "key": reports["none"]["key"]},
        "evaluation": {
            tta: {name: _scores(report, path) for name, path in (("shipped", NAME), ("float", FLOAT))}
            for tta, report in reports.items()
        },
        "labels": list(about.spec.labels.names),
        "parity": {name: about.parity[name] for name in _PARITY},
        "calibration": load(folder / CHECKPOINT).provenance["calibration"],
        "robustness": [_spoilt(row) for row in robustness["rows"]],
        "training": _json(folder / "training.json"),
        "failures": failures,
    }


def render(facts: dict[str, Any]) -> str:
    """The card, Markdown."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.2f}%"
    environment.filters["points"] = lambda share: f"{100 * share:+.2f}"
    environment.filters["interval"] = lambda both: f"{100 * both[0]:.1f} to {100 * both[1]:.1f}"
    return environment.get_template(TEMPLATE.name).render(**facts, mixed=mixed(facts), worst=worst(facts)) + "\n"


def mixed(facts: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """The five most frequent mistakes: true class, answer, how often, of how many."""
    rows, names = facts["evaluation"]["none"]["shipped"]["confusion"], facts["labels"]
    found = [
        (names[true], names[answer], count, sum(row))
        for true, row in enumerate(rows)
        for answer, count in enumerate(row)
        if true != answer
    ]
    return sorted(found, key=lambda one: -one[2])[:5]


def worst(facts: dict[str, Any]) -> str:
    """What costs the shipped file most; empty: not measured."""
    rows = facts["robustness"]
    return min(rows, key=lambda row: row["shipped"])["corruption"] if rows else ""


def _scores(report: dict[str, Any], name: str) -> dict[str, Any]:
    """Of one artifact, by the name of its file."""
    for one in report["artifacts"]:
        if Path(one["artifact"]).name == name:
            return {score: one[score] for score in _SCORES}
    raise UserError(f"the report has nothing of {name}", "python -m benchmarks.reproduce makes it again")


def _spoilt(row: dict[str, Any]) -> dict[str, Any]:
    by_name = {Path(path).name: accuracy for path, accuracy in row["artifacts"].items()}
    return {"corruption": row["corruption"], "shipped": by_name[NAME], "float": by_name[FLOAT]}


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}", "python -m benchmarks.reproduce makes it") from None
    return found


if __name__ == "__main__":
    main()
