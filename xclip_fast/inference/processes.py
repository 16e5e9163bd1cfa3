"""The processes of a training or an evaluation: one, or all that torchrun started."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Process:
    """The device of this process, its rank and the number of processes."""

    device: torch.device
    rank: int = 0
    world: int = 1


def find_device(device: str) -> torch.device:
    """The device of a name: auto, cpu, cuda or cuda:N. Under torchrun, cuda is the GPU of this process.

    Raises:
        ValueError: if the name is none of these, or torch sees no such CUDA device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device is {device!r}, not auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        from ..info import collect_cuda

        cuda = collect_cuda()
        why = cuda["reason"] or f"there are only {len(cuda['devices'])}"
        raise ValueError(f"device is {device}: {why}; auto takes what is there")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return torch.device(device)


@contextlib.contextmanager
def join_processes(device: torch.device) -> Iterator[Process]:
    """Join the processes that torchrun started, until the end of the block. Without torchrun there is one process."""
    if device.index is not None:
        torch.cuda.set_device(device)
    if dist.is_available() and dist.is_initialized():  # by the caller already
        yield Process(device, dist.get_rank(), dist.get_world_size())
        return
    if "RANK" not in os.environ:
        yield Process(device)
        return
    # After an elastic restart the store still holds the entries of the earlier processes: a prefix keeps them apart.
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Checkpoints need gloo beside nccl. 30 minutes: the others wait while the first process writes the best weights.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=datetime.timedelta(minutes=30))
    try:
        yield Process(device, rank, world)
    finally:
        dist.destroy_process_group()


def decided_by_first(process: Process, decide: Callable[[], T]) -> T:
    """What ``decide`` returns in the first process. Every process raises its OSError or ValueError."""
    found: list[Any] = [None, None]
    if process.rank == 0:
        try:
            found[0] = decide()
        except (OSError, ValueError) as error:
            found[1] = error
    if process.world > 1:
        dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]
