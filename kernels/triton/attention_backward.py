"""Backward of attention: two launches, dq with delta, then dk and dv; one for sequences that fit in one tile.

Letters and tiles as in attention.py. No atomics: every sum has one order, and results repeat bit by bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import LOG2_E, channels_contiguous, fits_one_tile, power_of_two, sequence_tile
from .launching import launch, tile
from .packed_attention import packed_attention_bwd_kernel


@triton.jit
def _dq_rows(
    q_ptr,  # this sequence's and head's queries, (S, C)
    out_ptr,  # (S, C), row stride HEADS C
    dout_ptr,  # (S, C), row stride HEADS C
    lse_ptr,  # (S,)
    delta_ptr,  # (S,), written
    dq_ptr,  # (S, C), row stride 3 HEADS C, written
    first,  # row
    stride_s,
    stride_3,
    scale,
    factor,
    looped,
    S: tl.constexpr,
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
    inside = row[:, None] < S if MASKED else None
    valid = row < S if MASKED else None
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * stride_s + channel[None, :], mask=inside)
    k_ptr = q_ptr + stride_3
    v_ptr = k_ptr + stride_3
    at = row[:, None] * (HEADS * C) + channel[None, :]
    do = tl.load(dout_ptr + at, mask=inside)
    delta = tl.sum(do.to(tl.float32) * tl.load(out_ptr + at, mask=inside).to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=valid)
    lse = tl.load(lse_ptr + row, mask=valid)

    key = FULL * BLOCK_N + tl.arange(0, LAST)
    at_last = key.to(tl.int64)[:, None] * stride_s + channel[None, :]
    k_last = tl.load(k_ptr + at_last, mask=key[:, None] < S, other=0.0)
    v_last = tl.load(v_ptr + at_last, mask=key[:, None] < S, other=0.0)
    # p = exp(q k^T / sqrt(C) - lse);  ds = p (do v^T - delta);  dq = ds k / sqrt(C)
    p_last = tl.exp2(tl.dot(q, tl.trans(k_last), input_precision="ieee") * scale - lse[:, None])
    dp_last = tl.dot(do, tl.trans(v_last), input_precision="ieee")
    ds_last = tl.where(key[None, :] < S, p_last * (dp_last - delta[:, None]), 0.0)
    dq = tl.dot(ds_last.to(k_last.dtype), k_last, input_precision="ieee")

    at = tl.arange(0, BLOCK_N).to(tl.int64)[:, None] * stride_s + channel[None, :]
    step = tl.full((), BLOCK_N, tl.int64) * stride_s
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
def attention_dq_kernel(
    qkv_ptr,  # (F, S, 3, H, C), C contiguous
    out_ptr,  # (F, S, H, C)
    dout_ptr,  # (F, S, H, C)
    lse_ptr,  # (F, H, S)
    delta_ptr,  # (F, H, S)
    dqkv_ptr,  # (F, S, 3, H, C): its queries are written
    stride_f,
    stride_s,
    stride_3,
    stride_h,
    scale,  # log2(e) / sqrt(C)
    factor,  # 1 / sqrt(C)
    looped,  # FULL BLOCK_N, unknown to the compiler
    S: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FULL: tl.constexpr,
    LAST: tl.constexpr,
):
    blocks: tl.constexpr = (S + BLOCK_M - 1) // BLOCK_M
    full: tl.constexpr = 0 if REST == BLOCK_M else S // BLOCK_M  # one width, one code: masked
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % HEADS
    sequence = (tl.program_id(0) // (blocks * HEADS)).to(tl.int64)
    q_ptr = qkv_ptr + sequence * stride_f + head * stride_h
    out_ptr += (sequence * S * HEADS + head) * C
    dout_ptr += (sequence * S * HEADS + head) * C
    lse_ptr += (sequence * HEADS + head) * S
    delta_ptr += (sequence * HEADS + head) * S
    dq_ptr = dqkv_ptr + (sequence * S * 3 * HEADS + head) * C
    if full > 0 and block < full:
        _dq_rows(
            q_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, block * BLOCK_M, stride_s, stride_3,
            scale, factor, looped, S, HEADS, C, BLOCK_M, False, BLOCK_N, FULL, LAST,
        )  # fmt: skip
    if REST > 0 and block >= full:
        _dq_rows(
            q_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, block * BLOCK_M, stride_s, stride_3,
            scale, factor, looped, S, HEADS, C, REST, True, BLOCK_N, FULL, LAST,
        )  # fmt: skip


@triton.jit
def _dk_dv_step(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, row, channel, stride_s, scale,
    S: tl.constexpr, HEADS: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the queries ``row`` add to dk (without its factor) and dv. Rows past S: q = do = 0, so they add nothing."""
    if MASKED:
        inside, valid, zero = row[:, None] < S, row < S, 0.0
    else:
        inside, valid, zero = None, None, None
    q = tl.load(q_ptr + row.to(tl.int64)[:, None] * stride_s + channel[None, :], mask=inside, other=zero)
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
    q_ptr,  # this sequence's and head's queries, (S, C)
    dout_ptr,  # (S, C), row stride HEADS C
    lse_ptr,  # (S,)
    delta_ptr,  # (S,)
    dk_ptr,  # (S, C), row stride 3 HEADS C, written; dv is HEADS C behind
    first,  # key
    stride_s,
    stride_3,
    scale,
    factor,
    looped,
    S: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REST: tl.constexpr,
    KEYS: tl.constexpr,
    LAST: tl.constexpr,
):
    """dk and dv of keys first to first + KEYS - 1; the last tile is masked."""
    key, channel = first + tl.arange(0, KEYS), tl.arange(0, C)
    k_ptr = q_ptr + stride_3
    v_ptr = k_ptr + stride_3
    at = key.to(tl.int64)[:, None] * stride_s + channel[None, :]
    if LAST:
        k = tl.load(k_ptr + at, mask=key[:, None] < S, other=0.0)
        v = tl.load(v_ptr + at, mask=key[:, None] < S, other=0.0)
    else:
        k, v = tl.load(k_ptr + at), tl.load(v_ptr + at)
    dk = tl.zeros((KEYS, C), tl.float32)
    dv = tl.zeros((KEYS, C), tl.float32)
    if S >= BLOCK_M:
        for start in range(0, looped, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            dk, dv = _dk_dv_step(
                dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, row, channel, stride_s, scale, S, HEADS, C, False
            )
    if REST > 0:
        row = S // BLOCK_M * BLOCK_M + tl.arange(0, REST)
        dk, dv = _dk_dv_step(
            dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, row, channel, stride_s, scale, S, HEADS, C, True
        )
    dk = (dk * factor).to(dk_ptr.dtype.element_ty)
    dv = dv.to(dk_ptr.dtype.element_ty)
    at = key[:, None] * (3 * HEADS * C) + channel[None, :]
    inside = key[:, None] < S if LAST else None
    tl.store(dk_ptr + at, dk, mask=inside)
    tl.store(dk_ptr + HEADS * C + at, dv, mask=inside)


@triton.jit
def attention_dk_dv_kernel(
    qkv_ptr,  # (F, S, 3, H, C), C contiguous
    dout_ptr,  # (F, S, H, C)
    lse_ptr,  # (F, H, S)
    delta_ptr,  # (F, H, S)
    dqkv_ptr,  # (F, S, 3, H, C): its keys and values are written
    stride_f,
    stride_s,
    stride_3,
    stride_h,
    scale,  # log2(e) / sqrt(C)
    factor,  # 1 / sqrt(C)
    looped,  # the queries of full tiles, their number unknown to the compiler
    S: tl.constexpr,
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
    sequence = (tl.program_id(0) // ((FULL + 1) * HEADS)).to(tl.int64)
    q_ptr = qkv_ptr + sequence * stride_f + head * stride_h
    dout_ptr += (sequence * S * HEADS + head) * C
    lse_ptr += (sequence * HEADS + head) * S
    delta_ptr += (sequence * HEADS + head) * S
    dk_ptr = dqkv_ptr + (sequence * S * 3 * HEADS + HEADS + head) * C
    full: tl.constexpr = 0 if LAST == BLOCK_N else FULL  # one width, one code: masked
    if full > 0 and block < full:
        _dk_dv_rows(
            q_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, block * BLOCK_N, stride_s,
            stride_3, scale, factor, looped, S, HEADS, C, BLOCK_M, REST, BLOCK_N, False,
        )  # fmt: skip
    if block >= full:
        _dk_dv_rows(
            q_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, block * BLOCK_N, stride_s,
            stride_3, scale, factor, looped, S, HEADS, C, BLOCK_M, REST, LAST, True,
        )  # fmt: skip


def backward(dout: Tensor, qkv: Tensor, out: Tensor, saved: Sequence[Tensor]) -> Tensor:
    """dqkv (F, S, 3, H, C) of ``attention.forward``."""
    qkv, dout = channels_contiguous(qkv), dout.contiguous()
    count, length, _, heads, channels = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    numbers = (*qkv.stride()[:4], channels**-0.5 * LOG2_E, channels**-0.5)
    shape = {"S": length, "HEADS": heads, "C": channels}
    if fits_one_tile(qkv):
        use = tile("attention_one_tile_backward", qkv.device, length=length, bytes=qkv.element_size())
        grid, shape = (count * heads,), {"HEADS": heads, "C": channels, "BLOCK": power_of_two(length)}
        launch(packed_attention_bwd_kernel, grid, qkv, None, dout, dqkv, length, *numbers, **shape, **use)
        return dqkv
    (lse,) = saved
    delta = torch.empty_like(lse)
    use, blocks, _ = sequence_tile("attention_dq", qkv.device, qkv.shape[1], qkv.element_size())
    grid, numbers_dq = (count * heads * blocks,), (*numbers, use["FULL"] * use["BLOCK_N"])
    launch(attention_dq_kernel, grid, qkv, out, dout, lse, delta, dqkv, *numbers_dq, **shape, **use)
    use, _, blocks = sequence_tile("attention_dk_dv", qkv.device, qkv.shape[1], qkv.element_size())
    grid, numbers_dk = (count * heads * blocks,), (*numbers, length // use["BLOCK_M"] * use["BLOCK_M"])
    launch(attention_dk_dv_kernel, grid, qkv, dout, lse, delta, dqkv, *numbers_dk, **shape, **use)
    return dqkv
