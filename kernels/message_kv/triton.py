"""The message path in three launches: message token; LN_m, QKV and attention over T; output and residual. LN_1, key
and value are a fourth where the projection of the frames' tokens does not make them.

B videos, T frames, F = B T rows, D width, H heads of C channels. F is small, so a product takes as long as its loads:
they run several steps ahead. A LayerNorm takes its statistics from the product that wrote its rows: otherwise each
program would wait for whole rows before its first step.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import attention_reference, takes
from ..attention import triton as attention
from ..attention.tiles import LOG2_E, attend_tile, power_of_two
from ..triton import ONE_TILE
from ..triton.launching import Prepared, arch, cdiv, next_power_of_2, prepared, tile
from ..triton.rows import Spare
from .triton_backward import backward

__all__ = ["backward", "forward"]

APART = 16  # rows up to which QKV and attention are two launches: the first has more programs than there are heads
SLICE = 32  # columns of a row whose mean and M2 stand in one slot


@triton.jit
def _statistics(parts_ptr, mean_ptr, rstd_ptr, rows, kept, M, K, eps, SLICE: tl.constexpr, SLOTS: tl.constexpr):
    """mean and 1 / sigma of rows of K numbers from the (mean, M2) of their slices; those ``kept`` are stored"""
    # mean = sum n_i mean_i / K, M2 = sum M2_i + n_i (mean_i - mean)^2
    slot, slots = tl.arange(0, SLOTS)[None, :], tl.cdiv(K, SLICE)
    count = tl.maximum(tl.minimum(K - slot * SLICE, SLICE), 0).to(tl.float32)
    at = parts_ptr + tl.minimum(rows, M - 1)[:, None].to(tl.int64) * slots + slot
    part_mean = tl.load(at, mask=slot < slots, other=0.0)
    part_m2 = tl.load(at + M * slots, mask=slot < slots, other=0.0)
    mean = tl.sum(count * part_mean, 1) / K
    off = part_mean - mean[:, None]
    rstd = 1.0 / tl.sqrt(tl.sum(part_m2 + count * off * off, 1) / K + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=kept)
        tl.store(rstd_ptr + rows, rstd, mask=kept)
    return mean, rstd


@triton.jit
def _normed(x, mean, rstd, weight_ptr, bias_ptr, k, K, EVEN_K: tl.constexpr):
    """columns k of LN(x), float32"""
    in_k = None if EVEN_K else k < K
    weight = tl.load(weight_ptr + k, mask=in_k, other=None if EVEN_K else 0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + k, mask=in_k, other=None if EVEN_K else 0.0).to(tl.float32)[None, :]
    return (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * weight + bias


@triton.jit
def _depth(at, k, K, AXIS: tl.constexpr, EVEN_K: tl.constexpr):
    """columns k of the rows that start ``at``, 0 past the end; k lies along the other axis"""
    k = tl.expand_dims(k, AXIS)
    return tl.load(at + k, mask=None if EVEN_K else k < K, other=None if EVEN_K else 0.0)


@triton.jit(do_not_specialize=["M"])
def message_rows_kernel(
    x_ptr,  # (M, K), rows x_row apart
    weight_ptr,  # (N, K), rows weight_row apart
    bias_ptr,  # (N,)
    norm_weight_ptr,  # (K,) or None: no LayerNorm of x
    norm_bias_ptr,  # (K,), with norm_weight
    x_parts_ptr,  # (2, M, K / SLICE) float32, with norm_weight: mean and M2 of each slice of x's rows
    mean_ptr,  # (M,) float32 or None: not wanted
    rstd_ptr,  # (M,) float32, with mean
    residual_ptr,  # (M, N) or None
    drop_ptr,  # (M / frames,) or None
    y_ptr,  # (M, N), rows y_row apart
    y_parts_ptr,  # (2, M, N / SLICE) float32 or None: the same of y's rows as stored; M2 = sum (y - mean)^2
    M,
    N,
    K,
    x_row,
    weight_row,
    y_row,
    frames,
    eps,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    SLICE: tl.constexpr,
    SLOTS: tl.constexpr,  # >= K / SLICE, a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = residual + s (LN(x) W^T + b). Tiles that share a part of the weight follow each other."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    rows = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = rows < M
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns past the end repeat the last one: their results are never stored
    x_at = x_ptr + tl.minimum(rows, M - 1)[:, None].to(tl.int64) * x_row
    weight_at = weight_ptr + tl.minimum(columns, N - 1)[None, :] * weight_row

    if norm_weight_ptr is not None:
        kept = rows < tl.where(tile_n == 0, M, 0)
        mean, rstd = _statistics(x_parts_ptr, mean_ptr, rstd_ptr, rows, kept, M, K, eps, SLICE, SLOTS)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x, weight = _depth(x_at, k, K, 0, EVEN_K), _depth(weight_at, k, K, 1, EVEN_K)
        if norm_weight_ptr is not None:
            x = _normed(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, k, K, EVEN_K)
        acc = tl.dot(x.to(weight.dtype), weight, acc, input_precision="ieee")

    in_columns = columns < N
    acc += tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    if drop_ptr is not None:
        acc *= tl.load(drop_ptr + rows // frames, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        at = rows[:, None].to(tl.int64) * N + columns[None, :]
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None].to(tl.int64) * y_row + columns[None, :], y, mask=inside)
    if y_parts_ptr is not None:
        shape: tl.constexpr = (BLOCK_M, BLOCK_N // SLICE, SLICE)
        stored = tl.reshape(tl.where(in_columns[None, :], y.to(tl.float32), 0.0), shape)
        y_slot = tile_n * (BLOCK_N // SLICE) + tl.arange(0, BLOCK_N // SLICE)
        size = tl.maximum(tl.minimum(N - y_slot * SLICE, SLICE), 1)[None, :]
        y_mean = tl.sum(stored, 2) / size
        y_off = tl.where((tl.arange(0, SLICE)[None, :] < size.trans())[None], stored - y_mean[:, :, None], 0.0)
        y_slots = tl.cdiv(N, SLICE)
        y_part_at = y_parts_ptr + rows[:, None].to(tl.int64) * y_slots + y_slot[None, :]
        kept = in_rows[:, None] & (y_slot < y_slots)[None, :]
        tl.store(y_part_at, y_mean, mask=kept)
        tl.store(y_part_at + M * y_slots, tl.sum(y_off * y_off, 2), mask=kept)


@triton.jit(do_not_specialize=["M"])
def message_attention_kernel(
    x_ptr,  # (M, K), contiguous
    weight_ptr,  # (3 K, K), rows weight_row apart: those of q, of k, of v
    bias_ptr,  # (3 K,)
    norm_weight_ptr,  # (K,)
    norm_bias_ptr,  # (K,)
    x_parts_ptr,  # (2, M, K / SLICE) float32: mean and M2 of each slice of x's rows
    mean_ptr,  # (M,) float32 or None: not wanted
    rstd_ptr,  # (M,) float32, with mean
    qkv_ptr,  # (M, 3 K) or None: not wanted
    y_ptr,  # (M, K)
    M,
    K,
    weight_row,
    frames,
    eps,
    scale,  # log2(e) / sqrt(C)
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    SLICE: tl.constexpr,
    SLOTS: tl.constexpr,  # >= K / SLICE, a power of two
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,  # >= frames
    BLOCK_K: tl.constexpr,
):
    """One head of y: attention of LN(x) W^T + b over the frames of a video. A tile holds whole videos."""
    height = BLOCK_M // frames * frames  # rows of a tile
    tiles_m = tl.cdiv(M, height)
    head = tl.program_id(0) // tiles_m
    row = tl.arange(0, BLOCK_M)
    rows = (tl.program_id(0) % tiles_m) * height + row
    in_rows = (rows < M) & (row < height)
    channels = head * C + tl.arange(0, C)
    kept = rows < tl.where(head == 0, M, 0)
    mean, rstd = _statistics(x_parts_ptr, mean_ptr, rstd_ptr, rows, kept, M, K, eps, SLICE, SLOTS)

    q = tl.zeros((BLOCK_M, C), tl.float32)
    k = tl.zeros((BLOCK_M, C), tl.float32)
    v = tl.zeros((BLOCK_M, C), tl.float32)
    x_at = x_ptr + tl.minimum(rows, M - 1)[:, None].to(tl.int64) * K
    q_at = weight_ptr + channels[None, :] * weight_row
    k_at = q_at + K * weight_row
    v_at = k_at + K * weight_row
    for start in range(0, K, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        x = _depth(x_at, depth, K, 0, EVEN_K)
        q_weight, k_weight = _depth(q_at, depth, K, 1, EVEN_K), _depth(k_at, depth, K, 1, EVEN_K)
        v_weight = _depth(v_at, depth, K, 1, EVEN_K)
        x = _normed(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, depth, K, EVEN_K).to(q_weight.dtype)
        q = tl.dot(x, q_weight, q, input_precision="ieee")
        k = tl.dot(x, k_weight, k, input_precision="ieee")
        v = tl.dot(x, v_weight, v, input_precision="ieee")

    dtype = y_ptr.dtype.element_ty
    q = (q + tl.load(bias_ptr + channels).to(tl.float32)[None, :]).to(dtype)
    k = (k + tl.load(bias_ptr + K + channels).to(tl.float32)[None, :]).to(dtype)
    v = (v + tl.load(bias_ptr + 2 * K + channels).to(tl.float32)[None, :]).to(dtype)
    at = rows[:, None].to(tl.int64) * K + channels[None, :]
    if qkv_ptr is not None:
        qkv_at = at + 2 * rows[:, None].to(tl.int64) * K
        tl.store(qkv_ptr + qkv_at, q, mask=in_rows[:, None])
        tl.store(qkv_ptr + qkv_at + K, k, mask=in_rows[:, None])
        tl.store(qkv_ptr + qkv_at + 2 * K, v, mask=in_rows[:, None])
    video = row // frames
    y = attend_tile(q, k, v, video[:, None] == video[None, :], scale)
    tl.store(y_ptr + at, y.to(dtype), mask=in_rows[:, None])


@prepared
def _prepare(
    device: torch.device,
    size: int,
    rows: int,
    columns: int,
    depth: int,
    x_row: int,
    weight_row: int,
    y_row: int,
    frames: int,
    eps: float,
) -> Prepared:
    """For a weight (columns, depth) of ``size`` bytes a number."""
    options = tile("message_kv", device, rows=rows, columns=columns, bytes=size)
    return Prepared(
        device,
        message_rows_kernel,
        (cdiv(rows, options["BLOCK_M"]) * cdiv(columns, options["BLOCK_N"]),),
        (rows, columns, depth, x_row, weight_row, y_row, frames, eps),
        EVEN_K=depth % options["BLOCK_K"] == 0,
        SLICE=SLICE,
        SLOTS=next_power_of_2(cdiv(depth, SLICE)),
        **options,
    )


def _rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    x_parts: Tensor | None = None,
    statistics: Tensor | None = None,
    residual: Tensor | None = None,
    drop_scale: Tensor | None = None,
    frames: int = 1,
    y_parts: Tensor | None = None,
    to: Tensor | None = None,
) -> Tensor:
    """residual + s (LN(x) W^T + b) in the weight's dtype, written ``to`` rows of any stride if given; LN's (mean, rstd)
    go into ``statistics`` (2, M). LN takes x's ``x_parts``; those of the result go into ``y_parts``."""
    rows, (columns, depth) = x.shape[0], weight.shape
    y = torch.empty(rows, columns, dtype=weight.dtype, device=x.device) if to is None else to
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    mean, rstd = (None, None) if statistics is None else statistics
    strides = x.stride(0), weight.stride(0), y.stride(0)
    launch = _prepare(x.device, weight.dtype.itemsize, rows, columns, depth, *strides, frames, eps)
    launch(x, weight, bias, norm_weight, norm_bias, x_parts, mean, rstd, residual, drop_scale, y, y_parts)
    return y


