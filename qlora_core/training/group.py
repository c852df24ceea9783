"""The process group of ranks on one machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist

LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


def join_group(kind: str, rendezvous: Path, rank: int, local_rank: int, world_size: int) -> None:
    """Make this process one of the group: NCCL between GPUs, gloo between CPUs, over loopback alone.

    Args:
        kind: "cuda" or "cpu".
        rendezvous: a file that is not there before the first of them comes.
    """
    # DeepSpeed asks the environment who it is.
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank)})
    os.environ.update({"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE, "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE})
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size
    )
