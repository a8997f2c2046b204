"""The folder of a run: found or made once, never overwritten, and able to explain itself."""

import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import fer_dist
from fer_dist.config import Config
from fer_dist.engine.checkpoint import write_atomically
from fer_dist.errors import UserError
from fer_dist.world import World


def open_run(config: Config, world: World) -> tuple[Path, bool]:
    """The run folder, the same on every rank, and whether the run goes on in it.

    Rank 0 decides. A run that its launcher has restarted finds the folder of its first start.

    Raises:
        UserError: the folder exists and the run is not to be resumed, or cannot be made.
    """
    found: list[tuple[Path, bool]] = []
    world.only_first(lambda: found.append(_decide(config, world)))
    return world.from_first(found[0] if world.first else (Path(), False))


def provenance(world: World, data_key: str) -> dict[str, Any]:
    """What a stranger needs to know of where a run came from; plain values."""
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    return {
        "fer_dist": fer_dist.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "device": gpu or f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads per rank",
        "world_size": world.size,
        "data_key": data_key,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Plain values as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def _decide(config: Config, world: World) -> tuple[Path, bool]:
    base = Path(config.run.dir)
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0

    def ours(folder: Path) -> bool:  # a restart must not enter a folder that its first start was refused
        made_by, now = _launch_of(folder), _launch(world)
        again = (("launch", world.restarted), ("slurm", requeued))
        return any(is_again and key in now and made_by.get(key) == now[key] for key, is_again in again)

    again = config.run.resume != "never"
    if config.run.name is None:
        folders = sorted(base.glob("*/launch.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in folders if again else ():
            if ours(path.parent):
                return path.parent, True
        stem = re.sub(r"[^\w.-]+", "-", config.model.arch) + time.strftime("-%Y%m%d-%H%M%S")
        return _make([base / f"{stem}{'' if i == 0 else f'-{i}'}" for i in range(100)], world), False
    folder = base / config.run.name
    if folder.exists() and again and (ours(folder) or config.run.resume == "auto"):
        return folder, True
    return _make([folder], world), False


def _make(candidates: list[Path], world: World) -> Path:
    for folder in candidates:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder}: {error.strerror}", "--run.dir FOLDER") from None
        if launch := _launch(world):
            write_json(folder / "launch.json", launch)
        return folder
    raise UserError(
        f"the run folder {candidates[0]} exists; a run is never overwritten",
        "--run.name ANOTHER, or --run.resume auto to go on with it",
    )


def _launch(world: World) -> dict[str, Any]:
    """What the starts of one run have in common: torchrun's launch, and SLURM's job, which may launch several."""
    found = {"launch": world.launch, "slurm": os.environ.get("SLURM_JOB_ID", "")}
    return {name: value for name, value in found.items() if value}


def _launch_of(folder: Path) -> dict[str, Any]:
    """The launch that made a run folder; empty where it is not known."""
    try:
        found = json.loads((folder / "launch.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _commit() -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip() or "unknown"
