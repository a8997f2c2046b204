"""`python -m fer_dist.checkpoint PATH`: what a checkpoint or a run folder holds, and whether it is whole."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fer_dist.commandline import Parser, run
from fer_dist.errors import UserError, printable

PROG = "python -m fer_dist.checkpoint"
ABOUT = """\
Describes a checkpoint (.pth or .safetensors): architecture, metrics, settings, where it came from, and whether
it is whole. For a run folder, a line for each of its checkpoints. Leaves with 2 where one is damaged."""


def main() -> None:
    """Run the command with `sys.argv`; leaves with 0, or with 2 after a UserError."""
    run(lambda: _main(sys.argv[1:]))


def _main(argv: Sequence[str]) -> None:
    parser = Parser(PROG, ABOUT)
    parser.add_argument("path", metavar="PATH", type=Path, help="a checkpoint, or a run folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--safetensors", metavar="FILE", type=Path, help="write the model as safetensors, for sharing")
    given = parser.parse_args(argv)
    if given.safetensors is not None:
        return _share(given.path, given.safetensors)

    from fer_dist.engine.describe import describe, describe_folder

    found = describe_folder(given.path) if given.path.is_dir() else [describe(given.path)]
    if given.json:
        text = json.dumps(found if given.path.is_dir() else found[0], indent=1, default=str)
    else:
        text = "\n".join(map(_line, found)) if given.path.is_dir() else _page(found[0])
    # A file from a stranger may hold what a terminal would obey.
    print("\n".join(map(printable, text.split("\n"))))
    damaged = [one for one in found if not one["valid"]]
    if damaged:
        raise UserError(damaged[0]["reason"], f"use another one of the {len(found)}" if len(found) > 1 else "")
    return None


def _share(path: Path, out: Path) -> None:
    """Write a checkpoint as safetensors."""
    from fer_dist.engine.checkpoint import load, write_safetensors

    if out.suffix != ".safetensors":
        raise UserError(f"{out} does not end in .safetensors", f"--safetensors {out.with_suffix('.safetensors')}")
    if out.exists():
        raise UserError(f"{out} exists", "another name, or remove it")
    sha256 = write_safetensors(out, load(path))
    print(f"wrote {out}\nsha256 {sha256}\ntell both: a hash is what a file can be checked by")


def _line(one: dict[str, Any]) -> str:
    name = f"{one['path']:<48}"
    if not one["valid"]:
        return f"{name} DAMAGED  {one['reason']}"
    at, record = one["resume"], one["record"]
    score = f"epoch {record['epoch']}, accuracy {100 * record['val']['accuracy']:.2f}%" if record else "in epoch 1"
    where = f"step {at['step']}, to go on from" if at else "weights only"
    return f"{name} valid    {one['bytes'] / 2**20:.1f} MiB  {score}, {where}"


def _page(one: dict[str, Any]) -> str:
    rows = {"file": one["path"], "valid": "yes" if one["valid"] else f"no: {one['reason']}"}
    if "sha256" in one:
        rows |= {"size": f"{one['bytes']:,} bytes", "sha256": one["sha256"]}
    if one["valid"]:
        rows |= _contents(one)
    lines = [f"{name:<12} {value}" for name, value in rows.items()]
    if one["valid"]:
        lines += ["settings", *(f"  {line}" for line in yaml.safe_dump(one["config"], sort_keys=False).splitlines())]
    return "\n".join(lines)


def _contents(one: dict[str, Any]) -> dict[str, str]:
    spec, record, origin, at = one["spec"], one["record"], one["provenance"], one["resume"]
    shown = spec["input"]
    rows = {
        "model": f"{spec['arch']}, {one['parameters'] / 1e6:.2f} M numbers",
        "options": ", ".join(f"{name} {value}" for name, value in spec["options"].items()),
        "input": f"uint8 [N, 1, {shown['size']}, {shown['size']}], {shown['image_size']} pixels wide inside",
        "labels": ", ".join(spec["labels"]),
    }
    if record:
        val = record["val"]
        score = f"accuracy {100 * val['accuracy']:.2f}%, macro-F1 {100 * val['macro_f1']:.2f}%, loss {val['loss']:.4f}"
        rows["epoch"] = f"{record['epoch']}, step {record['step']}, training loss {record['train_loss']:.4f}"
        rows["validation"] = f"{score}, {val['count']:,} pictures"
    if at:
        rows["goes on"] = (
            f"after step {at['step']}: {at['epoch']} epochs, {at['steps_of_next_epoch']} steps of the next"
        )
    rows["made by"] = ", ".join(f"{name} {origin[name]}" for name in ("fer_dist", "commit", "torch") if name in origin)
    rows["made on"] = ", ".join(str(origin[name]) for name in ("device", "started") if name in origin)
    return rows


if __name__ == "__main__":
    main()
