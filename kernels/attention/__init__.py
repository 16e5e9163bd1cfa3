"""Attention over the rows of a packed projection, for every FlashAttention there is.

F sequences (frames), S rows of each, H heads of C channels. In a cross-frame communication block row S - 1 is the
spare one: its key and value are the message's (equation 8), its query is dead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import triton
from ..parts import Case, Part
from ..support import UNMEASURED, Backend, on_triton
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


def packed_reference(qkv_M3HC: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Causal attention of each label over itself.

    Args:
        qkv_M3HC: (M, 3, H, C), the rows of all labels, one label after another.
        offsets: (K + 1,), integer: label k owns rows offsets[k] to offsets[k + 1] - 1; offsets[K] = M.
        longest: rows of the longest label.

    Returns:
        (M, H, C).
    """
    rows, labels = qkv_M3HC.shape[0], offsets.shape[0] - 1
    offsets, device = offsets.long(), qkv_M3HC.device
    label_M = torch.repeat_interleave(torch.arange(labels, device=device), offsets.diff(), output_size=rows)
    place_M = torch.arange(rows, device=device) - offsets[label_M]
    # padding stands behind a label's last token, where causal attention never looks
    padded = qkv_M3HC.new_zeros(labels, longest, *qkv_M3HC.shape[1:]).index_put((label_M, place_M), qkv_M3HC)
    return attention_reference(padded, causal=True)[label_M, place_M]


# A candidate's forward(save, qkv (F, S, 3, H, C), causal) returns (out (F, S, H, C), what its backward wants beside);
# backward(dout, qkv, out, saved, causal) returns dqkv (F, S, 3, H, C), contiguous.


def _plain_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    return attention_reference(qkv, causal), ()


def reference_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, saved: tuple[Tensor, ...], causal: bool = False
) -> Tensor:
    with torch.enable_grad():  # forward once more
        leaf = qkv.detach().requires_grad_()
        (dqkv,) = torch.autograd.grad(attention_reference(leaf, causal), leaf, dout)
    return dqkv


def takes(channels: int) -> bool:
    """Whether Triton's kernels take heads of this size."""
    return channels in (16, 32, 64)


def _triton_forward(save: bool, qkv: Tensor, causal: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    return triton.attention.forward(save, qkv)


def _triton_backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: tuple[Tensor, ...], causal: bool) -> Tensor:
    return triton.attention.backward(dout, qkv, out, saved)


def triton_saved(qkv: Tensor) -> tuple[Tensor, ...]:
    """An empty log-sum-exp, if its forward saves one."""
    one_tile = not takes(qkv.shape[-1]) or qkv.shape[1] <= triton.ONE_TILE[qkv.element_size()]
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
    on_triton(_triton_forward, _triton_backward, opt_in=UNMEASURED, refuse=_refuse_triton, saved=triton_saved),
    libraries.EFFICIENT,
    Backend("reference", _plain_forward, reference_backward, saved=lambda qkv: ()),
)


def _packed_forward(qkv: Tensor, offsets: Tensor, longest: int) -> Tensor:
    return triton.packed_attention.forward(qkv, offsets, longest)


def _packed_backward(dout: Tensor, qkv: Tensor, offsets: Tensor, longest: int) -> Tensor:
    return triton.packed_attention.backward(dout, qkv, offsets, longest)


def _refuse_packed(case: Case) -> str | None:
    if not takes(case.channels):
        return f"head size {case.channels} is not 16, 32 or 64"
    # what fits in one tile of the kernel without spilling registers
    limit, where = 128, "in a tile"
    if case.dtype == torch.float32:
        limit, where = 32, "in float32"
    elif case.device.type == "cuda" and torch.cuda.get_device_capability(case.device)[0] < 9:
        limit, where = 64, "before compute capability 9.0"
    return None if case.length <= limit else f"the longest label has {case.length} tokens, more than {limit} {where}"


# forward(qkv (M, 3, H, C), offsets, longest) -> (M, H, C); backward(dout, qkv, offsets, longest) -> dqkv
PACKED_ATTENTION = Part(
    "packed_attention",
    on_triton(_packed_forward, _packed_backward, refuse=_refuse_packed, saved=lambda qkv: ()),
)


def _window_forward(save: bool, qkv: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return attention_reference(qkv, bias=bias), ()


def _window_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, saved: tuple[Tensor, ...], bias: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():  # forward once more: attention is a small part of a block with windows
        leaves = [each.detach().requires_grad_() for each in (qkv, bias)]
        dqkv, dbias = torch.autograd.grad(attention_reference(leaves[0], bias=leaves[1]), leaves, dout)
    return dqkv, dbias


# With a bias on the scores, by torch's SDPA, which chooses among its own kernels those that take one (memory-efficient,
# cuDNN). forward(save, qkv (F, S, 3, H, C), bias (W, H, S, S)) -> (out (F, S, H, C), ()); backward(dout, qkv, out, (),
# bias) -> dqkv, dbias.
WINDOW_ATTENTION = Part(
    "window_attention",
    Backend("library", _window_forward, _window_backward, saved=lambda qkv: ()),
)
