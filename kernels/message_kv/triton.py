"""The message path in three launches: message token; LN_m, QKV and attention over T; output and residual. LN_1, key
and value are a fourth where the projection of the frames' tokens does not make them.

B videos, T frames, F = B T rows, D width, H heads of C channels. F is small, so a product takes as long as its loads:
they run several steps ahead. A LayerNorm takes its statistics from the product that wrote its rows: otherwise each
program would wait for whole rows before its first step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
def _rows(
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
    """``message_rows_kernel`` for a weight (columns, depth) of ``size`` bytes a number."""
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


def _attention(
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


class _Launches(NamedTuple):
    """What the path launches."""

    token: Prepared  # m = x_class Wm + bm
    qkv: Prepared | None  # LN_m(m) W + b, where its attention is another launch
    mixed: Prepared | None  # the attention; None: by the attention's own functions
    output: Prepared  # m + s (attention Wo + bo)


@prepared
def _prepare(
    device: torch.device,
    size: int,
    count: int,
    width: int,
    x_row: int,
    weight_rows: tuple[int, int, int],
    frames: int,
    heads: int,
    eps: float,
) -> _Launches:
    """For F = ``count`` frames and weights of ``size`` bytes a number with these row strides, in the order of use."""
    token_row, qkv_row, output_row = weight_rows
    square = device, size, count, width, width
    token = _rows(*square, x_row, token_row, width, 1, 0.0)
    output = _rows(*square, width, output_row, width, frames, 0.0)
    apart = count <= APART and arch(device) >= 90
    one_tile = takes(width // heads) and frames <= ONE_TILE[size]
    if one_tile and not apart:
        return _Launches(token, None, _attention(device, size, count, width, qkv_row, frames, heads, eps), output)
    qkv = _rows(device, size, count, 3 * width, width, width, qkv_row, 3 * width, 1, eps)
    strides = 3 * width * frames, 3 * width, width, width // heads
    shape = size, count // frames, frames, heads, width // heads, False
    return _Launches(token, qkv, attention.prepare(device, *shape, *strides) if one_tile else None, output)


_NO_NORM = (None,) * 5  # LayerNorm's weight and bias, the parts of x, mean and rstd


def forward(save: bool, b: Any) -> tuple[Spare, Callable[[Tensor], None], tuple[Tensor, ...]]:
    (count, _, width), frames, device, dtype = b.x.shape, b.frames, b.x.device, b.in_weight.dtype
    if count % frames or (b.drop_fusion is not None and b.drop_fusion.shape != (count // frames,)):
        given = "" if b.drop_fusion is None else f" and drop path factors {tuple(b.drop_fusion.shape)}"
        raise ValueError(
            f"{count} frames, {frames} a video{given} do not fit: there must be a multiple of {frames} of the first, "
            "and a factor for each video"
        )
    weights = b.message_fc_weight, b.message_in_weight, b.message_out_weight
    strides = tuple([weight.stride()[0] for weight in weights])
    launches = _prepare(device, dtype.itemsize, count, width, b.x.stride()[0], strides, frames, b.heads, b.eps)
    statistics = torch.empty(4, count, dtype=torch.float32, device=device) if save else None
    first, second = ((None, None), (None, None)) if statistics is None else (statistics[:2], statistics[2:])
    # mean and M2 of the slices: of the message token's rows, then of the messages'
    parts = weights[0].new_empty(2, count, cdiv(width, SLICE), dtype=torch.float32)
    # m = x_class Wm + bm
    token = weights[0].new_empty(count, width)
    launches.token(b.x, weights[0], b.message_fc_bias, *_NO_NORM, None, None, token, parts)  # a frame's first row
    # attention of qkv = LN_m(m) W + b over the frames of each video
    qkv_given = (token, weights[1], b.message_in_bias, b.message_ln_weight, b.message_ln_bias, parts, *first)
    qkv = None if launches.qkv is None and not save else b.in_weight.new_empty(count, 3 * width)
    lse: tuple[Tensor, ...] = ()
    if launches.qkv is not None:
        launches.qkv(*qkv_given, None, None, qkv, None)
    if launches.mixed is not None:
        mixed = torch.empty_like(token)
        launches.mixed(*((*qkv_given, qkv, mixed) if launches.qkv is None else (qkv, mixed, None)))
    else:
        assert qkv is not None
        heads = qkv.view(-1, frames, 3, b.heads, width // b.heads)
        out, lse = attention.forward(save, heads) if takes(heads.shape[-1]) else (attention_reference(heads), ())
        mixed = out.reshape_as(token)
    # m + s (attention Wo + bo)
    message = torch.empty_like(token)
    launches.output(mixed, weights[2], b.message_out_bias, *_NO_NORM, token, b.drop_fusion, message, parts)

    def write(key_value: Tensor) -> None:
        # LN_1(.) [Wk, Wv] + b
        weight, norm = b.in_weight[width:], (b.ln_1_weight, b.ln_1_bias, parts, *second)
        strides = width, weight.stride()[0], key_value.stride()[0]
        launch = _rows(device, dtype.itemsize, count, 2 * width, width, *strides, 1, b.eps)
        launch(message, weight, b.in_bias[width:], *norm, None, None, key_value, None)

    spare = Spare(message, *second)
    if statistics is None or qkv is None:
        return spare, write, ()
    return spare, write, (token, qkv, message, statistics, mixed, *(lse or (statistics.new_empty(0),)))
