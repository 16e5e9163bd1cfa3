"""LN(x) W^T + b and, if wanted, quick_gelu.

Two ways: LayerNorm folded into the GEMM (one pass over x for its statistics, the rest in weight and epilogue), or x
normalised first. The first where the table says so, for half precision only: with few rows folding the weight costs
more than it saves, and in float32 the cancellation of a large mean in x W' - mu s would cost digits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch, next_power_of_2, tile
from .gemm import gemm, rows_of
from .layer_norm import normalise, normalise_backward, row_statistics
from .linear_residual import scaled


@triton.jit
def _fold_kernel(
    weight_ptr,  # (N, D), strides weight_row, weight_column
    gamma_ptr,  # (D,)
    beta_ptr,  # (D,)
    bias_ptr,  # (N,) or None
    folded_ptr,  # (N, D): W' = W diag(gamma), rounded to the weight's dtype
    sums_ptr,  # (N,) float32: s, the row sums of W' as rounded
    shift_ptr,  # (N,) float32: b' = W beta + b
    N,
    D,
    weight_row,
    weight_column,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    gamma = tl.load(gamma_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(beta_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    at = rows[:, None].to(tl.int64) * weight_row + columns[None, :].to(tl.int64) * weight_column
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    folded = (weight * gamma).to(folded_ptr.dtype.element_ty)
    tl.store(folded_ptr + rows[:, None].to(tl.int64) * D + columns[None, :], folded, mask=inside)
    tl.store(sums_ptr + rows, tl.sum(folded.to(tl.float32), 1), mask=rows < N)
    shift = tl.sum(weight * beta, 1)
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(shift_ptr + rows, shift, mask=rows < N)


def fold(weight: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """W' = W diag(gamma) (N, D) in W's dtype, its row sums and b' = W beta + b, (N,) float32 each."""
    N, D = weight.shape
    folded = torch.empty(N, D, dtype=weight.dtype, device=weight.device)
    sums, shift = (torch.empty(N, dtype=torch.float32, device=weight.device) for _ in range(2))
    sizes = (N, D, weight.stride(0), weight.stride(1))
    config = tile("layer_norm", weight.device, d=D)
    grid, size = (cdiv(N, config["ROWS"]),), next_power_of_2(D)
    launch(_fold_kernel, grid, weight, gamma, beta, bias, folded, sums, shift, *sizes, BLOCK_D=size, **config)
    return folded, sums, shift


def project(
    rows: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: bool,
    save: bool,
    product: Callable[..., tuple[Tensor, ...]] = gemm,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The op on rows (M, D), and, if ``save``, their mean and rstd and the pre-activation if there is one.

    ``product``: ``gemm``, or ``library.product``, which has no LayerNorm in its epilogue.
    """
    ln_weight, ln_bias = ln_weight.contiguous(), ln_bias.contiguous()
    bias = None if bias is None else bias.contiguous()
    sizes = {"m": rows.shape[0], "n": weight.shape[0], "k": weight.shape[1]}
    half = rows.dtype == weight.dtype != torch.float32 and product is gemm
    if half and tile("ln_linear", rows.device, **sizes)["FOLD"]:
        mean, rstd = row_statistics(rows, eps)
        folded, sums, shift = fold(weight, ln_weight, ln_bias, bias)
        norm = (mean, rstd, sums)
        y, *u = gemm(rows, folded, bias=shift, norm=norm, activation=activation, keep=activation and save)
        return y, (mean, rstd, *u)
    normed, *statistics = normalise(rows, ln_weight, ln_bias, eps, weight.dtype, save)
    y, *u = product(normed, weight, bias=bias, activation=activation, keep=activation and save)
    return y, (*(row for row in statistics if row is not None), *u)


def forward(
    save: bool,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: bool,
    product: Callable[..., tuple[Tensor, ...]] = gemm,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    y, saved = project(rows_of(x), ln_weight, ln_bias, weight, bias, eps, activation, save, product)
    return (y.view(*x.shape[:-1], weight.shape[0]),), saved if save else ()


def backward(
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
    mean, rstd, *u = saved
    du, sums = rows_of(grads[0]).to(weight.dtype), None
    if activation or needs[4]:
        du, sums = scaled(du, weight.dtype, slope_at=u[0] if activation else None)
    result = linear_backward(du, rows_of(x), mean, rstd, ln_weight, ln_bias, weight, eps, needs)
    if needs[0]:
        result[0] = result[0].view(x.shape)
    if needs[4] and bias is not None and sums is not None:
        result.append(sums.to(bias.dtype))
    return result


def linear_backward(
    du: Tensor,
    rows: Tensor,
    mean: Tensor,
    rstd: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    eps: float,
    needs: Sequence[bool],
    past: Tensor | None = None,
) -> list[Tensor]:
    """The gradients of LN(rows) W^T that ``needs`` names, among rows (M, D), ln_weight, ln_bias, weight.

    LN(rows) is recomputed. ``past`` (M, D) reaches the rows past the branch and is added to their gradient.
    """
    ln_weight, ln_bias = ln_weight.contiguous(), ln_bias.contiguous()
    normed, result = None, []
    if any(needs[:3]):
        # d LN(x) = du W, then the LayerNorm's own gradients and LN(x) in one pass
        dnormed = torch.mm(du, weight)
        dtype = weight.dtype if needs[3] else None
        dx, dweight, dbias, normed = normalise_backward(
            dnormed, rows, mean, rstd, ln_weight, extra=past, bias=ln_bias, normed_dtype=dtype
        )
        every = (dx, dweight.to(ln_weight.dtype), dbias.to(ln_bias.dtype))
        result = [gradient for gradient, need in zip(every, needs, strict=False) if need]
    if needs[3]:
        # dW = du^T LN(x)
        if normed is None:
            normed, _, _ = normalise(rows, ln_weight, ln_bias, eps, weight.dtype)
        result.append(torch.mm(du.T, normed))
    return result
