"""quick_gelu(u) = u sigmoid(1.702 u), elementwise."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.activation import quick_gelu_value
from ..triton.column_sums import scaled
from ..triton.launching import Prepared, cdiv, prepared

BLOCK = 1024


@triton.jit
def quick_gelu_fwd_kernel(
    x_ptr,  # (size,)
    y_ptr,  # (size,)
    size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(x_ptr + at, mask=at < size).to(tl.float32)
    tl.store(y_ptr + at, quick_gelu_value(u).to(y_ptr.dtype.element_ty), mask=at < size)


def quick_gelu(x: Tensor, to: Tensor | None = None) -> Tensor:
    """quick_gelu of a contiguous tensor; ``to``: where to, which may be x itself."""
    y = torch.empty_like(x) if to is None else to
    _prepare(x.device, x.numel())(x, y)
    return y


@prepared
def _prepare(device: torch.device, size: int) -> Prepared:
    return Prepared(device, quick_gelu_fwd_kernel, (cdiv(size, BLOCK),), (size,), BLOCK=BLOCK)


def forward(save: bool, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return (quick_gelu(x.contiguous()),), ()


def backward(grads: Sequence[Any], saved: Sequence[Tensor], needs: Sequence[Any], x: Tensor) -> list[Tensor]:
    width = x.shape[-1] if x.dim() else 1
    dy, u = grads[0].contiguous().view(-1, width), x.contiguous().view(-1, width)
    return [scaled(dy, x.dtype, slope_at=u)[0].view(x.shape)]