@prepared
def _prepare_attention(
    device: torch.device, size: int, rows: int, width: int, weight_row: int, frames: int, heads: int, eps: float
) -> Prepared:
    options = tile("message_attention", device, rows=rows, bytes=size)
    block, channels = max(options["BLOCK_M"], power_of_two(frames)), width // heads
    return Prepared(
        device,
        message_attention_kernel,
        (cdiv(rows, block // frames * frames) * heads,),
        (rows, width, weight_row, frames, eps, channels**-0.5 * LOG2_E),
        EVEN_K=width % options["BLOCK_K"] == 0,
        SLICE=SLICE,
        SLOTS=next_power_of_2(cdiv(width, SLICE)),
        C=channels,
        **{**options, "BLOCK_M": block},
    )


def _attention(
    save: bool, b: Any, message: Tensor, parts: Tensor, statistics: Tensor | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """Attention of qkv = LN_m(m) W + b over the frames of each video (F, D); if ``save``, qkv (F, 3D) and its
    log-sum-exp, unless a sequence fits in one tile."""
    (count, width), frames, channels = message.shape, b.frames, message.shape[1] // b.heads
    layer, norm = (b.message_in_weight, b.message_in_bias), (b.message_ln_weight, b.message_ln_bias)
    apart = count <= APART and arch(message.device) >= 90
    if takes(channels) and frames <= ONE_TILE[message.element_size()] and not apart:
        mixed, qkv = torch.empty_like(message), message.new_empty(count, 3 * width) if save else None
        mean, rstd = (None, None) if statistics is None else statistics
        sizes = message.element_size(), count, width, layer[0].stride(0), frames, b.heads, b.eps
        launch = _prepare_attention(message.device, *sizes)
        launch(message, *layer, *norm, parts, mean, rstd, qkv, mixed)
        return mixed, qkv, ()
    qkv = _rows(message, *layer, norm=(*norm, b.eps), x_parts=parts, statistics=statistics)
    heads = qkv.view(-1, frames, 3, b.heads, channels)
    out, lse = attention.forward(save, heads) if takes(channels) else (attention_reference(heads), ())
    return out.reshape(message.shape), qkv, lse


def forward(save: bool, b: Any) -> tuple[Spare, Callable[[Tensor], None], tuple[Tensor, ...]]:
    (count, _, width), frames = b.x.shape, b.frames
    videos = count // frames
    if count != videos * frames or (b.drop_fusion is not None and b.drop_fusion.shape != (videos,)):
        given = "" if b.drop_fusion is None else f" and drop path factors {tuple(b.drop_fusion.shape)}"
        raise ValueError(
            f"{count} frames, {frames} a video{given} do not fit: there must be a multiple of {frames} of the first, "
            "and a factor for each video"
        )
    statistics = b.x.new_empty(4, count, dtype=torch.float32) if save else None
    first, second = (None, None) if statistics is None else (statistics[:2], statistics[2:])
    message_parts, fused_parts = b.x.new_empty(2, 2, count, cdiv(width, SLICE), dtype=torch.float32)
    # m = x_class Wm + bm; qkv = LN_m(m) W + b; m + s (attention Wo + bo)
    message = _rows(b.x[:, 0], b.message_fc_weight, b.message_fc_bias, y_parts=message_parts)
    mixed, qkv, lse = _attention(save, b, message, message_parts, first)
    fused = _rows(
        mixed,
        b.message_out_weight,
        b.message_out_bias,
        residual=message,
        drop_scale=b.drop_fusion,
        frames=frames,
        y_parts=fused_parts,
    )

    def write(key_value: Tensor) -> None:
        # LN_1(.) [Wk, Wv] + b
        norm = (b.ln_1_weight, b.ln_1_bias, b.eps)
        layer = (b.in_weight[width:], b.in_bias[width:])
        _rows(fused, *layer, norm=norm, x_parts=fused_parts, statistics=second, to=key_value)

    spare = Spare(fused, *((None, None) if second is None else second))
    if statistics is None or qkv is None:
        return spare, write, ()
    return spare, write, (message, qkv, fused, statistics, mixed, *(lse or (statistics.new_empty(0),)))
