"""Ray itself: started here on loopback, or joined; what its nodes must have; the data, decoded once on each."""

import logging
import os
import shlex
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fer_dist.errors import UserError
from tune.settings import Settings
from tune.trial import DESK, Desk, Task

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the older output can be told to be silent
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a trial without GPUs sees none
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: it leaves a search that can go on
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial may fail before its first epoch
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
STORE_BYTES = 128 * 2**20
"""Ray's object store: nothing large goes through it; by default it is 30% of the memory."""
ANSWER_S = 10.0
"""How long a cluster may take to answer."""


@contextmanager
def connected(address: str, cpus: int | None) -> Iterator[None]:
    """Ray, from here to the end of the `with`.

    Args:
        address: of a cluster to join; empty: a cluster of this machine alone, of which every process listens on
            loopback only, and which ends with this process, however that ends.
        cpus: how many cores such a cluster says it has; None: those of the machine.

    Raises:
        UserError: there is no cluster at the address.
    """
    _environment(address)
    import ray

    # What Ray prints of dead workers is long, and the ledger has it.
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if (python := shlex.quote(sys.executable)) != sys.executable:
        # Ray 2.60 puts the path of the interpreter into a shell command without quotes: with a blank in it no worker of
        # a trial starts, and the search waits forever.
        options["runtime_env"] = {"py_executable": python}
    if not address:
        cores = cpus or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        if ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), ANSWER_S).close()
        ray.init(address or "local", **options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        told = " ".join(str(error).split())[:300]
        if not address:
            raise UserError(f"Ray does not start: {told}", "look at /tmp/ray/session_latest/logs") from None
        raise UserError(
            f"no Ray cluster answers at {address!r}: {told}", "ray status --address ADDRESS; or leave --address out"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _environment(address: str) -> None:
    """What Ray reads at its import, and hands on to its processes."""
    os.environ.update(QUIET)
    if not address or address.startswith(("127.", "localhost:")):
        # Nodes are addressed as 127.0.0.1, which is what Ray then binds to; else Ray
        # puts another address of this machine in its place.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if not address:
        if sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # between the ranks of a trial
        # Ray would end all of its processes when others have filled the memory; the kernel ends the largest one.
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # a trial is as important as a training; Ray says 15


def with_gpus(settings: Settings, device: str) -> Settings:
    """The settings with their GPUs: where nothing is asked for, one for each worker, if Ray has that many."""
    import ray

    if settings.gpus is not None:
        return settings
    enough = ray.cluster_resources().get("GPU", 0) >= settings.workers and device != "cpu"
    return replace(settings, gpus=float(settings.workers if enough else 0))


def require_resources(settings: Settings, concurrent: int | None) -> int:
    """How many trials fit at once; a worker has all of its resources on one node.

    Raises:
        UserError: not one does.
    """
    import ray

    share = (settings.gpus or 0) / settings.workers
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # 1e-9: ten shares of 0.1 are one GPU.
    places = [
        min(int(node.get("CPU", 0) // settings.cpus), int(node.get("GPU", 0) / share + 1e-9) if share else 10**6)
        for node in nodes
    ]
    fit = sum(places) // settings.workers
    if not fit:
        have = "; ".join(f"{node.get('CPU', 0):g} cores and {node.get('GPU', 0):g} GPUs" for node in nodes)
        workers = f"{settings.workers} workers with " if settings.workers > 1 else ""
        raise UserError(
            f"a trial needs {workers}{settings.cpus} cores and {share:g} GPUs{' each' * bool(workers)}; Ray has {have}",
            "fewer --workers-per-trial, --cpus-per-worker or --gpus-per-trial; --cpus N lets Ray count on more cores",
        )
    return min(fit, concurrent or fit)


def open_desk() -> Any:
    """The actor between the search and its trials, on the node of the search; it ends with it."""
    import ray

    here = _only_on(ray.get_runtime_context().get_node_id())
    return ray.remote(Desk).options(name=DESK, num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote()


def _only_on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def prepare_nodes(task: Task) -> list[str]:
    """Decode the data set once on each node, before the trials want it; says what that gave.

    Raises:
        UserError: a node does not see the folder of the search, or cannot read the data.
    """
    import ray

    token = task.folder / f".seen-{uuid.uuid4().hex}"
    try:
        token.touch()
    except OSError as error:
        raise UserError(
            f"cannot write into {task.folder}: {error.strerror}", "free some space, or --dir FOLDER"
        ) from None
    look = ray.remote(num_cpus=0, max_retries=0)(prepare)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    try:
        asked = [look.options(scheduling_strategy=_only_on(node["NodeID"])).remote(task, token) for node in nodes]
        told = []
        for node, answer in zip(nodes, asked, strict=True):
            name = node["NodeManagerHostname"]
            try:
                problem, fix, line = ray.get(answer)
            except Exception as error:  # a node without our packages, or of another Python
                if all(other["NodeID"] != node["NodeID"] for other in ray.nodes() if other["Alive"]):
                    told.append(f"node {name} is gone")
                    continue
                told_by = " ".join(str(error).split())[-300:]
                raise UserError(f"node {name} cannot work for us: {told_by}", "install fer_dist there") from None
            if problem:
                raise UserError(f"node {name}: {problem}", fix)
            told.append(f"node {name}: {line}")
        return told
    finally:
        token.unlink(missing_ok=True)


def prepare(task: Task, token: Path) -> tuple[str, str, str]:
    """Runs on a node: a problem with its fix, or a line on the data that are ready there."""
    from fer_dist.data.cache import open_faces
    from fer_dist.spec import LabelSet

    if not token.exists():
        return f"{task.folder} of the search is not there", "--dir FOLDER on a file system that all nodes share", ""
    try:
        faces = open_faces(task.config.data, LabelSet())
    except UserError as error:
        return error.problem, error.fix, ""
    return "", "", f"{len(faces.labels_N)} pictures are ready"
