"""Attention over the rows of a packed projection, for every FlashAttention there is.

F sequences (frames), S rows of each, H heads of C channels. In a cross-frame communication block row S - 1 is the
spare one: its key and value are the message's (equation 8), its query is dead.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.parts import Case, Part
from ..dispatch.support import UNMEASURED, Backend, on_triton
from ..triton import ONE_TILE
from . import libraries


def attention_reference(qkv_FS3HC: Tensor, causal: bool = False, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) v by torch: (F, S, 3, H, C) -> (F, S, H, C).

    Args:
        causal: no row sees a later one.
        bias: (W, H, S, S), of which sequence f takes that of window f mod W.
    """
    query, key, value = qkv_FS3HC.permute(2, 0, 3, 1, 4).unbind(0)
    if bias is not None:  # one that all sequences share is broadcast, not repeated
        bias = bias if bias.shape[0] == 1 else bias.repeat(query.shape[0] // bias.shape[0], 1, 1, 1)
        return F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype)).transpose(1, 2)
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


# A candidate's forward(save, qkv, *mixing) returns (out, what its backward wants beside); backward(dout, qkv, out,
# saved, *mixing) returns dqkv, contiguous, and rows (N, 3 H C) float32 whose sum is that of dqkv's rows, or None if it
# made none on the way. qkv and dqkv are (F, S, 3, H, C), out and dout (F, S, H, C). In ATTENTION mixing is causal. In
# WINDOW_ATTENTION it is causal and the bias (W, H, S, S), and backward returns dbias as a third.


def _reference_forward(save: bool, qkv: Tensor, *mixing: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    return attention_reference(qkv, *mixing), ()


def reference_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, saved: tuple[Tensor, ...], causal: bool = False, *bias: Tensor
) -> Any:
    with torch.enable_grad():  # forward once more
        leaves = [each.detach().requires_grad_() for each in (qkv, *bias)]
        gradients = torch.autograd.grad(attention_reference(leaves[0], causal, *leaves[1:]), leaves, dout)
    return gradients[0], None, *gradients[1:]


def takes(channels: int) -> bool:
    """Whether Triton's kernels take heads of this size."""
    return channels in (16, 32, 64)


def triton_saved(qkv: Tensor) -> tuple[Tensor, ...]:
    """An empty log-sum-exp, if its forward saves one."""
    one_tile = not takes(qkv.shape[-1]) or qkv.shape[1] <= ONE_TILE[qkv.element_size()]
    return () if one_tile else libraries.log_sum_exp(qkv)


def _refuse_triton(case: Case) -> str | None:
    if case.causal:
        return "the kernel has no causal mask"
    return None if takes(case.channels) else f"head size {case.channels} is not 16, 32 or 64"


ATTENTION = Part(
    "attention",
    libraries.CUDNN,
    libraries.FLASH,
    libraries.FLASH_ATTN_3,
    libraries.FLASH_ATTN_4,
    libraries.FLASH_ATTN,
    libraries.XFORMERS,
    on_triton("attention", opt_in=UNMEASURED, refuse=_refuse_triton, saved=triton_saved),
    libraries.EFFICIENT,
    Backend("reference", _reference_forward, reference_backward, saved=lambda qkv: ()),
)


# by torch's SDPA, which chooses among its own kernels those that take a bias (memory-efficient, cuDNN)
WINDOW_ATTENTION = Part(
    "window_attention", Backend("library", _reference_forward, reference_backward, saved=lambda qkv: ())
)
