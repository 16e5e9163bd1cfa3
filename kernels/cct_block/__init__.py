"""One residual block of X-CLIP, of CLIP, of the text encoder or of MIT as one op (equations 7 to 9).

The unit of autograd, of torch.library registration and of the choice of backend. Inside are plain functions, the parts:
the two products behind a LayerNorm, the message path, the attention, the two products added to the residual stream.
docs/kernels.md derives them.
"""

import inspect

import torch
from torch import Tensor

from .. import cpu
from ..common.block import LOWERED, Block
from ..dispatch import Op, forced_backend
from ..dispatch.support import Backend
from . import fused, plans
from .example import example
from .reference import cct_block_reference, composed

__all__ = ["Block", "Statistics", "cct_block", "composed"]

Statistics = tuple[Tensor, Tensor]  # mean and 1 / sqrt(variance + eps) of each row, (M,) float32

_names = [
    inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
    for name, annotation in Block.__annotations__.items()
]
cct_block_reference.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    _names, return_annotation=tuple[Tensor, Tensor, Tensor]
)

_op = Op(
    cct_block_reference,
    Backend("fused", fused.forward, fused.backward, refuse=plans.refuse, parts=plans.PART_NAMES),
    example=lambda sizes, make: tuple(
        example(
            sizes.sequences,
            sizes.tokens + 1,
            sizes.width,
            sizes.frames,
            device=make.device,
            dtype=make.dtype,
            empty=make.empty,
        )
    ),
    saved=fused.saved_like,
    autocast=LOWERED,
)


def cct_block(block: Block) -> tuple[Tensor, Statistics | None]:
    """A block applied to its residual stream.

    Args:
        block: the stream and the parameters. With a message, row S - 1 of every frame is spare.

    Returns:
        the stream behind the block, of x's shape and dtype, or its ``rows`` (R, D); and its row statistics if
        ``block.statistics`` asks for them and they cost nothing: constants for autograd, because what normalizes with
        them differentiates through the rows.
    """
    if torch.compiler.is_compiling():
        block = block._replace(backend=forced_backend(), statistics=False)
    else:
        if block.x.numel() == 0:
            return composed(block), None
        if block.x.device.type == "cpu" and _on_cpu(block):
            return cpu.block(block), None
        found = plans.inference_plan(block)
        if found is not None:
            return fused.run(False, block, found)[:2]
    y, mean, rstd = _op(*block)
    return y, (mean, rstd) if mean.numel() else None


def _on_cpu(block: Block) -> bool:
    """Whether the CPU's own path for inference takes the block."""
    dropped = (block.drop_fusion, block.drop_attention, block.drop_feed_forward)
    tensors = [arg for arg in block if isinstance(arg, Tensor) and arg.is_floating_point()]
    return all(scale is None for scale in dropped) and cpu.takes(*tensors)
