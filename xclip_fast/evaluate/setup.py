"""The model and the names of an evaluation from the command line."""

from __future__ import annotations

import dataclasses
import os
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
    torch.manual_seed(0)  # parameters missing from the checkpoint are the same in every run and process
    shape = None if variant is None else config_of(variant)
    return XCLIP.from_pretrained(checkpoint, config=shape, device=device, dtype=wanted)
