"""The message path in three launches: message token; LN_m and QKV; attention over T, output and residual. LN_1, key and
value are a fourth where the projection of the frames' tokens does not make them; in training attention is one of its
own, that of the frames' tokens with videos as sequences.

B videos, T frames, F = B T rows, D width, H heads of C channels. F is small, so the GEMMs stream their weights: low
tiles, many of them along the weight's rows, each normalizing its own few rows, or attending over its own video.
Backward recomputes LN(.).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import attention_reference, reference_backward, takes
from . import attention
from .attention_tiles import LOG2_E, attend_tile, power_of_two
from .column_sums import scaled
from .launching import Prepared, cdiv, prepared, tile
from .layer_norm import Spare, normalize_backward


@triton.jit(do_not_specialize=["M"])
def message_rows_kernel(
    x_ptr,  # (M, K), rows x_row apart
    weight_ptr,  # (N, K), rows weight_row apart
    bias_ptr,  # (N,)
    norm_weight_ptr,  # (K,) or None: no LayerNorm of x
    norm_bias_ptr,  # (K,), with norm_weight
    mean_ptr,  # (M,) float32 or None: not wanted
    rstd_ptr,  # (M,) float32, with mean
    residual_ptr,  # (M, N) or None
    drop_ptr,  # (M / frames,) or None
    y_ptr,  # (M, N), rows y_row apart
    M,
    N,
    K,
    x_row,
    weight_row,
    y_row,
    frames,
    eps,
    scale,  # log2(e) / sqrt(C)
    ATTEND: tl.constexpr,  # x is (M, 3 K), and its attention over the frames of a video takes its place; BLOCK_K is C
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = residual + s (LN(x) W^T + b). Tiles that share a part of the weight follow each other."""
    SPAN: tl.constexpr = 4096 // BLOCK_M
    height = frames if ATTEND else BLOCK_M  # rows of a tile
    tiles_m = tl.cdiv(M, height)
    tile_n = tl.program_id(0) // tiles_m
    row = tl.arange(0, BLOCK_M)
    rows = (tl.program_id(0) % tiles_m) * height + row
    in_rows = (rows < M) & (row < height)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns past the end repeat the last one: their results are never stored
    x_at = x_ptr + tl.minimum(rows, M - 1)[:, None].to(tl.int64) * x_row
    weight_at = weight_ptr + tl.minimum(columns, N - 1)[None, :] * weight_row

    if norm_weight_ptr is not None:
        total = tl.zeros((BLOCK_M, SPAN), tl.float32)
        for start in range(0, K, SPAN):
            k = (start + tl.arange(0, SPAN))[None, :]
            total += tl.load(x_at + k, mask=k < K, other=0.0).to(tl.float32)
        mean = tl.sum(total, 1) / K
        squares = tl.zeros((BLOCK_M, SPAN), tl.float32)
        for start in range(0, K, SPAN):
            k = (start + tl.arange(0, SPAN))[None, :]
            off = tl.where(k < K, tl.load(x_at + k, mask=k < K, other=0.0).to(tl.float32) - mean[:, None], 0.0)
            squares += off * off
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 1) / K + eps)
        if mean_ptr is not None:  # noqa: SIM102 (known at compile time, the other at run time)
            if tile_n == 0:
                tl.store(mean_ptr + rows, mean, mask=rows < M)
                tl.store(rstd_ptr + rows, rstd, mask=rows < M)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if ATTEND:  # one head
            asked = in_rows[:, None]
            query = tl.load(x_at + k[None, :], mask=asked, other=0.0)
            key = tl.load(x_at + K + k[None, :], mask=asked, other=0.0)
            value = tl.load(x_at + 2 * K + k[None, :], mask=asked, other=0.0)
            x = attend_tile(query, key, value, in_rows[None, :], scale)
        else:
            x = tl.load(x_at + k[None, :], mask=None if EVEN_K else k[None, :] < K, other=None if EVEN_K else 0.0)
        in_k = None if EVEN_K else k[:, None] < K
        weight = tl.load(weight_at + k[:, None], mask=in_k, other=None if EVEN_K else 0.0)
        if norm_weight_ptr is not None:
            norm_weight = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            norm_bias = tl.load(norm_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * norm_weight + norm_bias
        acc = tl.dot(x.to(weight.dtype), weight, acc, input_precision="ieee")

    acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    inside = in_rows[:, None] & (columns < N)[None, :]
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    if drop_ptr is not None:
        acc *= tl.load(drop_ptr + rows // frames, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y_at = y_ptr + rows[:, None].to(tl.int64) * y_row + columns[None, :]
    tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=inside)


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
    heads: int,
    eps: float,
) -> Prepared:
    """For a weight (columns, depth) of ``size`` bytes a number."""
    options = tile("message_kv", device, rows=rows, bytes=size)
    tiles, channels = cdiv(rows, options["BLOCK_M"]), depth // max(heads, 1)
    if heads:
        options, tiles = {**options, "BLOCK_M": power_of_two(frames), "BLOCK_K": channels}, rows // frames
    return Prepared(
        device,
        message_rows_kernel,
        (tiles * cdiv(columns, options["BLOCK_N"]),),
        (rows, columns, depth, x_row, weight_row, y_row, frames, eps, channels**-0.5 * LOG2_E),
        ATTEND=heads > 0,
        EVEN_K=depth % options["BLOCK_K"] == 0,
        **options,
    )


