"""The processes of a run: one, or those that torchrun started. Training and evaluation join them here."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import re
from collections.abc import Iterator

import torch


@dataclasses.dataclass(frozen=True)
class Process:
    """The device of this process, and which one of how many it is."""

    device: torch.device
    rank: int = 0
    world: int = 1


def find_device(device: str) -> torch.device:
    """The device that auto, cpu, cuda or cuda:N names; under torchrun, cuda is the GPU of this process.

    Raises:
        ValueError: if the name is none of these, or torch sees no CUDA device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device is {device!r}; auto, cpu, cuda or cuda:N wanted")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device is {device}, and torch sees no CUDA device; use cpu, or install a CUDA build of torch"
        )
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(device)


@contextlib.contextmanager
def join_processes(device: torch.device) -> Iterator[Process]:
    """Join the processes that torchrun started, while the block lasts; without torchrun, there is one."""
    import torch.distributed as dist

    if device.index is not None:
        torch.cuda.set_device(device)
    if dist.is_available() and dist.is_initialized():  # by the caller
        yield Process(device, dist.get_rank(), dist.get_world_size())
        return
    if "RANK" not in os.environ:
        yield Process(device)
        return
    # After an elastic restart the store still has what the processes of before wrote into it: read none of that.
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # gloo beside nccl for checkpoints; others may wait while the first process writes the best weights
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=datetime.timedelta(minutes=30))
    try:
        yield Process(device, rank, world)
    finally:
        dist.destroy_process_group()
