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


def row_statistics_like(x: Tensor) -> tuple[Tensor, Tensor]:
    """Empty mean and rstd of x's rows, as kernels save them."""
    shape = (x.shape[:-1].numel(),)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)


_op = Op(
    layer_norm_reference,
    on_triton("layer_norm", refuse=refuse_rows),
    example=lambda sizes, make: (
        make.normal(sizes.sequences, sizes.tokens, sizes.width),
        *make.norm(sizes.width),
        1e-5,
    ),
    saved=lambda x, *_: row_statistics_like(x),
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
    rows = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else _covering(x)
    if rows is None:
        return _op(x.contiguous(), weight, bias, eps)  # a kernel would copy the rows in forward and again in backward
    y: Tensor = _op(rows, weight, bias, eps)
    return y.as_strided(x.shape, (x.stride(0) // x.stride(1) * x.shape[2], x.shape[2], 1))


def _covering(x: Tensor) -> Tensor | None:
    """The rows (M, D) that begin with the first and end with the last of a view of all patches (F, N, D). To normalize
    the few rows between two frames, too, costs less than to copy the patches. None for other tensors."""
    if x.dim() != 3 or x.stride(2) != 1 or x.stride(1) < 1 or x.numel() == 0:
        return None
    every, left = divmod(x.stride(0), x.stride(1))
    if left or not x.shape[1] < every <= 1.1 * x.shape[1]:
        return None
    return x.as_strided(((len(x) - 1) * every + x.shape[1], x.shape[2]), x.stride()[1:])
