"""LayerNorm alone, where no GEMM is near."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Op
from ..dispatch.support import on_triton

WIDEST_ROW = 2048  # kernels hold a row in registers


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def refuse_rows(x: Tensor, *_: object) -> str | None:
    """Why kernels do not normalize the rows of x, or None."""
    width = x.shape[-1]
    return None if 1 <= width <= WIDEST_ROW else f"width {width} is not between 1 and {WIDEST_ROW}"


_op = Op(
    layer_norm_reference,
    on_triton("layer_norm", refuse=refuse_rows),
    example=lambda sizes, make: (
        make.normal(sizes.sequences, sizes.tokens, sizes.width),
        *make.norm(sizes.width),
        1e-5,
    ),
    # the mean and 1 / sigma of each row
    saved=lambda x, *_: tuple(x.new_empty(x.shape[:-1].numel(), dtype=torch.float32) for _ in range(2)),
    sizes=lambda x, *_: {"m": x.shape[:-1].numel(), "k": x.shape[-1]},
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: (..., D), any floating dtype; statistics are taken in at least float32.
        weight, bias: (D,).
        eps: added to the variance.

    Returns:
        (..., D) in x's dtype.
    """
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous()  # a kernel would copy it in forward and again in backward
    return _op(x, weight, bias, eps)