def _rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    statistics: Tensor | None = None,
    residual: Tensor | None = None,
    drop_scale: Tensor | None = None,
    frames: int = 1,
    heads: int = 0,
    to: Tensor | None = None,
) -> Tensor:
    """residual + s (LN(x) W^T + b) in the weight's dtype, written ``to`` rows of any stride if given; LN's (mean, rstd)
    go into ``statistics`` (2, M). With ``heads``, x (M, 3K) is q, k and v, and their attention takes its place."""
    rows, (columns, depth) = x.shape[0], weight.shape
    y = torch.empty(rows, columns, dtype=weight.dtype, device=x.device) if to is None else to
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    strides = x.stride(0), weight.stride(0), y.stride(0)
    _prepare(x.device, weight.dtype.itemsize, rows, columns, depth, *strides, frames, heads, eps)(
        x,
        weight,
        bias,
        norm_weight,
        norm_bias,
        None if statistics is None else statistics[0],
        None if statistics is None else statistics[1],
        residual,
        drop_scale,
        y,
    )
    return y


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
    # m = x_class Wm + bm; qkv = LN_m(m) W + b; m + s (attention Wo + bo)
    message = _rows(b.x[:, 0], b.message_fc_weight, b.message_fc_bias)
    norm = (b.message_ln_weight, b.message_ln_bias, b.eps)
    qkv = _rows(message, b.message_in_weight, b.message_in_bias, norm=norm, statistics=first)
    heads = qkv.view(videos, frames, 3, b.heads, -1)
    out = (b.message_out_weight, b.message_out_bias)
    added: Any = {"residual": message, "drop_scale": b.drop_fusion, "frames": frames}
    mixed: Tensor = message
    lse: tuple[Tensor, ...] = ()
    if takes(heads.shape[-1]) and frames <= 64 and not save:
        fused = _rows(qkv, *out, **added, heads=b.heads)
    else:
        mixed, lse = attention.forward(save, heads) if takes(heads.shape[-1]) else (attention_reference(heads), ())
        mixed = mixed.reshape(message.shape)
        fused = _rows(mixed, *out, **added)

    def write(key_value: Tensor) -> None:
        # LN_1(.) [Wk, Wv] + b
        norm = (b.ln_1_weight, b.ln_1_bias, b.eps)
        _rows(fused, b.in_weight[width:], b.in_bias[width:], norm=norm, statistics=second, to=key_value)

    spare = Spare(fused, *((None, None) if second is None else second))
    if statistics is None:
        return spare, write, ()
    return spare, write, (message, qkv, fused, statistics, mixed, *(lse or (statistics.new_empty(0),)))


def backward(dfused: Tensor, saved: Sequence[Tensor], wanted: set[str], b: Any) -> tuple[dict[str, Tensor], Tensor]:
    message, qkv, _, (mean, rstd, *_), mixed, lse = saved
    dtype, width, frames = message.dtype, message.shape[1], b.frames
    given: dict[str, Tensor] = {}

    def parameters(name: str, dy: Tensor, x: Tensor) -> None:
        """The gradients of the weight and the bias of y = x W^T + b."""
        if f"{name}_weight" in wanted:
            given[f"{name}_weight"] = torch.mm(dy.T, x)
        if f"{name}_bias" in wanted:
            given[f"{name}_bias"] = scaled(dy, dy.dtype, sums_dtype=getattr(b, f"{name}_bias").dtype)[1]

    # m + s (attention Wo + bo)
    dbranch = dfused
    if b.drop_fusion is not None:
        dbranch = (dfused.view(-1, frames, width) * b.drop_fusion[:, None, None].to(dtype)).view_as(dfused)
    heads = qkv.view(-1, frames, 3, b.heads, width // b.heads)
    dmixed = torch.mm(dbranch, b.message_out_weight).view(heads[:, :, 0].shape)
    backward = attention.backward if takes(heads.shape[-1]) else reference_backward
    dqkv = backward(dmixed, heads, mixed.view(dmixed.shape), (lse,)).reshape(qkv.shape)
    parameters("message_out", dbranch, mixed)
    # qkv = LN_m(m) W + b, and the residual
    dmessage, given["message_ln_weight"], given["message_ln_bias"], normed, *_ = normalize_backward(
        torch.mm(dqkv, b.message_in_weight),
        message,
        mean,
        rstd,
        b.message_ln_weight,
        extra=dfused,
        bias=b.message_ln_bias,
        normed_dtype=dtype,
    )
    assert normed is not None
    parameters("message_in", dqkv, normed)
    # m = x_class Wm + bm
    parameters("message_fc", dmessage, b.x[:, 0].to(dtype))
    return given, torch.mm(dmessage, b.message_fc_weight)
