"""Ray itself: started here on loopback, or joined; what its nodes must have; the data, decoded once on each."""

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fer_dist.errors import UserError
from tune.settings import Settings
from tune.trial import DESK, Desk, Task

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # the older output can be told to be silent
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
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
        address: of a cluster to join; empty: $RAY_ADDRESS, and without it a cluster of this machine alone, of
            which every process listens on loopback only, and which ends with this process, however that ends.
        cpus: how many cores such a cluster says it has; None: those of the machine.

    Raises:
        UserError: there is no cluster at the address.
    """
    os.environ.update(QUIET)
    address = address or os.environ.get("RAY_ADDRESS", "")
    if not address or address.startswith(("127.", "localhost:")):
        # Read by Ray at its import: nodes are addressed as 127.0.0.1, which is what Ray then binds to; else Ray
        # puts another address of this machine in its place.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if not address:
        # Ray would end all of its processes when others have filled the memory; the kernel ends the largest one.
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    import ray

    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if not address:
        cores = cpus or len(os.sched_getaffinity(0))
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


def require_resources(settings: Settings, concurrent: int | None) -> int:
    """How many trials fit at once.

    Raises:
        UserError: not one does.
    """
    import ray

    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    need = settings.workers * settings.cpus
    if need > cpus:
        raise UserError(
            f"a trial needs {need} cores ({settings.workers} workers with {settings.cpus}), Ray has {cpus:g}",
            f"--cpus {need} lets it have more than there are; or fewer --workers-per-trial or --cpus-per-worker",
        )
    if settings.gpus > gpus:
        raise UserError(f"a trial needs {settings.gpus:g} GPUs, Ray has {gpus:g}", "a smaller --gpus-per-trial")
    fit = int(cpus // need) if not settings.gpus else min(int(cpus // need), int(gpus / settings.gpus + 1e-9))
    return max(1, min(fit, concurrent or fit))


def open_desk() -> Any:
    """The actor between the search and its trials, on the node of the search; it ends with it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Desk).options(name=DESK, num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote()


def prepare_nodes(task: Task) -> list[str]:
    """Decode the data set once on each node, before the trials want it; says what that gave.

    Raises:
        UserError: a node does not see the folder of the search, or cannot read the data.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = task.folder / f".seen-{uuid.uuid4().hex}"
    token.touch()
    look = ray.remote(num_cpus=0, max_retries=0)(prepare)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    try:
        asked = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                task, token
            )
            for node in nodes
        ]
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
