"""The backend ``cuda``: products of the CUDA library and torch for ``ln_linear``, ``linear_residual`` and ``mlp``, one
kernel for ``message_kv`` where there are few rows.

Nothing of it has been measured or run on a GPU yet, so it is taken only where ``XCLIP_FAST_BACKEND=cuda`` or
``with backend("cuda")`` ask for it, or a measurement names it (_choices.py). A library that is missing, or of another
interface, is a reason of refusal.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _cuda
from ._cuda import fold, linear_residual, linear_residual_statistics, linear_slope, norm_linear, row_statistics
from ._dispatch import Backend
from .quick_gelu import quick_gelu_reference

HALF = (torch.bfloat16, torch.float16)
# Rows from which LayerNorm is folded into the product: with fewer, folding the weight costs more. Not measured.
FOLD_FROM = 4096
# Rows up to which message_kv is one kernel, whose time is that of its weights. Not measured.
MESSAGE_ROWS = 64
UNMEASURED = (
    "not measured here, so taken only if asked for (XCLIP_FAST_BACKEND=cuda or backend('cuda')); "
    "python -m xclip_fast.kernels.tune --backends measures"
)


def _normalised(rows: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, ...]:
    """(rows, gamma, beta, LN(rows), mean, rstd) in the dtype that LayerNorm runs in: that of all, or float32."""
    kind = rows.dtype if rows.dtype == gamma.dtype == beta.dtype else torch.float32
    rows, gamma, beta = rows.to(kind), gamma.to(kind), beta.to(kind)
    return rows, gamma, beta, *torch.ops.aten.native_layer_norm(rows, [rows.shape[1]], gamma, beta, eps)


def _project(
    rows: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: bool,
    save: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """act(LN(rows) W^T + bias), and, if ``save``, the rows' mean and rstd and the pre-activation if there is one."""
    keep = activation and save
    fold_it = rows.dtype == weight.dtype and rows.shape[0] >= FOLD_FROM
    statistics = row_statistics(rows, eps) if fold_it or save else ()
    if fold_it:
        folded, sums, shift = fold(weight, gamma, beta, bias)
        norm = (*statistics, sums)
        y, u = norm_linear(rows, folded, shift, norm, activation=activation, keep=keep)
    else:
        normed = _normalised(rows, gamma, beta, eps)[3].to(weight.dtype)
        y, u = norm_linear(normed, weight, bias, activation=activation, keep=keep)
    if not save:
        return y, ()
    return y, statistics if u is None else (*statistics, u)


def _slope(u: Tensor) -> Tensor:
    """d quick_gelu / du in float32."""
    u = u.float()
    s = torch.sigmoid(1.702 * u)
    return s * (1 + 1.702 * u * (1 - s))


