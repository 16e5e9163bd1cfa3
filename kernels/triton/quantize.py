"""Rounding to e4m3 in one pass: LayerNorm with a scale for each row, and quick_gelu with a scale that is given.

What ``fp8.py`` computes with torch, for the products of ``torch._scaled_mm``. The conversion to e4m3 needs compute
capability 8.9.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import quick_gelu_value
from .gemm import rows_of
from .launching import cdiv, launch, next_power_of_2, tile
from .quick_gelu import BLOCK

LARGEST = tl.constexpr(448.0)  # of e4m3


@triton.jit
def _saturate(value):
    return tl.minimum(tl.maximum(value, -LARGEST), LARGEST)


@triton.jit(do_not_specialize=["M"])
def _layer_norm_fp8_kernel(
    x_ptr,  # (M, D), rows x_row apart
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    y_ptr,  # (M, D) e4m3
    scale_ptr,  # (M,) float32: the row's largest value / 448, 1 for a row of zeros
    M,
    D,
    x_row,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= D, a power of two
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * x_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    off = tl.where(inside, x - tl.sum(x, 1)[:, None] / D, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 1) / D + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    y = off * rstd[:, None] * weight + bias
    largest = tl.max(tl.abs(y), 1)
    scale = tl.where(largest == 0.0, 1.0, largest / LARGEST)
    y8 = _saturate(tl.div_rn(y, scale[:, None])).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None].to(tl.int64) * D + columns[None, :], y8, mask=inside)
    tl.store(scale_ptr + rows, scale, mask=rows < M)


@triton.jit
def _quick_gelu_fp8_kernel(
    u_ptr,  # (size,)
    h_ptr,  # (size,) e4m3
    size,
    scale,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    h = _saturate(quick_gelu_value(u) / scale)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), mask=at < size)


def layer_norm_fp8(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LN(x) of x (M, D) in e4m3, contiguous, each row over its scale, and the scales (M,) float32."""
    x = rows_of(x)
    M, D = x.shape
    y = torch.empty(M, D, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    config = tile("layer_norm", x.device, d=D)
    given = (x, weight.contiguous(), bias.contiguous(), y, scale, M, D, x.stride(0), eps)
    launch(_layer_norm_fp8_kernel, (cdiv(M, config["ROWS"]),), *given, BLOCK_D=next_power_of_2(D), **config)
    return y, scale


def quick_gelu_fp8(u: Tensor, scale: float) -> Tensor:
    """quick_gelu(u) / scale in e4m3, saturated at 448: u contiguous, its shape out."""
    h = torch.empty_like(u, dtype=torch.float8_e4m3fn)
    launch(_quick_gelu_fp8_kernel, (cdiv(u.numel(), BLOCK),), u, h, u.numel(), float(scale), BLOCK=BLOCK)
    return h
