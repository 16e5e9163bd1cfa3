"""Attention of sequences that fit in one tile: one program a sequence and head. Causal over packed labels, forward and
backward; over sequences of equal length, backward (attention/triton.py has their forward).

M rows in all, K labels, F sequences of S rows, H heads, C channels of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.tiles import LOG2_E, attend_tile, attend_tile_backward, channels_contiguous
from ..triton.launching import launch, tile


@triton.jit
def packed_attention_fwd_kernel(
    qkv_ptr,  # (S, 3, H, C), C contiguous
    offsets_ptr,  # (K + 1,)
    out_ptr,  # (S, H, C)
    stride_s,
    stride_3,
    stride_h,
    scale,  # log2(e) / sqrt(C)
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,  # at least the longest label
):
    label, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    start = tl.load(offsets_ptr + label).to(tl.int64)
    length = (tl.load(offsets_ptr + label + 1) - start).to(tl.int32)
    row, channel = tl.arange(0, BLOCK), tl.arange(0, C)
    at = qkv_ptr + (start + row)[:, None] * stride_s + head * stride_h + channel[None, :]
    inside = row[:, None] < length
    q = tl.load(at, mask=inside, other=0.0)
    k = tl.load(at + stride_3, mask=inside, other=0.0)
    v = tl.load(at + stride_3 + stride_3, mask=inside, other=0.0)
    # a token sees no later one, so no token of the label sees the rows behind its end
    out = attend_tile(q, k, v, row[:, None] >= row[None, :], scale)
    to = out_ptr + ((start + row)[:, None] * HEADS + head) * C + channel[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def packed_attention_bwd_kernel(
    qkv_ptr,  # (M, 3, H, C), C contiguous
    offsets_ptr,  # (K + 1,): causal labels; or None: sequences of ``length`` rows, stride_f apart
    dout_ptr,  # (M, H, C)
    dqkv_ptr,  # (M, 3, H, C)
    sums_ptr,  # (sequences, 3, H, C) float32: rows whose sum is that of dqkv's rows
    length,
    stride_f,
    stride_s,
    stride_3,
    stride_h,
    scale,  # log2(e) / sqrt(C)
    factor,  # 1 / sqrt(C)
    HEADS: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,  # at least the longest sequence
):
    sequence, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    row, channel = tl.arange(0, BLOCK), tl.arange(0, C)
    if offsets_ptr is not None:
        start = tl.load(offsets_ptr + sequence).to(tl.int64)
        length = (tl.load(offsets_ptr + sequence + 1) - start).to(tl.int32)
        first = start * stride_s
        seen = row[:, None] >= row[None, :]
    else:
        start = sequence * length
        first = sequence * stride_f
        seen = row[None, :] < length
    at = qkv_ptr + first + row.to(tl.int64)[:, None] * stride_s + head * stride_h + channel[None, :]
    inside = row[:, None] < length
    q = tl.load(at, mask=inside, other=0.0)
    k = tl.load(at + stride_3, mask=inside, other=0.0)
    v = tl.load(at + stride_3 + stride_3, mask=inside, other=0.0)
    # rows behind the end: q = do = 0, so that they give nothing to dk and dv
    do = tl.load(dout_ptr + ((start + row)[:, None] * HEADS + head) * C + channel[None, :], mask=inside, other=0.0)
    # sum_j dv_j = sum_i do_i, and sum_j dk_j = 0: a row of p has the sum 1, and one of ds 0
    sums_at = sums_ptr + (sequence * 3 * HEADS + head) * C + channel
    tl.store(sums_at + HEADS * C, tl.zeros((C,), tl.float32))
    tl.store(sums_at + 2 * HEADS * C, tl.sum(do.to(tl.float32), 0))
    p, ds = attend_tile_backward(q, k, v, do, seen, scale)
    to = dqkv_ptr + ((start + row)[:, None] * 3 * HEADS + head) * C + channel[None, :]
    dv = tl.dot(tl.trans(p), do, input_precision="ieee")
    tl.store(to + 2 * HEADS * C, dv.to(dqkv_ptr.dtype.element_ty), mask=inside)
    dq = tl.dot(ds, k, input_precision="ieee") * factor
    tl.store(sums_at, tl.sum(dq, 0))
    tl.store(to, dq.to(dqkv_ptr.dtype.element_ty), mask=inside)
    dk = tl.dot(tl.trans(ds), q, input_precision="ieee") * factor
    tl.store(to + HEADS * C, dk.to(dqkv_ptr.dtype.element_ty), mask=inside)


def forward(save: bool, qkv: Tensor, offsets: Tensor, longest: int) -> tuple[Tensor, tuple[()]]:
    """(M, 3, H, C), offsets (K + 1,) -> (M, H, C). Nothing is saved."""
    qkv, offsets = channels_contiguous(qkv), offsets.contiguous()
    rows, _, heads, channels = qkv.shape
    out = qkv.new_empty(rows, heads, channels)
    use = tile("packed_attention", qkv.device, longest=longest, bytes=qkv.element_size())
    grid, numbers = ((offsets.shape[0] - 1) * heads,), (*qkv.stride()[:3], channels**-0.5 * LOG2_E)
    launch(packed_attention_fwd_kernel, grid, qkv, offsets, out, *numbers, HEADS=heads, C=channels, **use)
    return out, ()


def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, saved: tuple[()], offsets: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """dqkv (M, 3, H, C), and rows (K, 3 H C) float32 whose sum is that of its rows."""
    qkv, offsets = channels_contiguous(qkv), offsets.contiguous()
    heads, channels = qkv.shape[2:]
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    use = tile("packed_attention", qkv.device, longest=longest, bytes=qkv.element_size())
    sums = torch.empty(len(offsets) - 1, 3 * heads * channels, dtype=torch.float32, device=qkv.device)
    grid, shape = (len(sums) * heads,), {"HEADS": heads, "C": channels}
    numbers = (0, 0, *qkv.stride()[:3], channels**-0.5 * LOG2_E, channels**-0.5)
    launch(packed_attention_bwd_kernel, grid, qkv, offsets, dout.contiguous(), dqkv, sums, *numbers, **shape, **use)
    return dqkv, sums
