"""The folder of a run: found or made once, never overwritten, and able to explain itself."""

import errno
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import fer_dist
from fer_dist.config import Config
from fer_dist.engine.checkpoint import write_atomically
from fer_dist.engine.same import settings_digest
from fer_dist.errors import UserError
from fer_dist.world import World

STARTS = "starts.jsonl"
"""A line for each start of a run."""
HOLD_S = 30.0
"""How long a start waits for another process to leave the run folder."""
REQUEUED_HOLD_S = 120.0
"""The same after a requeue of SLURM: NFS keeps the lock of a node that has died for 90 s."""


def open_run(config: Config, world: World) -> tuple[Path, bool]:
    """The run folder, the same on every rank, and whether the run goes on in it.

    Rank 0 decides. A run that its launcher has restarted finds the folder of its first start.

    Raises:
        UserError: the folder exists and the run is not to be resumed, or cannot be made.
    """
    found: list[tuple[Path, bool]] = []
    world.only_first(lambda: found.append(_decide(config, world)))
    return world.from_first(found[0] if world.first else (Path(), False))


class Hold:
    """The run folder is this process's alone to write until `release`, or until the process is gone.

    An orphan of a launcher that was killed may still be saving when the next start comes. The lock is on
    `starts.jsonl`; file systems that know no locks are used without.

    Raises:
        UserError: another process writes there, and is not gone within HOLD_S.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / STARTS
        try:
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}", "free some space, or --run.dir FOLDER") from None
        patience = REQUEUED_HOLD_S if _requeued() else HOLD_S
        deadline = time.monotonic() + patience
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR):
                    return None  # this file system has no locks
            if time.monotonic() > deadline:
                self.release()
                raise UserError(
                    f"another process writes into {folder} and has not left within {patience:.0f} s",
                    "wait for it or end it, or another --run.name",
                )
            time.sleep(0.1)

    def release(self) -> None:
        """Let others write there."""
        os.close(self._file)


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
    requeued = _requeued()

    def ours(folder: Path) -> bool:  # a restart must not enter a folder that its first start was refused
        made_by, now = _launch_of(folder), _launch(config, world)

        def same(*keys: str) -> bool:
            return all(key in now and made_by.get(key) == now[key] for key in keys)

        # A job may launch several trainings: a requeued one finds its own by its settings.
        return (world.restarted and same("launch")) or (requeued and same("slurm", "settings"))

    again = config.run.resume != "never"
    if config.run.name is None:
        folders = sorted(base.glob("*/launch.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in folders if again else ():
            if ours(path.parent):
                return path.parent, True
        stem = re.sub(r"[^\w.-]+", "-", config.model.arch) + time.strftime("-%Y%m%d-%H%M%S")
        return _make([base / f"{stem}{'' if i == 0 else f'-{i}'}" for i in range(100)], config, world), False
    folder = base / config.run.name
    if folder.exists() and again and (ours(folder) or config.run.resume == "auto"):
        return folder, True
    return _make([folder], config, world), False


def _requeued() -> bool:
    """Whether SLURM has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def _make(candidates: list[Path], config: Config, world: World) -> Path:
    launch = _launch(config, world)
    for folder in candidates:
        try:
            if not launch:
                folder.mkdir(parents=True)
                return folder
            if folder.exists():
                continue
            # A folder without it would not be known to the next start as its own: there with it, or not at all.
            temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
            temporary.mkdir(parents=True)
            try:
                write_json(temporary / "launch.json", launch)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                continue
            raise UserError(f"cannot make the run folder {folder}: {error.strerror}", "--run.dir FOLDER") from None
        return folder
    raise UserError(
        f"the run folder {candidates[0]} exists; a run is never overwritten",
        "--run.name ANOTHER, or --run.resume auto to go on with it",
    )


def _launch(config: Config, world: World) -> dict[str, Any]:
    """What the starts of one run have in common: torchrun's launch, or SLURM's job and its settings."""
    found = {"launch": world.launch, "slurm": os.environ.get("SLURM_JOB_ID", "")}
    found = {name: value for name, value in found.items() if value}
    return found | {"settings": settings_digest(config)} if found else {}


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
