"""LayerNorm alone, where no GEMM is near."""

import torch.nn.functional as F
from torch import Tensor

from ._dispatch import Op


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


_op = Op(layer_norm_reference)


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
