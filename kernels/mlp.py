"""The whole feed-forward residual branch as one differentiable op (equation 9)."""

from typing import Any

from torch import Tensor

from ._cuda_ops import cuda_backend
from ._dispatch import Op, triton_backend
from .layer_norm import refuse_rows, row_statistics_like
from .linear_residual import linear_residual_reference, refuse_drop_scale
from .ln_linear import ln_linear_reference


def mlp_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    drop_scale: Tensor | None,
) -> Tensor:
    hidden = ln_linear_reference(x, ln_weight, ln_bias, weight1, bias1, eps, True)
    return linear_residual_reference(hidden, weight2, bias2, x, drop_scale, eps, False)[0]


def _saved(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, weight1: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (*row_statistics_like(x), weight1.new_empty(x.shape[:-1].numel(), weight1.shape[0]))


def _refuse(x: Tensor, *rest: Any) -> str | None:
    return refuse_rows(x) or refuse_drop_scale(rest[-1])


_op = Op(
    mlp_reference,
    triton_backend("mlp", _refuse, library=("forward", "backward")),
    triton_backend("mlp", _refuse),
    cuda_backend("mlp", lambda x, *rest: refuse_drop_scale(rest[-1])),
    saved=_saved,
    autocast=("weight1", "weight2"),
    sizes=lambda x, *_: {"m": x.shape[:-1].numel(), "k": x.shape[-1]},
)


def mlp(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float = 1e-5,
    drop_scale: Tensor | None = None,
) -> Tensor:
    """x + s (W2 quick_gelu(W1 LN(x) + b1) + b2), equation 9.

    Args:
        x: (R, ..., D), floating.
        ln_weight, ln_bias: (D,).
        weight1: (F, D). bias1: (F,). weight2: (D, F). bias2: (D,).
        eps: of the LayerNorm.
        drop_scale: (B,) or None: each sample's drop path factor s, 0 or 1 / (1 - p); R is a multiple of B.

    Returns:
        (R, ..., D).
    """
    return _op(x, ln_weight, ln_bias, weight1, bias1, weight2, bias2, eps, drop_scale)
