"""LayerNorm alone, where no GEMM is near."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Op, triton_backend
from .support import ON_TRITON, UNMEASURED, Backend, installed

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


def _apex(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    y: Tensor = fused_layer_norm_affine(x, weight, bias, (x.shape[-1],), eps)
    return y


def _refuse_apex(x: Tensor, *_: object) -> str | None:
    """NVIDIA's apex is not the package of that name on PyPI, which has no kernels."""
    if not installed("apex.normalization"):
        return "NVIDIA's apex is not installed (build it from github.com/NVIDIA/apex; PyPI's apex is another package)"
    return None if x.is_cuda else f"device {x.device.type} is not cuda"


_op = Op(
    layer_norm_reference,
    triton_backend("layer_norm", refuse_rows),
    Backend("apex", _apex, dtypes=ON_TRITON, opt_in=UNMEASURED, refuse=_refuse_apex),
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
    return _op(x, weight, bias, eps)
