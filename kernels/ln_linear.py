"""LayerNorm, linear layer and, if wanted, quick_gelu as one op.

The algebra that lets LayerNorm ride on the GEMM is derived in docs/kernels.md.
"""

from typing import Any

from torch import Tensor

from ._cuda_ops import cuda_backend
from ._dispatch import Op, triton_backend
from ._linear import linear
from .layer_norm import layer_norm_reference, refuse_rows, row_statistics_like
from .quick_gelu import quick_gelu_reference


def ln_linear_reference(
    x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, bias: Tensor | None, eps: float, activation: bool
) -> Tensor:
    u = linear(layer_norm_reference(x, ln_weight, ln_bias, eps), weight, bias)
    return quick_gelu_reference(u) if activation else u


def _saved(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, activation = rest
    if not activation:
        return row_statistics_like(x)
    return (*row_statistics_like(x), weight.new_empty(x.shape[:-1].numel(), weight.shape[0]))


_op = Op(
    ln_linear_reference,
    triton_backend("ln_linear", refuse_rows, library=("forward",)),
    triton_backend("ln_linear", refuse_rows),
    cuda_backend("ln_linear"),
    saved=_saved,
    autocast=("weight",),
    sizes=lambda x, gamma, beta, weight, bias, eps, activation: {
        "m": x.shape[:-1].numel(),
        "n": weight.shape[0],
        "k": weight.shape[1],
        "activation": int(activation),
    },
)


def ln_linear(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    activation: bool = False,
) -> Tensor:
    """LN(x) W^T + b, then quick_gelu if ``activation`` (the LN and first linear layer of equations 8 and 9).

    Args:
        x: (..., D), floating.
        ln_weight, ln_bias: (D,).
        weight: (O, D). bias: (O,) or None.
        eps: of the LayerNorm.

    Returns:
        (..., O) in x's dtype.
    """
    return _op(x, ln_weight, ln_bias, weight, bias, eps, activation)
