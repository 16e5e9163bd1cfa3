"""quick_gelu(u) = u sigmoid(1.702 u), CLIP's activation."""

import torch
from torch import Tensor

from ._dispatch import Op, triton_backend


def quick_gelu_reference(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


_op = Op(quick_gelu_reference, triton_backend("quick_gelu"), saved=lambda x: ())


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), elementwise: any shape and floating dtype, same out."""
    return _op(x)
