"""Loading a model, its device and its precision: the same for every command."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.cpu import library
from ..kernels.dispatch import log_once
from .processes import find_device

if TYPE_CHECKING:
    from ..model import XCLIP

DTYPES = ("float32", "bfloat16", "float16")


def automatic_dtype(device: torch.device) -> torch.dtype:
    """The half precision that the device has matrix instructions for, bfloat16 first; otherwise float32."""
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32


def placed(device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> dict[str, Any]:
    """The arguments of ``Module.to``. A name of a device is that of ``find_device``; "auto": ``automatic_dtype``.

    For a CPU that the CPU library could use, its absence is logged.
    """
    if isinstance(device, str):
        device = find_device(device)
    instructions = library.instruction_set(torch.float32)
    reason = library.load(instructions)[1]
    if device.type == "cpu" and instructions is not None and reason is not None:
        log_once(f"the model runs slower on this CPU than it could: {reason}")
    if dtype == "auto":
        dtype = automatic_dtype(device)
    elif isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: auto, {', '.join(DTYPES[:-1])} or {DTYPES[-1]} wanted")
        dtype = getattr(torch, dtype)
    return {"device": device, "dtype": dtype}


def load_model(checkpoint: str | os.PathLike[str] | None, variant: str | None = None) -> XCLIP:
    """The model of a checkpoint, on the CPU in its precision; with random weights if the checkpoint is None."""
    from .. import config
    from ..model import XCLIP

    shape = None if variant is None else config.variant(variant)
    torch.manual_seed(0)  # parameters missing from the checkpoint are the same in every run and process
    if checkpoint is None:
        return XCLIP(shape or config.VARIANTS["B/16-8f"]).eval()
    return XCLIP.from_pretrained(checkpoint, config=shape)
