"""Backward of attention: two launches, dq with delta, then dk and dv; one for sequences that fit in one tile.

Letters and tiles as in triton.py. No atomics: every sum has one order, and results repeat bit by bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packed_attention.triton import packed_attention_bwd_kernel
from ..triton.launching import launch, tile
from .tiles import LOG2_E, channels_contiguous, fits_one_tile, power_of_two, sequence_tile


@triton.jit
def attention_dq_kernel(
    qkv_ptr,  # (F, S, 3, H, C), C contiguous
    out_ptr,  # (F, S, H, C)
    dout_ptr,  # (F, S, H, C)
    lse_ptr,  # (F, H, S)
    delta_ptr,  # (F, H, S)
    dqkv_ptr,  # (F, S, 3, H, C): its queries are written
    sums_ptr,  # (F, blocks of queries, 3, H, C) float32: rows whose sum is that of dqkv's rows
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
    channel = tl.arange(0, C)
    out_ptr += (sequence * S * HEADS + head) * C
    dout_ptr += (sequence * S * HEADS + head) * C
    dq_ptr = dqkv_ptr + (sequence * S * 3 * HEADS + head) * C
    for masked in tl.static_range(2):  # the code of full blocks, then that of the rest
        if (REST > 0 and block >= full) if masked else (full > 0 and block < full):
            row = block * BLOCK_M + tl.arange(0, REST if masked else BLOCK_M)
            inside = row[:, None] < S if masked else None
            valid = row < S if masked else None
            q_ptr = qkv_ptr + sequence * stride_f + head * stride_h
            q = tl.load(q_ptr + row.to(tl.int64)[:, None] * stride_s + channel[None, :], mask=inside)
            k_ptr = q_ptr + stride_3
            v_ptr = k_ptr + stride_3
            at = row[:, None] * (HEADS * C) + channel[None, :]
            do = tl.load(dout_ptr + at, mask=inside)
            # sum_j dv_j = sum_i do_i, and sum_j dk_j = 0: a row of p has the sum 1, and one of ds 0
            sums_at = sums_ptr + ((sequence * blocks + block) * 3 * HEADS + head) * C + channel
            tl.store(sums_at + HEADS * C, tl.zeros((C,), tl.float32))
            tl.store(sums_at + 2 * HEADS * C, tl.sum((tl.where(inside, do, 0.0) if masked else do).to(tl.float32), 0))
            delta = tl.sum(do.to(tl.float32) * tl.load(out_ptr + at, mask=inside).to(tl.float32), 1)
            at_row = (sequence * HEADS + head) * S + row
            tl.store(delta_ptr + at_row, delta, mask=valid)
            lse = tl.load(lse_ptr + at_row, mask=valid)

            dq = tl.zeros(q.shape, tl.float32)
            for whole in tl.static_range(2):  # the last tile of keys, then the full ones
                if FULL > 0 or not whole:
                    for start in range(0 if whole else FULL * BLOCK_N, looped if whole else S, BLOCK_N):
                        key = start + tl.arange(0, BLOCK_N if whole else LAST)
                        in_keys = None if whole else key[:, None] < S
                        at_key = key.to(tl.int64)[:, None] * stride_s + channel[None, :]
                        k = tl.load(k_ptr + at_key, mask=in_keys, other=None if whole else 0.0)
                        v = tl.load(v_ptr + at_key, mask=in_keys, other=None if whole else 0.0)
                        # p = exp(q k^T / sqrt(C) - lse);  ds = p (do v^T - delta);  dq = ds k / sqrt(C)
                        p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
                        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
                        ds = ds if whole else tl.where(key[None, :] < S, ds, 0.0)
                        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

            dq *= factor
            tl.store(sums_at, tl.sum(tl.where(inside, dq, 0.0) if masked else dq, 0))
            at_dq = row[:, None] * (3 * HEADS * C) + channel[None, :]
            tl.store(dq_ptr + at_dq, dq.to(dq_ptr.dtype.element_ty), mask=inside)


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
    channel = tl.arange(0, C)
    for masked in tl.static_range(2):  # the code of full blocks of keys, then that of the last
        if block >= full if masked else (full > 0 and block < full):
            key = block * BLOCK_N + tl.arange(0, LAST if masked else BLOCK_N)
            inside = key[:, None] < S if masked else None
            zero = 0.0 if masked else None
            k_at = q_ptr + stride_3 + key.to(tl.int64)[:, None] * stride_s + channel[None, :]
            k = tl.load(k_at, mask=inside, other=zero)
            v = tl.load(k_at + stride_3, mask=inside, other=zero)
            dk = tl.zeros(k.shape, tl.float32)
            dv = tl.zeros(k.shape, tl.float32)
            for rest in tl.static_range(2):  # full tiles of queries, then the rows behind them
                if REST > 0 if rest else S >= BLOCK_M:
                    for start in range(S // BLOCK_M * BLOCK_M if rest else 0, S if rest else looped, BLOCK_M):
                        row = start + tl.arange(0, REST if rest else BLOCK_M)
                        in_rows = row < S if rest else None
                        wide = row[:, None] < S if rest else None
                        none = 0.0 if rest else None  # rows past S: q = do = 0, so they add nothing
                        q_at = q_ptr + row.to(tl.int64)[:, None] * stride_s + channel[None, :]
                        q = tl.load(q_at, mask=wide, other=none)
                        do_at = dout_ptr + row[:, None] * (HEADS * C) + channel[None, :]
                        do = tl.load(do_at, mask=wide, other=none)
                        lse = tl.load(lse_ptr + row, mask=in_rows, other=none)
                        delta = tl.load(delta_ptr + row, mask=in_rows, other=none)
                        # transposed, (keys, queries): dv = p^T do;  dk = ds^T q / sqrt(C)
                        p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])
                        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
                        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
                        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
            dk_at = dk_ptr + key[:, None] * (3 * HEADS * C) + channel[None, :]
            tl.store(dk_at, (dk * factor).to(dk_ptr.dtype.element_ty), mask=inside)
            tl.store(dk_at + HEADS * C, dv.to(dk_ptr.dtype.element_ty), mask=inside)


def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, saved: Sequence[Tensor], causal: bool = False
) -> tuple[Tensor, Tensor]:
    """dqkv (F, S, 3, H, C) of ``attention.forward``, and rows (N, 3 H C) float32 whose sum is that of its rows."""
    qkv, dout = channels_contiguous(qkv), dout.contiguous()
    count, length, _, heads, channels = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    numbers = (*qkv.stride()[:4], channels**-0.5 * LOG2_E, channels**-0.5)
    shape = {"S": length, "HEADS": heads, "C": channels}
    if fits_one_tile(qkv):
        use = tile("attention_one_tile_backward", qkv.device, length=length, bytes=qkv.element_size())
        grid, shape = (count * heads,), {"HEADS": heads, "C": channels, "BLOCK": power_of_two(length)}
        sums = torch.empty(count, 3 * heads * channels, dtype=torch.float32, device=qkv.device)
        launch(packed_attention_bwd_kernel, grid, qkv, None, dout, dqkv, sums, length, *numbers, **shape, **use)
        return dqkv, sums
    (lse,) = saved
    delta = torch.empty_like(lse)
    use, blocks, _ = sequence_tile("attention_dq", qkv.device, qkv.shape[0], qkv.shape[1], qkv.element_size())
    grid, numbers_dq = (count * heads * blocks,), (*numbers, use["FULL"] * use["BLOCK_N"])
    sums = torch.empty(count * blocks, 3 * heads * channels, dtype=torch.float32, device=qkv.device)
    launch(attention_dq_kernel, grid, qkv, out, dout, lse, delta, dqkv, sums, *numbers_dq, **shape, **use)
    use, _, blocks = sequence_tile("attention_dk_dv", qkv.device, qkv.shape[0], qkv.shape[1], qkv.element_size())
    grid, numbers_dk = (count * heads * blocks,), (*numbers, length // use["BLOCK_M"] * use["BLOCK_M"])
    launch(attention_dk_dv_kernel, grid, qkv, dout, lse, delta, dqkv, *numbers_dk, **shape, **use)
    return dqkv, sums
