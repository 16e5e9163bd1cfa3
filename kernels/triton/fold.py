"""LayerNorm's weight and bias folded into the linear layer behind it (docs/kernels.md)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import cdiv, launch, next_power_of_2, tile


@triton.jit
def fold_kernel(
    weight_ptr,  # (N, D), strides weight_row, weight_column
    gamma_ptr,  # (D,)
    beta_ptr,  # (D,)
    bias_ptr,  # (N,)
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
    shift = tl.sum(weight * beta, 1) + tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(shift_ptr + rows, shift, mask=rows < N)


def fold(weight: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W' = W diag(gamma) (N, D) in W's dtype, its row sums and b' = W beta + b, (N,) float32 each."""
    N, D = weight.shape
    folded = torch.empty(N, D, dtype=weight.dtype, device=weight.device)
    sums, shift = (torch.empty(N, dtype=torch.float32, device=weight.device) for _ in range(2))
    sizes = (N, D, weight.stride(0), weight.stride(1))
    config = tile("layer_norm", weight.device, d=D)
    grid, size = (cdiv(N, config["ROWS"]),), next_power_of_2(D)
    launch(fold_kernel, grid, weight, gamma, beta, bias, folded, sums, shift, *sizes, BLOCK_D=size, **config)
    return folded, sums, shift
