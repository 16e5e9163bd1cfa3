"""Around an evaluation from the command line: processes, precision, the model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..inference.placement import automatic_dtype
from .result import Evaluation

if TYPE_CHECKING:
    from ..model import XCLIP


def named(result: Evaluation, checkpoint: str | os.PathLike[str], manifest: str | os.PathLike[str]) -> Evaluation:
    """Returns the evaluation result together with model and manifest names."""
    return dataclasses.replace(
        result,
        model={"checkpoint": os.fspath(checkpoint), **result.model},
        data={"manifest": os.fspath(manifest), **result.data},
    )


def load(checkpoint: str | os.PathLike[str], variant: str | None, device: torch.device, dtype: str) -> XCLIP:
    """The checkpoint's model on the device; ``dtype`` is a name, or auto for ``automatic_dtype``."""
    from ..config import variant as config_of
    from ..model import XCLIP

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in ("auto", *known):
        raise ValueError(f"dtype {dtype!r}: auto, float32, bfloat16 or float16 wanted")
    wanted = automatic_dtype(device) if dtype == "auto" else known[dtype]
    torch.manual_seed(0)  # what the checkpoint does not hold is the same in every run and process
    shape = None if variant is None else config_of(variant)
    return XCLIP.from_pretrained(checkpoint, config=shape, device=device, dtype=wanted)


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[torch.device, int]]:
    """The device of this process and its rank; under torchrun the processes are joined while the block lasts."""
    import torch.distributed as dist

    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"device {device!r}: auto, cpu, cuda or cuda:N wanted")
    place = torch.device(f"cuda:{local}" if device == "cuda" else device)
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device}: torch sees no CUDA device; use cpu, or install a CUDA build of torch")
        torch.cuda.set_device(place)
    ours = world > 1 and not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield place, dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    finally:
        if ours:
            dist.destroy_process_group()
