"""Which device a rank computes on, and how its memory is kept."""

import ctypes
import os
import sys

import torch

from fer_dist.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt, from its malloc.h."""


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """The device of a rank, which becomes torch's current one.

    Args:
        wanted: auto, cpu or cuda.
        local_rank: number of this process on its node.

    Raises:
        UserError: cuda is asked for and absent, or a node has more ranks than GPUs.
    """
    gpus = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cuda" and not gpus:
        raise UserError(
            "cuda was asked for, but no CUDA device is visible",
            "--device cpu (training: --train.device cpu), or look at nvidia-smi",
        )
    if not gpus:
        keep_freed_memory()
        return torch.device("cpu")
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > gpus:
        raise UserError(
            f"{ranks} ranks on a node with {gpus} visible GPU{'s' * (gpus > 1)}; a GPU takes one rank",
            f"torchrun --nproc_per_node={gpus} ..., or --device cpu (training: --train.device cpu)",
        )
    # Some launchers show each process its own GPU only; then that GPU is number 0.
    device = torch.device("cuda", local_rank if local_rank < gpus else 0)
    torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what a step frees, for the next step, instead of giving it back.

    Activations are tens of megabytes: by default each is mapped and unmapped anew, 44 thousand
    page faults a step of patt_lite at 96 px, and a third more images per second of CPU time without
    them (benchmarks/cpu_malloc.py). Other C libraries have no mallopt, and nothing happens there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
