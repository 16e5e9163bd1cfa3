"""A linear layer added to the residual stream, with drop path and the row statistics of what it writes."""

from typing import Any

import torch
from torch import Tensor

from ._cuda_ops import cuda_backend
from ._dispatch import Op, triton_backend
from ._linear import linear
from .layer_norm import refuse_rows


def scale_samples(x: Tensor, scale_B: Tensor | None) -> Tensor:
    """x (B * anything, ...) with each of the B samples multiplied by its drop path scale (None: x itself)."""
    if scale_B is None or x.numel() == 0:
        return x
    return (x.reshape(scale_B.shape[0], -1) * scale_B[:, None].to(x.dtype)).reshape(x.shape)


def linear_residual_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    drop_scale: Tensor | None,
    eps: float,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    y = residual + scale_samples(linear(x, weight, bias), drop_scale)
    if not statistics:
        return y, y.new_empty(0, dtype=torch.float32), y.new_empty(0, dtype=torch.float32)
    variance, mean = torch.var_mean(y.detach().to(torch.promote_types(y.dtype, torch.float32)), -1, correction=0)
    return y, mean.float(), (variance + eps).rsqrt().float()


def refuse_drop_scale(drop_scale: Tensor | None) -> str | None:
    """Why kernels do not take this drop path factor, or None."""
    trained = drop_scale is not None and drop_scale.requires_grad and torch.is_grad_enabled()
    return "drop_scale requires a gradient" if trained else None


def _refuse(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, drop_scale: Tensor | None, *_: Any
) -> str | None:
    wanted = (*x.shape[:-1], weight.shape[0])
    if residual.shape != wanted:
        return f"residual {tuple(residual.shape)} has not the shape of the result, {wanted}"
    return refuse_drop_scale(drop_scale)


def _refuse_wide(x: Tensor, weight: Tensor, *rest: Any) -> str | None:
    return _refuse(x, weight, *rest) or refuse_rows(rest[1])  # the pass over the result holds a row of it


_op = Op(
    linear_residual_reference,
    triton_backend("linear_residual", _refuse_wide, library=("forward",)),
    triton_backend("linear_residual", _refuse),
    cuda_backend("linear_residual", _refuse),
    saved=lambda *_: (),
    autocast=("x", "weight"),
    sizes=lambda x, weight, *rest: {
        "m": x.shape[:-1].numel(),
        "n": weight.shape[0],
        "k": weight.shape[1],
        "statistics": int(rest[-1]),
    },
)


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    drop_scale: Tensor | None = None,
) -> Tensor:
    """residual + s (x W^T + b), the end of IFA and of the FFN (equations 8 and 9).

    Args:
        x: (R, ..., I), floating. weight: (O, I). bias: (O,).
        residual: (R, ..., O).
        drop_scale: (B,) or None: each sample's drop path factor s, 0 or 1 / (1 - p); R is a multiple of B.

    Returns:
        (R, ..., O), in the promoted dtype of the residual and the product.
    """
    return _op(x, weight, bias, residual, drop_scale, 0.0, False)[0]


def linear_residual_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    drop_scale: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear_residual`` with the statistics that the next LayerNorm needs.

    Returns:
        the result (R, ..., O); its row means (R, ...) and 1 / sqrt(variance + eps) (R, ...), float32, taken as
        constants by autograd: whoever normalises with them differentiates through the rows themselves.
    """
    return _op(x, weight, bias, residual, drop_scale, eps, True)
