"""Backward of diffusion attention: two launches, dq with delta, then dk and dv; one for frames that fit in one tile.

Letters and tiles as in diffusion_attention.py. No atomics: every sum has one order, and results repeat bit by bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..diffusion_attention import fits_one_tile
from ._attention import LOG2_E, attend_tile_backward, channels_contiguous, frame_tile, last_tile, power_of_two
from ._launch import launch, tile


@triton.jit
def _dq_rows(
    q_ptr,  # this frame's and head's queries, (L, C)
    message_ptr,  # this frame's and head's (k_m, v_m)
    out_ptr,  # (L, C), row stride HEADS C
    dout_ptr,  # (L, C), row stride HEADS C
    lse_ptr,  # (L,)
    delta_ptr,  # (L,), written
    dq_ptr,  # (L, C), row stride 3 HEADS C, written
    first,  # row
    stride_l,
    stride_3,
    scale,
    factor,
    looped,
    L: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
):
    """Rows first to first + ROWS - 1 of dq, and their delta = rowsum(do o)."""
    row, channel = first + tl.arange(0, ROWS), tl.arange(0, C)
    inside = row[:, None] < L if MASKED else None
    valid = row < L if MASKED else None
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * stride_l + channel[None, :], mask=inside)
    k_ptr = q_ptr + stride_3
    v_ptr = k_ptr + stride_3
    at = row[:, None] * (HEADS * C) + channel[None, :]
    do = tl.load(dout_ptr + at, mask=inside)
    delta = tl.sum(do.to(tl.float32) * tl.load(out_ptr + at, mask=inside).to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=valid)
    lse = tl.load(lse_ptr + row, mask=valid)

    key = FULL * BLOCK_N + tl.arange(0, LAST)
    k_last = last_tile(k_ptr, message_ptr, key, channel, stride_l, L)
    v_last = last_tile(v_ptr, message_ptr + HEADS * C, key, channel, stride_l, L)
    # p = exp(q k^T / sqrt(C) - lse);  ds = p (do v^T - delta);  dq = ds k / sqrt(C)
    p_last = tl.exp2(tl.dot(q, tl.trans(k_last), input_precision="ieee") * scale - lse[:, None])
    dp_last = tl.dot(do, tl.trans(v_last), input_precision="ieee")
    ds_last = tl.where(key[None, :] <= L, p_last * (dp_last - delta[:, None]), 0.0)
    dq = tl.dot(ds_last.to(k_last.dtype), k_last, input_precision="ieee")

    at = tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * stride_l + channel[None, :]
    step = tl.full((), BLOCK_N, tl.int64) * stride_l
    if FULL > 0:
        for _ in range(0, looped, BLOCK_N):
            k = tl.load(k_ptr + at)
            v = tl.load(v_ptr + at)
            at += step
            p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
            ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    at = row[:, None] * (3 * HEADS * C) + channel[None, :]
    tl.store(dq_ptr + at, (dq * factor).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dq_kernel(
    qkv_ptr,  # (F, L, 3, H, C), C contiguous
    message_ptr,  # (F, 2, H, C)
    out_ptr,  # (F, L, H, C)
    dout_ptr,  # (F, L, H, C)
    lse_ptr,  # (F, H, L)
    delta_ptr,  # (F, H, L)
    dqkv_ptr,  # (F, L, 3, H, C): its queries are written
    stride_f,
    stride_l,
    stride_3,
    stride_h,
    scale,  # log2(e) / sqrt(C)
    factor,  # 1 / sqrt(C)
    looped,  # FULL BLOCK_N, unknown to the compiler
    L: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
):
    blocks: tl.constexpr = (L + BLOCK_M - 1) // BLOCK_M
    full: tl.constexpr = 0 if REST == BLOCK_M else L // BLOCK_M  # one width, one code: masked
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % HEADS
    frame = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    q_ptr = qkv_ptr + frame * stride_f + head * stride_h
    message_ptr += (frame * 2 * HEADS + head) * C
    out_ptr += (frame * L * HEADS + head) * C
    dout_ptr += (frame * L * HEADS + head) * C
    lse_ptr += (frame * HEADS + head) * L
    delta_ptr += (frame * HEADS + head) * L
    dq_ptr = dqkv_ptr + (frame * L * 3 * HEADS + head) * C
    if full > 0 and block < full:
        _dq_rows(
            q_ptr, message_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, block * BLOCK_M, stride_l, stride_3,
            scale, factor, looped, L, HEADS, C, BLOCK_M, False, BLOCK_N, FULL, LAST,
        )  # fmt: skip
    if REST > 0 and block >= full:
        _dq_rows(
            q_ptr, message_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, block * BLOCK_M, stride_l, stride_3,
            scale, factor, looped, L, HEADS, C, REST, True, BLOCK_N, FULL, LAST,
        )  # fmt: skip


@triton.jit
def _dk_dv_step(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, row, channel, stride_l, scale,
    L: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the queries ``row`` add to dk (without its factor) and dv. Rows past L: q = do = 0, so they add nothing."""
    if MASKED:
        inside, valid, zero = row[:, None] < L, row < L, 0.0
    else:
        inside, valid, zero = None, None, None
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * stride_l + channel[None, :], mask=inside, other=zero)
    do = tl.load(dout_ptr + row[:, None] * (HEADS * C) + channel[None, :], mask=inside, other=zero)
    lse = tl.load(lse_ptr + row, mask=valid, other=zero)
    delta = tl.load(delta_ptr + row, mask=valid, other=zero)
    # transposed, (keys, queries): dv = p^T do;  dk = ds^T q / sqrt(C)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _dk_dv_rows(
    q_ptr,  # this frame's and head's queries, (L, C)
    message_ptr,  # this frame's and head's (k_m, v_m)
    dout_ptr,  # (L, C), row stride HEADS C
    lse_ptr,  # (L,)
    delta_ptr,  # (L,)
    dk_ptr,  # (L, C), row stride 3 HEADS C, written; dv is HEADS C behind
    dmessage_ptr,  # this frame's and head's (dk_m, dv_m), written
    first,  # key
    stride_l,
    stride_3,
    scale,
    factor,
    looped,
    L: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    LAST: tl.constexpr,
):
    """dk and dv of keys first to first + KEYS - 1; the last tile holds the message."""
    key, channel = first + tl.arange(0, KEYS), tl.arange(0, C)
    k_ptr = q_ptr + stride_3
    v_ptr = k_ptr + stride_3
    if LAST:
        k = last_tile(k_ptr, message_ptr, key, channel, stride_l, L)
        v = last_tile(v_ptr, message_ptr + HEADS * C, key, channel, stride_l, L)
    else:
        at = key.to(tl.int64)[:, None] * stride_l + channel[None, :]
        k, v = tl.load(k_ptr + at), tl.load(v_ptr + at)
    dk = tl.zeros((KEYS, C), tl.float32)
    dv = tl.zeros((KEYS, C), tl.float32)
    if L >= BLOCK_M:
        for start in range(0, looped, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            dk, dv = _dk_dv_step(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, row, channel, stride_l, scale, L, HEADS, C, False
            )
    if REST > 0:
        row = L // BLOCK_M * BLOCK_M + tl.arange(0, REST)
        dk, dv = _dk_dv_step(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, row, channel, stride_l, scale, L, HEADS, C, True
        )
    dk = (dk * factor).to(dk_ptr.dtype.element_ty)
    dv = dv.to(dk_ptr.dtype.element_ty)
    at = key[:, None] * (3 * HEADS * C) + channel[None, :]
    inside = key[:, None] < L if LAST else None
    tl.store(dk_ptr + at, dk, mask=inside)
    tl.store(dk_ptr + HEADS * C + at, dv, mask=inside)
    if LAST:
        at = tl.zeros_like(key)[:, None] + channel[None, :]
        tl.store(dmessage_ptr + at, dk, mask=key[:, None] == L)
        tl.store(dmessage_ptr + HEADS * C + at, dv, mask=key[:, None] == L)


@triton.jit
def _dk_dv_kernel(
    qkv_ptr,  # (F, L, 3, H, C), C contiguous
    message_ptr,  # (F, 2, H, C)
    dout_ptr,  # (F, L, H, C)
    lse_ptr,  # (F, H, L)
    delta_ptr,  # (F, H, L)
    dqkv_ptr,  # (F, L, 3, H, C): its keys and values are written
    dmessage_ptr,  # (F, 2, H, C)
    stride_f,
    stride_l,
    stride_3,
    stride_h,
    scale,  # log2(e) / sqrt(C)
    factor,  # 1 / sqrt(C)
    looped,  # the queries of full tiles, their number unknown to the compiler
    L: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
):
    block = tl.program_id(0) % (FULL + 1)
    head = tl.program_id(0) // (FULL + 1) % HEADS
    frame = (tl.program_id(0) // ((FULL + 1) * HEADS)).to(tl.int64)
    q_ptr = qkv_ptr + frame * stride_f + head * stride_h
    message_ptr += (frame * 2 * HEADS + head) * C
    dmessage_ptr += (frame * 2 * HEADS + head) * C
    dout_ptr += (frame * L * HEADS + head) * C
    lse_ptr += (frame * HEADS + head) * L
    delta_ptr += (frame * HEADS + head) * L
    dk_ptr = dqkv_ptr + (frame * L * 3 * HEADS + HEADS + head) * C
    full: tl.constexpr = 0 if LAST == BLOCK_N else FULL  # one width, one code: the one with the message
    if full > 0 and block < full:
        _dk_dv_rows(
            q_ptr, message_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dmessage_ptr, block * BLOCK_N, stride_l,
            stride_3, scale, factor, looped, L, HEADS, C, BLOCK_M, REST, BLOCK_N, False,
        )  # fmt: skip
    if block >= full:
        _dk_dv_rows(
            q_ptr, message_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dmessage_ptr, block * BLOCK_N, stride_l,
            stride_3, scale, factor, looped, L, HEADS, C, BLOCK_M, REST, LAST, True,
        )  # fmt: skip


@triton.jit
def _one_tile_backward_kernel(
    qkv_ptr,  # (F, L, 3, H, C), C contiguous
    message_ptr,  # (F, 2, H, C)
    dout_ptr,  # (F, L, H, C)
    dqkv_ptr,  # (F, L, 3, H, C)
    dmessage_ptr,  # (F, 2, H, C)
    stride_f,
    stride_l,
    stride_3,
    stride_h,
    scale,  # log2(e) / sqrt(C)
    factor,  # 1 / sqrt(C)
    L: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,  # at least L + 1
):
    head, frame = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    q_ptr = qkv_ptr + frame * stride_f + head * stride_h
    message_ptr += (frame * 2 * HEADS + head) * C
    dmessage_ptr += (frame * 2 * HEADS + head) * C
    row, channel = tl.arange(0, BLOCK), tl.arange(0, C)
    inside = row[:, None] < L
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * stride_l + channel[None, :], mask=inside, other=0.0)
    k = last_tile(q_ptr + stride_3, message_ptr, row, channel, stride_l, L)
    v = last_tile(q_ptr + stride_3 + stride_3, message_ptr + HEADS * C, row, channel, stride_l, L)
    at = ((frame * L + row[:, None]) * HEADS + head) * C + channel[None, :]
    do = tl.load(dout_ptr + at, mask=inside, other=0.0)
    p, ds = attend_tile_backward(q, k, v, do, row[None, :] <= L, scale)
    to = dqkv_ptr + ((frame * L + row[:, None]) * 3 * HEADS + head) * C + channel[None, :]
    # key number L is the message
    to_message = dmessage_ptr + tl.zeros_like(row)[:, None] + channel[None, :]
    message = row[:, None] == L
    dv = tl.dot(tl.trans(p), do, input_precision="ieee").to(q.dtype)
    tl.store(to + 2 * HEADS * C, dv, mask=inside)
    tl.store(to_message + HEADS * C, dv, mask=message)
    dq = tl.dot(ds, k, input_precision="ieee") * factor
    tl.store(to, dq.to(q.dtype), mask=inside)
    dk = (tl.dot(tl.trans(ds), q, input_precision="ieee") * factor).to(q.dtype)
    tl.store(to + HEADS * C, dk, mask=inside)
    tl.store(to_message, dk, mask=message)


def backward(
    grads: Sequence[Any], saved: Sequence[Tensor], needs: Sequence[bool], qkv: Tensor, message: Tensor
) -> list[Tensor]:
    dmessage = torch.empty_like(message, memory_format=torch.contiguous_format)
    qkv, message, dout = channels_contiguous(qkv), message.contiguous(), grads[0].contiguous()
    frames, length, _, heads, channels = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    numbers = (*qkv.stride()[:4], channels**-0.5 * LOG2_E, channels**-0.5)
    shape = {"L": length, "HEADS": heads, "C": channels}
    if fits_one_tile(qkv):
        use = tile("diffusion_attention_one_tile_backward", qkv.device, length=length, bytes=qkv.element_size())
        block = power_of_two(length + 1)
        grid = (frames * heads,)
        launch(
            _one_tile_backward_kernel, grid, qkv, message, dout, dqkv, dmessage, *numbers, **shape, BLOCK=block, **use
        )
    else:
        out, lse = saved
        delta = torch.empty_like(lse)
        use, blocks, _ = frame_tile("diffusion_attention_dq", qkv)
        grid, numbers_dq = (frames * heads * blocks,), (*numbers, use["FULL"] * use["BLOCK_N"])
        launch(_dq_kernel, grid, qkv, message, out, dout, lse, delta, dqkv, *numbers_dq, **shape, **use)
        use, _, blocks = frame_tile("diffusion_attention_dk_dv", qkv)
        grid, numbers_dk = (frames * heads * blocks,), (*numbers, length // use["BLOCK_M"] * use["BLOCK_M"])
        launch(_dk_dv_kernel, grid, qkv, message, dout, lse, delta, dqkv, dmessage, *numbers_dk, **shape, **use)
    return [grad for grad, need in zip((dqkv, dmessage), needs, strict=True) if need]
