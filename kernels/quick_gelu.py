"""quick_gelu(u) = u sigmoid(1.702 u), CLIP's activation."""

import torch
from torch import Tensor

from ._dispatch import Op


def quick_gelu_reference(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_op = Op(quick_gelu_reference)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), elementwise: any shape and floating dtype, same out."""
    return _op(x)