def _linear_backward(
    du: Tensor, rows: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, eps: float, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of LN(rows) W^T that ``needs`` names, among rows, gamma, beta, weight; LN(rows) is recomputed."""
    result = []
    wide, wide_gamma, wide_beta, normed, mean, rstd = _normalised(rows, gamma, beta, eps)
    if any(needs[:3]):
        dnormed = torch.mm(du, weight).to(normed.dtype)
        grads = torch.ops.aten.native_layer_norm_backward(
            dnormed, wide, [wide.shape[1]], mean, rstd, wide_gamma, wide_beta, list(needs[:3])
        )
        for grad, like, need in zip(grads, (rows, gamma, beta), needs, strict=False):
            if need:
                result.append(grad.to(like.dtype))
    if needs[3]:
        result.append(torch.mm(du.T, normed.to(weight.dtype)))
    return result


def _ln_linear(
    save: bool,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows = x.reshape(-1, x.shape[-1])
    y, saved = _project(rows, ln_weight, ln_bias, weight, bias, eps, activation, save)
    return (y.view(*x.shape[:-1], weight.shape[0]),), saved


def _ln_linear_backward(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: bool,
) -> list[Tensor]:
    du = grads[0].reshape(-1, weight.shape[0])
    if activation:
        du = du * _slope(saved[2])
    dbias = du.sum(0, dtype=torch.float32) if needs[4] and bias is not None else None
    rows = x.reshape(-1, x.shape[-1])
    result = _linear_backward(du.to(weight.dtype), rows, ln_weight, ln_bias, weight, eps, needs)
    if needs[0]:
        result[0] = result[0].view(x.shape)
    if dbias is not None and bias is not None:
        result.append(dbias.to(bias.dtype))
    return result


def _sample_scale(drop_scale: Tensor | None, rows: int) -> Tensor | None:
    """A sample's drop path factor for each of its rows: (B,) -> (M,) float32."""
    if drop_scale is None or rows == 0:
        return None
    samples = drop_scale.shape[0]
    return drop_scale.float()[:, None].expand(samples, rows // samples).reshape(rows)


def _add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, drop_scale: Tensor | None) -> Tensor:
    """residual + s (x W^T + b) on rows. A residual of another dtype is added outside the product."""
    scale = _sample_scale(drop_scale, x.shape[0])
    if residual.dtype == x.dtype:
        return linear_residual(x, weight, bias, residual, scale)
    product, _ = norm_linear(x, weight, bias)
    return residual + (product if scale is None else product * scale[:, None])


def _linear_residual(
    save: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    drop_scale: Tensor | None,
    eps: float,
    statistics: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    wide = residual.reshape(-1, weight.shape[0])
    if not statistics:
        nothing = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
        return (_add(rows, weight, bias, wide, drop_scale).view(residual.shape), *nothing), ()
    if wide.dtype == rows.dtype:
        scale = _sample_scale(drop_scale, rows.shape[0])
        y, mean, rstd = linear_residual_statistics(rows, weight, bias, wide, scale, eps)
    else:
        y = _add(rows, weight, bias, wide, drop_scale)
        mean, rstd = row_statistics(y, eps)
    return (y.view(residual.shape), *(row.view(residual.shape[:-1]) for row in (mean, rstd))), ()


def _dproduct(dy: Tensor, weight: Tensor, drop_scale: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """s dy in the weight's dtype, and a function that sums it over the rows like a bias, in a bias's dtype."""
    dy = dy.reshape(-1, weight.shape[0])
    scale = _sample_scale(drop_scale, dy.shape[0])
    scaled = dy if scale is None else dy * scale[:, None]
    return scaled.to(weight.dtype), lambda bias: scaled.sum(0, dtype=torch.float32).to(bias.dtype)


def _refuse_drop_gradient(need: bool) -> None:
    if need:
        raise NotImplementedError(
            "drop_scale requires a gradient, which the cuda backend does not compute: detach it, or use "
            "xclip_fast.kernels.backend('reference')"
        )


def _linear_residual_backward(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    drop_scale: Tensor | None,
    eps: float,
    statistics: bool,
) -> list[Tensor]:
    _refuse_drop_gradient(needs[4])
    result = []
    dproduct, dbias = _dproduct(grads[0], weight, drop_scale)
    if needs[0]:
        result.append(torch.mm(dproduct, weight).view(x.shape).to(x.dtype))
    if needs[1]:
        result.append(torch.mm(dproduct.T, x.reshape(-1, x.shape[-1]).to(weight.dtype)))
    if needs[2]:
        result.append(dbias(bias))
    if needs[3]:
        result.append(grads[0].to(residual.dtype))
    return result


def _mlp(
    save: bool,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    drop_scale: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows = x.reshape(-1, x.shape[-1])
    hidden, saved = _project(rows, ln_weight, ln_bias, weight1, bias1, eps, True, save)
    return (_add(hidden, weight2, bias2, rows, drop_scale).view(x.shape),), saved


def _mlp_backward(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    drop_scale: Tensor | None,
) -> list[Tensor]:
    _refuse_drop_gradient(needs[8])
    u = saved[2]
    dproduct, dbias2 = _dproduct(grads[0], weight2, drop_scale)
    # du = (s dy W2) quick_gelu'(u)
    du, dbias1 = linear_slope(dproduct, weight2.T, u, column_sums=needs[4])
    result = _linear_backward(du, x.reshape(-1, x.shape[-1]), ln_weight, ln_bias, weight1, eps, needs)
    if needs[0]:
        result[0] = result[0].view(x.shape) + grads[0].to(x.dtype)
    if dbias1 is not None:
        result.append(dbias1.to(bias1.dtype))
    if needs[5]:
        result.append(torch.mm(dproduct.T, quick_gelu_reference(u)))
    if needs[6]:
        result.append(dbias2(bias2))
    return result


# ---- what it supports


def _refuse(x: Tensor, *weights: Tensor) -> str | None:
    """Why products of x with these weights are not taken, or None."""
    reason = _cuda.refuse_device(x.device.type, x.device.index)
    if reason is not None:
        return reason
    autocast = torch.is_autocast_enabled(x.device.type)
    for weight in weights:
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.dtype
        if dtype not in HALF:
            return f"a weight of dtype {dtype} is not bfloat16 or float16"
        if x.dtype not in (dtype, torch.float32) and not autocast:
            return f"x of dtype {x.dtype} beside a weight of dtype {dtype}"
        if weight.shape[0] % 8 or weight.shape[1] % 8 or 0 in weight.shape:
            return f"weight {tuple(weight.shape)}: both sizes must be multiples of 8, for rows in whole 16 bytes"
    return None


def cuda_backend(op: str, refuse: Callable[..., str | None] | None = None) -> Backend:
    """The backend of one of the three ops; ``refuse`` gives the op's own reasons, of any backend with kernels."""
    table: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[int, ...]]] = {
        "ln_linear": (_ln_linear, _ln_linear_backward, (3,)),
        "linear_residual": (_linear_residual, _linear_residual_backward, (1,)),
        "mlp": (_mlp, _mlp_backward, (3, 5)),
    }
    forward, backward, weights = table[op]

    def refusal(*args: Any) -> str | None:
        reason = _refuse(args[0], *(args[index] for index in weights))
        return reason or (refuse(*args) if refuse else None)

    return Backend("cuda", forward, backward, unasked=UNMEASURED, refuse=refusal)


def _message_kv(save: bool, *args: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    x, frames, fc_weight, fc_bias, *rest, heads, eps, _ = args
    norm_m_weight, norm_m_bias, qkv_weight, qkv_bias, out_weight, out_bias, *norm_1, kv_weight, kv_bias = rest
    weights, biases = (fc_weight, qkv_weight, out_weight, kv_weight), (fc_bias, qkv_bias, out_bias, kv_bias)
    norms = (norm_m_weight, norm_m_bias, *norm_1)
    key_value = _cuda.message_kv(x.to(fc_weight.dtype), frames, weights, biases, norms, eps)
    return (key_value.unflatten(1, (2, heads, fc_weight.shape[0] // heads)),), ()


def message_kv_cuda_backend(refuse: Callable[..., str | None]) -> Backend:
    """The backend of ``message_kv``; ``refuse`` gives the reasons of any backend with kernels."""

    def refusal(*args: Any) -> str | None:
        x, _, weight, *_, heads, _, drop_scale = args
        reason = _cuda.refuse_device(x.device.type, x.device.index, "xclip_fast_check_message")
        if reason is not None:
            return reason
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.dtype
        if dtype not in HALF:
            return f"a weight of dtype {dtype} is not bfloat16 or float16"
        width = weight.shape[0]
        if x.shape[0] > MESSAGE_ROWS:
            return f"{x.shape[0]} rows are over {MESSAGE_ROWS}"
        if width % 64 or width // heads != 64 or width > 1024:
            return f"width {width} in {heads} heads: heads of 64 channels and at most 1024 in all wanted"
        if drop_scale is not None:
            return "drop path is for training"
        return refuse(*args)

    return Backend("cuda", _message_kv, unasked=UNMEASURED, refuse=refusal, partial=True)
