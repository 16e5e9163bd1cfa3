"""message_kv in five launches: message token; LN_m and QKV; attention over T; output and residual; LN_1, key and value.

B videos, T frames, F = B T rows, D width, H heads of C channels. F is small, so the GEMMs stream their weights: low
tiles, many of them along the weight's rows, each normalising its own few rows. Backward recomputes LN(.) and the
attention from m, qkv and the residual's result, all of F rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._linear import linear
from ._launch import cdiv, launch, next_power_of_2, tile
from .gemm import rows_of
from .layer_norm import normalise_backward


@triton.jit(do_not_specialize=["M"])
def _rows_kernel(
    x_ptr,  # (M, K), rows x_row apart
    weight_ptr,  # (N, K), rows weight_row apart
    bias_ptr,  # (N,)
    norm_weight_ptr,  # (K,) or None: no LayerNorm of x
    norm_bias_ptr,  # (K,), with norm_weight
    mean_ptr,  # (M,) float32 or None: not wanted
    rstd_ptr,  # (M,) float32, with mean
    residual_ptr,  # (M, N) or None
    drop_ptr,  # (M / frames,) or None
    y_ptr,  # (M, N)
    M,
    N,
    K,
    x_row,
    weight_row,
    frames,
    eps,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = residual + s (LN(x) W^T + b). Tiles that share a part of the weight follow each other."""
    SPAN: tl.constexpr = 4096 // BLOCK_M
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    rows = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
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
        if EVEN_K:
            x = tl.load(x_at + k[None, :])
            weight = tl.load(weight_at + k[:, None])
        else:
            x = tl.load(x_at + k[None, :], mask=k[None, :] < K, other=0.0)
            weight = tl.load(weight_at + k[:, None], mask=k[:, None] < K, other=0.0)
        if norm_weight_ptr is not None:
            norm_weight = tl.load(norm_weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            norm_bias = tl.load(norm_bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None] * norm_weight + norm_bias
        acc = tl.dot(x.to(weight.dtype), weight, acc, input_precision="ieee")

    acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    if drop_ptr is not None:
        acc *= tl.load(drop_ptr + rows // frames, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        acc += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _probabilities(query, key, t, frames, scale):
    """softmax(q k^T scale) over the frames t < T of a video, float32"""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where((t < frames)[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _attention_kernel(
    qkv_ptr,  # (F, 3, H, C)
    mixed_ptr,  # (F, H, C)
    frames,
    heads,
    size,  # C
    scale,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """softmax(q k^T / sqrt(C)) v of one head over the frames of one video"""
    head = tl.program_id(0) % heads
    t, c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    rows = (tl.program_id(0) // heads).to(tl.int64) * frames + t
    inside = (t < frames)[:, None] & (c < size)[None, :]
    width = heads * size
    at = qkv_ptr + (rows * 3 * width + head * size)[:, None] + c[None, :]
    query = tl.load(at, mask=inside, other=0.0)
    key = tl.load(at + width, mask=inside, other=0.0)
    value = tl.load(at + 2 * width, mask=inside, other=0.0)
    weights = _probabilities(query, key, t, frames, scale)
    mixed = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    mixed_at = mixed_ptr + (rows * width + head * size)[:, None] + c[None, :]
    tl.store(mixed_at, mixed.to(value.dtype), mask=inside)


@triton.jit
def _attention_backward_kernel(
    qkv_ptr,  # (F, 3, H, C)
    dmixed_ptr,  # (F, H, C)
    dqkv_ptr,  # (F, 3, H, C)
    mixed_ptr,  # (F, H, C): the forward's result, recomputed
    frames,
    heads,
    size,
    scale,
    BLOCK_Q: tl.constexpr,  # frames whose queries are worked on at a time
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    head = tl.program_id(0) % heads
    first = (tl.program_id(0) // heads).to(tl.int64) * frames
    t, c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    inside = (t < frames)[:, None] & (c < size)[None, :]
    width = heads * size
    packed_at = ((first + t) * 3 * width + head * size)[:, None] + c[None, :]
    key = tl.load(qkv_ptr + packed_at + width, mask=inside, other=0.0)
    value = tl.load(qkv_ptr + packed_at + 2 * width, mask=inside, other=0.0)
    dkey = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    dvalue = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, BLOCK_T, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        asked = (i < frames)[:, None] & (c < size)[None, :]
        query_at = ((first + i) * 3 * width + head * size)[:, None] + c[None, :]
        mixed_at = ((first + i) * width + head * size)[:, None] + c[None, :]
        query = tl.load(qkv_ptr + query_at, mask=asked, other=0.0)
        dmixed = tl.load(dmixed_ptr + mixed_at, mask=asked, other=0.0)
        weights = _probabilities(query, key, t, frames, scale)
        low = weights.to(value.dtype)
        mixed = tl.dot(low, value, input_precision="ieee")
        tl.store(mixed_ptr + mixed_at, mixed.to(value.dtype), mask=asked)
        # dv = P^T do; dS = P (do v^T - sum_j P do v^T); dq = dS k scale; dk = dS^T q scale. do is zero past T
        dvalue = tl.dot(tl.trans(low), dmixed, dvalue, input_precision="ieee")
        dweights = tl.dot(dmixed, tl.trans(value), input_precision="ieee")
        dscores = weights * (dweights - tl.sum(weights * dweights, 1)[:, None])
        dscores = dscores.to(value.dtype)
        dquery = tl.dot(dscores, key, input_precision="ieee") * scale
        tl.store(dqkv_ptr + query_at, dquery.to(value.dtype), mask=asked)
        dkey = tl.dot(tl.trans(dscores), query, dkey, input_precision="ieee")
    tl.store(dqkv_ptr + packed_at + width, (dkey * scale).to(value.dtype), mask=inside)
    tl.store(dqkv_ptr + packed_at + 2 * width, dvalue.to(value.dtype), mask=inside)


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
) -> Tensor:
    """residual + s (LN(x) W^T + b) in the weight's dtype; LN's (mean, rstd) go into ``statistics`` (2, M)."""
    (rows, depth), columns = x.shape, weight.shape[0]
    y = weight.new_empty(rows, columns)
    options = tile("message_kv", x.device, rows=rows, bytes=weight.element_size())
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    launch(
        _rows_kernel,
        (cdiv(rows, options["BLOCK_M"]) * cdiv(columns, options["BLOCK_N"]),),
        x,
        weight,
        bias.contiguous(),
        None if norm_weight is None else norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        None if statistics is None else statistics[0],
        None if statistics is None else statistics[1],
        residual,
        None if drop_scale is None else drop_scale.contiguous(),
        y,
        rows,
        columns,
        depth,
        x.stride(0),
        weight.stride(0),
        frames,
        eps,
        EVEN_K=depth % options["BLOCK_K"] == 0,
        **options,
    )
    return y


def _attend(name: str, kernel: Any, tensors: tuple[Tensor, ...], frames: int, heads: int) -> None:
    """Launch an attention kernel: one program a video and head."""
    rows, size = tensors[0].shape[0], tensors[0].shape[1] // (3 * heads)
    block_t = max(16, next_power_of_2(frames))
    launch(
        kernel,
        (rows // frames * heads,),
        *tensors,
        frames,
        heads,
        size,
        size**-0.5,
        BLOCK_T=block_t,
        BLOCK_C=max(16, next_power_of_2(size)),
        **tile(name, tensors[0].device, frames=frames, bytes=tensors[0].element_size()),
    )


def forward(
    save: bool,
    class_tokens: Tensor,
    frames: int,
    fc_weight: Tensor,
    fc_bias: Tensor,
    message_ln_weight: Tensor,
    message_ln_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    ln_1_weight: Tensor,
    ln_1_bias: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor,
    heads: int,
    eps: float,
    drop_scale: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows, width = class_tokens.shape
    videos = rows // frames
    if rows != videos * frames or (drop_scale is not None and drop_scale.shape != (videos,)):
        given = "" if drop_scale is None else f" and drop path factors {tuple(drop_scale.shape)}"
        raise ValueError(
            f"{rows} class tokens of {frames} frames a video{given} do not fit: there must be a multiple of {frames} "
            "of the first, and a factor for each video"
        )
    x = rows_of(class_tokens)
    fc_weight, qkv_weight, out_weight, kv_weight = map(rows_of, (fc_weight, qkv_weight, out_weight, kv_weight))
    statistics = x.new_empty(4, rows, dtype=torch.float32) if save else None
    first, second = (None, None) if statistics is None else (statistics[:2], statistics[2:])
    # m = x_class Wm + bm; qkv = LN_m(m) W + b; m + s (attention Wo + bo); LN_1(.) [Wk, Wv] + b
    message = _rows(x, fc_weight, fc_bias)
    qkv = _rows(message, qkv_weight, qkv_bias, norm=(message_ln_weight, message_ln_bias, eps), statistics=first)
    mixed = torch.empty_like(message)
    _attend("message_kv_attention", _attention_kernel, (qkv, mixed), frames, heads)
    fused = _rows(mixed, out_weight, out_bias, residual=message, drop_scale=drop_scale, frames=frames)
    kv = _rows(fused, kv_weight, kv_bias, norm=(ln_1_weight, ln_1_bias, eps), statistics=second)
    saved = () if statistics is None else (message, qkv, fused, statistics)
    return (kv.view(rows, 2, heads, width // heads),), saved


def backward(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    class_tokens: Tensor,
    frames: int,
    fc_weight: Tensor,
    fc_bias: Tensor,
    message_ln_weight: Tensor,
    message_ln_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    ln_1_weight: Tensor,
    ln_1_bias: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor,
    heads: int,
    eps: float,
    drop_scale: Tensor | None,
) -> list[Tensor]:
    message, qkv, fused, (mean, rstd, mean_1, rstd_1) = saved
    rows, dtype = message.shape[0], message.dtype
    tensors: tuple[Any, ...] = (
        class_tokens,
        frames,
        fc_weight,
        fc_bias,
        message_ln_weight,
        message_ln_bias,
        qkv_weight,
        qkv_bias,
    )
    tensors += (out_weight, out_bias, ln_1_weight, ln_1_bias, kv_weight, kv_bias, heads, eps, drop_scale)
    gradients: list[Tensor | None] = [None] * len(tensors)

    def parameters(at: int, dy: Tensor, x: Any) -> None:
        """The gradients of the weight and the bias, arguments ``at`` and ``at + 1``, of y = x W^T + b."""
        if needs[at]:
            gradients[at] = linear(dy.T, x.T)
        if needs[at + 1]:
            gradients[at + 1] = dy.sum(0, dtype=torch.float32)

    # [k_m, v_m] = LN_1(.) [Wk, Wv] + b
    dkv = grads[0].reshape(rows, kv_weight.shape[0]).to(dtype)
    dfused, gradients[10], gradients[11], normed = normalise_backward(
        linear(dkv, kv_weight.T),
        fused,
        mean_1,
        rstd_1,
        ln_1_weight.contiguous(),
        bias=ln_1_bias.contiguous(),
        normed_dtype=dtype,
    )
    parameters(12, dkv, normed)
    # m + s (attention Wo + bo)
    dbranch = dfused
    if drop_scale is not None:
        dbranch = (dfused.view(-1, frames, dfused.shape[1]) * drop_scale[:, None, None].to(dtype)).view_as(dfused)
    dqkv, mixed = torch.empty_like(qkv), torch.empty_like(message)
    dmixed = linear(dbranch, out_weight.T).contiguous()
    attention = (qkv, dmixed, dqkv, mixed)
    _attend("message_kv_attention_backward", _attention_backward_kernel, attention, frames, heads)
    parameters(8, dbranch, mixed)
    if needs[16] and drop_scale is not None:
        branch = linear(mixed, out_weight, out_bias.to(dtype))
        gradients[16] = (branch.float() * dfused.float()).sum(1).view(-1, frames).sum(1)
    # qkv = LN_m(m) W + b, and the residual
    dmessage, gradients[4], gradients[5], normed = normalise_backward(
        linear(dqkv, qkv_weight.T),
        message,
        mean,
        rstd,
        message_ln_weight.contiguous(),
        extra=dfused,
        bias=message_ln_bias.contiguous(),
        normed_dtype=dtype,
    )
    parameters(6, dqkv, normed)
    # m = x_class Wm + bm
    parameters(2, dmessage, class_tokens.to(dtype))
    if needs[0]:
        gradients[0] = linear(dmessage, fc_weight.T)
    return [
        gradient.to(given.dtype).contiguous()
        for gradient, need, given in zip(gradients, needs, tensors, strict=True)
        if need and gradient is not None and isinstance(given, Tensor)
    ]
