"""Attention of every row of a packed projection over the rows of its sequence: forward.

F sequences, S rows of each, H heads, C channels of a head. The keys of a sequence are FULL tiles of BLOCK_N and one
last tile of width LAST, which holds what is left and is never empty; queries are full tiles of BLOCK_M and a rest of
REST rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.launching import Prepared, prepared
from .tiles import LOG2_E, channels_contiguous, fits_one_tile, sequence_tile
from .triton_backward import backward

__all__ = ["backward", "forward"]


@triton.jit
def attention_fwd_kernel(
    qkv_ptr,  # (F, S, 3, H, C), C contiguous
    out_ptr,  # (F, S, H, C)
    lse_ptr,  # (F, H, S), with SAVE: log2 of the sum of the exponentials
    stride_f,
    stride_s,
    stride_3,
    stride_h,
    scale,  # log2(e) / sqrt(C)
    looped,  # FULL BLOCK_N, unknown to the compiler, which would unroll a short loop and take more registers
    S: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    SAVE: tl.constexpr,
):
    blocks: tl.constexpr = (S + BLOCK_M - 1) // BLOCK_M
    full: tl.constexpr = 0 if REST == BLOCK_M else S // BLOCK_M  # one width, one code: masked
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % HEADS
    sequence = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    channel = tl.arange(0, C)
    out_ptr += (sequence * S * HEADS + head) * C
    for masked in tl.static_range(2):  # the code of full blocks, then that of the rest
        if (REST > 0 and block >= full) if masked else (full > 0 and block < full):
            row = block * BLOCK_M + tl.arange(0, REST if masked else BLOCK_M)
            inside = row[:, None] < S if masked else None
            q_ptr = qkv_ptr + sequence * stride_f + head * stride_h
            q = tl.load(q_ptr + row.to(tl.int64)[:, None] * stride_s + channel[None, :], mask=inside)
            k_ptr = q_ptr + stride_3
            v_ptr = k_ptr + stride_3

            # softmax from tile to tile, starting with the last
            key = FULL * BLOCK_N + tl.arange(0, LAST)
            at_last = key.to(tl.int64)[:, None] * stride_s + channel[None, :]
            k_last = tl.load(k_ptr + at_last, mask=key[:, None] < S, other=0.0)
            v_last = tl.load(v_ptr + at_last, mask=key[:, None] < S, other=0.0)
            # scores in powers of two: scale holds log2(e)
            s_last = tl.dot(q, tl.trans(k_last), input_precision="ieee") * scale
            s_last = tl.where(key[None, :] < S, s_last, float("-inf"))
            m_i = tl.max(s_last, 1)
            p_last = tl.exp2(s_last - m_i[:, None])
            l_i = tl.sum(p_last, 1)
            acc = tl.dot(p_last.to(v_last.dtype), v_last, input_precision="ieee")

            at = tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * stride_s + channel[None, :]
            step = tl.full((), BLOCK_N, tl.int64) * stride_s
            if FULL > 0:
                for _ in range(0, looped, BLOCK_N):
                    k = tl.load(k_ptr + at)
                    v = tl.load(v_ptr + at)
                    k_ptr += step
                    v_ptr += step
                    s = tl.dot(q, tl.trans(k), input_precision="ieee")
                    higher = tl.maximum(m_i, tl.max(s, 1) * scale)
                    p = tl.exp2(s * scale - higher[:, None])
                    alpha = tl.exp2(m_i - higher)
                    l_i = l_i * alpha + tl.sum(p, 1)
                    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
                    m_i = higher

            out = (acc / l_i[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * (HEADS * C) + channel[None, :], out, mask=inside)
            if SAVE:
                lse_at = lse_ptr + (sequence * HEADS + head) * S + row
                tl.store(lse_at, m_i + tl.log2(l_i), mask=row < S if masked else None)


def forward(save: bool, qkv: Tensor, causal: bool = False) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(F, S, 3, H, C) -> (F, S, H, C), and, if ``save``, log2 of the sum of each row's exponentials. Never causal."""
    qkv = channels_contiguous(qkv)
    (count, length, _, heads, channels), dtype, device = qkv.shape, qkv.dtype, qkv.device
    save = save and not fits_one_tile(qkv)
    out = qkv.new_empty(count, length, heads, channels)
    lse = torch.empty(count, heads, length, dtype=torch.float32, device=device) if save else None
    prepare(device, dtype.itemsize, count, length, heads, channels, save, *qkv.stride()[:4])(qkv, out, lse)
    return out, () if lse is None else (lse,)


@prepared
def prepare(
    device: torch.device, size: int, count: int, length: int, heads: int, channels: int, save: bool, *strides: int
) -> Prepared:
    use, blocks, _ = sequence_tile("attention", device, count, length, size)
    numbers = (*strides, channels**-0.5 * LOG2_E, use["FULL"] * use["BLOCK_N"])
    grid = (count * heads * blocks,)
    return Prepared(device, attention_fwd_kernel, grid, numbers, S=length, HEADS=heads, C=channels, SAVE=save, **use)
