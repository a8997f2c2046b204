"""The process group of a trial on a machine alone: its ranks meet in a file.

Ray's own way is torch's TCPStore, which listens on every interface.
"""

import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


@dataclass
class OnDisk(TorchConfig):  # type: ignore[misc]
    """Ray Train's settings of torch, with the folder to meet in."""

    folder: str = ""

    @property
    def backend_cls(self) -> type["_Meeting"]:
        return _Meeting


class _Meeting(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: OnDisk) -> None:
        """Make the group; each start of the workers meets in a file of its own."""
        worker_group.execute(_set_torch_distributed_env_vars)
        place = f"file://{backend_config.folder}/{uuid.uuid4().hex}"
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank,
                    _setup_torch_process_group,
                    backend=backend_config.backend,
                    world_rank=rank,
                    world_size=size,
                    init_method=place,
                )
                for rank in range(size)
            ]
        )
