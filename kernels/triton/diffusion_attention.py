"""Diffusion attention: a frame's L queries over its L keys and its message, which is key number L of the last tile.

F frames, L tokens of a frame, H heads, C channels of a head. A frame's keys are FULL tiles of BLOCK_N and one last
tile of width LAST, which holds what is left and the message; queries are full tiles of BLOCK_M and a rest of REST rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..diffusion_attention import fits_one_tile
from ._attention import LOG2_E, channels_contiguous, frame_tile, last_tile
from ._launch import launch
from .diffusion_attention_backward import backward

__all__ = ["backward", "forward"]


@triton.jit
def _attend_rows(
    q_ptr,  # this frame's and head's queries, (L, C)
    message_ptr,  # this frame's and head's (k_m, v_m), HEADS C apart
    out_ptr,  # (L, C), row stride HEADS C
    lse_ptr,  # (L,)
    first,  # row
    stride_l,
    stride_3,
    scale,
    looped,
    L: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    SAVE: tl.constexpr,
):
    """Rows first to first + ROWS - 1 of the output: softmax from tile to tile, starting with the message's."""
    row, channel = first + tl.arange(0, ROWS), tl.arange(0, C)
    inside = row[:, None] < L if MASKED else None
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * stride_l + channel[None, :], mask=inside)
    k_ptr = q_ptr + stride_3
    v_ptr = k_ptr + stride_3

    key = FULL * BLOCK_N + tl.arange(0, LAST)
    k_last = last_tile(k_ptr, message_ptr, key, channel, stride_l, L)
    v_last = last_tile(v_ptr, message_ptr + HEADS * C, key, channel, stride_l, L)
    # scores in powers of two: scale holds log2(e)
    s_last = tl.dot(q, tl.trans(k_last), input_precision="ieee") * scale
    s_last = tl.where(key[None, :] <= L, s_last, float("-inf"))
    peak = tl.max(s_last, 1)
    p_last = tl.exp2(s_last - peak[:, None])
    total = tl.sum(p_last, 1)
    acc = tl.dot(p_last.to(v_last.dtype), v_last, input_precision="ieee")

    at = tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * stride_l + channel[None, :]
    step = tl.full((), BLOCK_N, tl.int64) * stride_l
    if FULL > 0:
        for _ in range(0, looped, BLOCK_N):
            k = tl.load(k_ptr + at)
            v = tl.load(v_ptr + at)
            k_ptr += step
            v_ptr += step
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            higher = tl.maximum(peak, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - higher[:, None])
            shrink = tl.exp2(peak - higher)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            peak = higher

    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * (HEADS * C) + channel[None, :], out, mask=inside)
    if SAVE:
        tl.store(lse_ptr + row, peak + tl.log2(total), mask=row < L if MASKED else None)


@triton.jit
def _forward_kernel(
    qkv_ptr,  # (F, L, 3, H, C), C contiguous
    message_ptr,  # (F, 2, H, C)
    out_ptr,  # (F, L, H, C)
    lse_ptr,  # (F, H, L): log2 of the sum of the exponentials
    stride_f,
    stride_l,
    stride_3,
    stride_h,
    scale,  # log2(e) / sqrt(C)
    looped,  # FULL BLOCK_N, unknown to the compiler, which would unroll a short loop and take more registers
    L: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
    SAVE: tl.constexpr,
):
    blocks: tl.constexpr = (L + BLOCK_M - 1) // BLOCK_M
    full: tl.constexpr = 0 if REST == BLOCK_M else L // BLOCK_M  # one width, one code: masked
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % HEADS
    frame = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    q_ptr = qkv_ptr + frame * stride_f + head * stride_h
    message_ptr += (frame * 2 * HEADS + head) * C
    out_ptr += (frame * L * HEADS + head) * C
    lse_ptr += (frame * HEADS + head) * L
    if full > 0 and block < full:
        _attend_rows(
            q_ptr, message_ptr, out_ptr, lse_ptr, block * BLOCK_M, stride_l, stride_3, scale, looped,
            L, HEADS, C, BLOCK_M, False, BLOCK_N, FULL, LAST, SAVE,
        )  # fmt: skip
    if REST > 0 and block >= full:
        _attend_rows(
            q_ptr, message_ptr, out_ptr, lse_ptr, block * BLOCK_M, stride_l, stride_3, scale, looped,
            L, HEADS, C, REST, True, BLOCK_N, FULL, LAST, SAVE,
        )  # fmt: skip


def forward(save: bool, qkv: Tensor, message: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    if qkv.dim() != 5 or qkv.shape[2] != 3 or message.shape != (qkv.shape[0], 2, *qkv.shape[3:]):
        raise ValueError(
            f"qkv {tuple(qkv.shape)}, message {tuple(message.shape)} given; (F, L, 3, H, C), (F, 2, H, C) wanted"
        )
    qkv, message = channels_contiguous(qkv), message.contiguous()
    frames, length, _, heads, channels = qkv.shape
    save = save and not fits_one_tile(qkv)
    out = qkv.new_empty(frames, length, heads, channels)
    lse = qkv.new_empty((frames, heads, length) if save else 1, dtype=torch.float32)
    use, blocks, _ = frame_tile("diffusion_attention", qkv)
    launch(
        _forward_kernel,
        (frames * heads * blocks,),
        qkv,
        message,
        out,
        lse,
        *qkv.stride()[:4],
        channels**-0.5 * LOG2_E,
        use["FULL"] * use["BLOCK_N"],
        L=length,
        HEADS=heads,
        C=channels,
        SAVE=save,
        **use,
    )
    return (out,), (out, lse) if save else ()
