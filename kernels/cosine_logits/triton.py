"""cosine_logits: exp(scale) cos(v, c) for each video's own prompted labels, reading each row of text once.

B videos, K labels, E embedding size. Both kernels are memory bound in ``text``; sums are float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.launching import cdiv, launch, tile


@triton.jit(do_not_specialize=["labels"])
def cosine_logits_fwd_kernel(
    video_ptr,  # (B, E)
    text_ptr,  # (B, K, E)
    scale_ptr,  # ()
    logits_ptr,  # (B, K) float32
    dots_ptr,  # (B, K) float32, only if SAVE
    video_norm_ptr,  # (B,) float32, only if SAVE
    text_norm_ptr,  # (B, K) float32, only if SAVE
    labels,
    size,
    video_stride_b,
    video_stride_e,
    text_stride_b,
    text_stride_k,
    text_stride_e,
    SAVE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    blocks = tl.cdiv(labels, BLOCK_K)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    k = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    video_row = video_ptr + b * video_stride_b
    text_rows = text_ptr + b * text_stride_b + k[:, None] * text_stride_k

    dots = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    text_squares = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    video_squares = tl.zeros((BLOCK_E,), tl.float32)
    for start in range(0, size, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        v = tl.load(video_row + e * video_stride_e, mask=e < size, other=0.0).to(tl.float32)
        inside = (k[:, None] < labels) & (e[None, :] < size)
        c = tl.load(text_rows + e[None, :] * text_stride_e, mask=inside, other=0.0).to(tl.float32)
        dots += v[None, :] * c
        text_squares += c * c
        video_squares += v * v
    dot = tl.sum(dots, 1)
    text_norm = tl.sqrt_rn(tl.sum(text_squares, 1))
    video_norm = tl.sqrt_rn(tl.sum(video_squares, 0))

    # exp(scale) <v, c> / (|v| |c|): a zero vector gives NaN, as in the reference
    scale = tl.exp(tl.load(scale_ptr).to(tl.float32))
    at = b * labels + k
    norms = tl.where(k < labels, video_norm * text_norm, 1.0)
    tl.store(logits_ptr + at, dot * (scale / norms), mask=k < labels)
    if SAVE:
        tl.store(dots_ptr + at, dot, mask=k < labels)
        tl.store(text_norm_ptr + at, text_norm, mask=k < labels)
        if tl.program_id(0) % blocks == 0:
            tl.store(video_norm_ptr + b, video_norm)


@triton.jit(do_not_specialize=["labels"])
def cosine_logits_bwd_kernel(
    video_ptr,  # (B, E)
    text_ptr,  # (B, K, E)
    scale_ptr,  # ()
    dlogits_ptr,  # (B, K)
    dots_ptr,  # (B, K) float32
    video_norm_ptr,  # (B,) float32
    text_norm_ptr,  # (B, K) float32
    dvideo_ptr,  # (B, E)
    dtext_ptr,  # (B, K, E), only if TEXT
    dscale_ptr,  # (B,) float32: each video's share
    labels,
    size,
    video_stride_b,
    video_stride_e,
    text_stride_b,
    text_stride_k,
    text_stride_e,
    TEXT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program owns a block of channels of one video and walks over its labels: a fixed order of sums."""
    blocks = tl.cdiv(size, BLOCK_E)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks) * BLOCK_E + tl.arange(0, BLOCK_E)
    v = tl.load(video_ptr + b * video_stride_b + e * video_stride_e, mask=e < size, other=0.0).to(tl.float32)
    video_norm = tl.load(video_norm_ptr + b)
    scale = tl.exp(tl.load(scale_ptr).to(tl.float32))

    dvideo = tl.zeros((BLOCK_K, BLOCK_E), tl.float32)
    shares = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, labels, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        inside = (k[:, None] < labels) & (e[None, :] < size)
        c = tl.load(
            text_ptr + b * text_stride_b + k[:, None] * text_stride_k + e[None, :] * text_stride_e,
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        at = b * labels + k
        text_norm = tl.load(text_norm_ptr + at, mask=k < labels, other=1.0)
        # w = dl exp(scale) / (|v| |c|), and w <v, c> = dl l
        w = tl.load(dlogits_ptr + at, mask=k < labels, other=0.0).to(tl.float32)
        w = w * (scale / (video_norm * text_norm))
        share = w * tl.load(dots_ptr + at, mask=k < labels, other=0.0)
        dvideo += w[:, None] * c
        shares += share
        if TEXT:
            # dc = w v - (w <v, c> / |c|^2) c
            dc = w[:, None] * v[None, :] - (share / (text_norm * text_norm))[:, None] * c
            tl.store(dtext_ptr + at[:, None] * size + e[None, :], dc.to(dtext_ptr.dtype.element_ty), mask=inside)
    # dv = sum_k w c - (sum_k w <v, c> / |v|^2) v, and dscale = sum dl l
    total = tl.sum(shares, 0)
    dv = tl.sum(dvideo, 0) - (total / (video_norm * video_norm)) * v
    tl.store(dvideo_ptr + b * size + e, dv.to(dvideo_ptr.dtype.element_ty), mask=e < size)
    if tl.program_id(0) % blocks == 0:
        tl.store(dscale_ptr + b, total)


def forward(save: bool, video: Tensor, text: Tensor, scale: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    batch, labels, size = text.shape
    if video.shape != (batch, size):
        raise ValueError(f"video is {tuple(video.shape)}, but text {tuple(text.shape)} wants {(batch, size)}")
    logits = video.new_empty(batch, labels, dtype=torch.float32)
    saved: tuple[Tensor, ...] = ()
    if save:
        saved = torch.empty_like(logits), logits.new_empty(batch), torch.empty_like(logits)
    options = tile("cosine_logits", video.device)
    grid, numbers = (batch * cdiv(labels, options["BLOCK_K"]),), (labels, size, *video.stride(), *text.stride())
    tensors = (video, text, scale, logits, *(saved or (None, None, None)))
    launch(cosine_logits_fwd_kernel, grid, *tensors, *numbers, SAVE=save, **options)
    return (logits,), saved


def backward(
    grads: Sequence[Any], saved: Sequence[Tensor], needs: Sequence[Any], video: Tensor, text: Tensor, scale: Tensor
) -> list[Tensor]:
    batch, labels, size = text.shape
    dvideo = torch.empty_like(video, memory_format=torch.contiguous_format)
    dtext = torch.empty_like(text, memory_format=torch.contiguous_format) if needs[1] else None
    shares = video.new_empty(batch, dtype=torch.float32)
    if not labels:
        dvideo.zero_()
        shares.zero_()
    else:
        options = tile("cosine_logits_backward", video.device)
        grid, numbers = (batch * cdiv(size, options["BLOCK_E"]),), (labels, size, *video.stride(), *text.stride())
        tensors = (video, text, scale, grads[0].contiguous(), *saved, dvideo, dtext, shares)
        launch(cosine_logits_bwd_kernel, grid, *tensors, *numbers, TEXT=needs[1] is not None, **options)
    gradients = [dvideo, dtext, shares.sum().to(scale.dtype).view(scale.shape) if needs[2] else None]
    return [grad for grad, need in zip(gradients, needs, strict=True) if need and grad is not None]
