"""patch_embed: frames to normalized, positioned tokens: a GEMM that gathers its rows from the pixels, then LN_pre.

F frames, N patches of P x P pixels, L = N + 1 tokens, D width, K = 3 P^2 pixels of a patch.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..derived import kept
from ..linear import linear
from ..patch_embed import by_patch, constants, for_levels
from .gemm import rows_of
from .launching import cdiv, dependency_wait, launch, tile
from .layer_norm import normalize, normalize_backward


@triton.jit(do_not_specialize=["rows"])
def patch_embed_fwd_kernel(
    frames_ptr,  # uint8 (F, H, W, 3) if LEVELS, else float (F, 3, H, W)
    kernel_ptr,  # (D, K or more): W, or W / (255 std) with its columns in the order of the pixels
    bias_ptr,  # (D,) float32, only if LEVELS
    position_ptr,  # (L, D)
    tokens_ptr,  # (F, length, D): rows 1 to N of each frame are written
    rows,  # F N
    width,
    patches,
    across,  # patches of one row of the frame
    length,
    frame_stride,
    channel_stride,
    y_stride,
    x_stride,
    kernel_stride,
    LEVELS: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """tokens[f, 1 + n] = W patch[f, n] + b + position[1 + n]"""
    DEPTH: tl.constexpr = 3 * PATCH * PATCH
    even: tl.constexpr = DEPTH % BLOCK_K == 0
    blocks = tl.cdiv(width, BLOCK_N)
    m = (tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    # rows and columns past the end repeat the last one: their results are never stored
    inside = (m[:, None] < rows) & (d[None, :] < width)
    m = tl.minimum(m, rows - 1)
    frame, patch = (m // patches).to(tl.int64), m % patches
    weight_row = tl.minimum(d, width - 1) * kernel_stride
    corner = frame * frame_stride + (patch // across) * PATCH * y_stride + (patch % across) * PATCH * x_stride

    dependency_wait()
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if LEVELS:  # a row of a patch is 3 P neighboring bytes
            offset = k // (3 * PATCH) * y_stride + k % (3 * PATCH)
        else:
            pixel = k % (PATCH * PATCH)
            offset = k // (PATCH * PATCH) * channel_stride + pixel // PATCH * y_stride + pixel % PATCH * x_stride
        a_at = frames_ptr + corner[:, None] + offset[None, :]
        b_at = kernel_ptr + weight_row[None, :] + k[:, None]
        a = tl.load(a_at, mask=None if even else k[None, :] < DEPTH, other=None if even else 0)
        b = tl.load(b_at, mask=None if even else k[:, None] < DEPTH, other=None if even else 0.0)
        if LEVELS:  # -128..127: exact in every weight's dtype; behind K it meets zeros of b
            a = a.to(tl.float32) - 128
        total = tl.dot(a.to(b.dtype), b, total, input_precision="ieee")

    if LEVELS:
        total += tl.load(bias_ptr + d, mask=d < width, other=0.0)[None, :]
    total += tl.load(position_ptr + (1 + patch)[:, None] * width + d[None, :], mask=inside, other=0.0).to(tl.float32)
    at = (frame * length + 1 + patch)[:, None] * width + d[None, :]
    tl.store(tokens_ptr + at, total.to(tokens_ptr.dtype.element_ty), mask=inside)


def forward(save: bool, *args: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of the arguments of ``patch_embed_reference``."""
    frames, weight, class_embedding, position, ln_weight, ln_bias, mean, std, eps, spare = args
    count, down, across = _grid(frames, weight, position)
    width, patch, length = position.shape[1], weight.shape[-1], position.shape[0] + spare
    weight, position = weight.contiguous(), position.contiguous()
    levels = frames.dtype == torch.uint8
    depth = 3 * patch * patch
    padded = cdiv(depth, 16) * 16  # the kernel's rows in whole 16-byte vectors
    if levels:
        if frames.stride()[2:] != (3, 1):
            frames = frames.contiguous()
        frame_stride, y_stride, x_stride, channel_stride = frames.stride()
        made = functools.partial(for_levels, mean=mean, std=std)
        kernel, bias = kept(f"levels {mean} {std}", made, weight)
    else:
        frame_stride, channel_stride, y_stride, x_stride = frames.stride()
        kernel, bias = weight.view(width, depth), None
    if padded != depth:
        kernel = torch.nn.functional.pad(kernel, (0, padded - depth))

    rows = count * down * across
    tokens = weight.new_empty(count, length, width, dtype=torch.promote_types(weight.dtype, position.dtype))
    options = tile("patch_embed", frames.device, bytes=weight.element_size(), rows=rows)
    grid = (cdiv(rows, options["BLOCK_M"]) * cdiv(width, options["BLOCK_N"]),)
    numbers = (
        rows,
        width,
        down * across,
        across,
        length,
        frame_stride,
        channel_stride,
        y_stride,
        x_stride,
        kernel.stride(0),
    )
    tensors = (frames, kernel, bias, position, tokens)
    launch(patch_embed_fwd_kernel, grid, *tensors, *numbers, LEVELS=levels, PATCH=patch, **options)
    tokens[:, 0] = class_embedding + position[0]
    tokens[:, len(position) :] = 0
    _, out, *statistics = normalize(
        tokens.view(-1, width), ln_weight.contiguous(), ln_bias.contiguous(), eps, tokens.dtype, save
    )
    assert out is not None
    saved = (tokens, *(each.view(count, length) for each in statistics if each is not None)) if save else ()
    return (out.view(tokens.shape),), saved


def _grid(frames: Tensor, weight: Tensor, position: Tensor) -> tuple[int, int, int]:
    """Frames, patches downwards, patches across; ``ValueError`` where the sizes do not fit."""
    patch = weight.shape[-1]
    count, height, length = frames.shape[:3] if frames.dtype == torch.uint8 else (len(frames), *frames.shape[2:])
    if height % patch or length % patch or position.shape[0] != height // patch * (length // patch) + 1:
        raise ValueError(
            f"frames of {height} x {length} pixels and positions {tuple(position.shape)} do not fit: patches of "
            f"{patch} want sides that are multiples of {patch}, and a position for each patch and the class token"
        )
    return count, height // patch, length // patch


def backward(grads: Sequence[Any], saved: Sequence[Tensor], needs: Sequence[bool], *args: Any) -> list[Tensor]:
    frames, weight, class_embedding, position, ln_weight, ln_bias, mean, std, *_ = args
    tokens, row_mean, row_rstd = saved
    count, down, across = _grid(frames, weight, position)
    width, _, patch, _ = weight.shape
    levels = frames.dtype == torch.uint8
    dtokens, dln_weight, dln_bias, *_ = normalize_backward(
        rows_of(grads[0]), tokens.view(-1, width), row_mean.view(-1), row_rstd.view(-1), ln_weight.contiguous()
    )
    dtokens = dtokens.view(tokens.shape)
    length = len(position)  # a spare row has no gradient
    dposition = dtokens[:, :length].sum(0, dtype=torch.float32)
    dframes = dweight = None
    if needs[1]:
        # patches with rows of zeros for class and spare, so that dtokens is read as it lies: dW = dtokens^T patches
        patches = weight.new_zeros(*tokens.shape[:2], 3 * patch * patch)
        grid = by_patch(frames, patch)
        patches[:, 1:length].unflatten(1, grid.shape[1:3]).view(grid.shape).copy_(grid).sub_(128 if levels else 0)
        dkernel = linear(dtokens.to(weight.dtype).view(-1, width).T, patches.view(-1, patches.shape[2]).T)
        if levels:
            # W' = W / (255 std), channel last, and b' = sum W (128 / 255 - mean) / std
            deviation = constants(std, weight, torch.float32)
            offset = (128 / 255 - constants(mean, weight, torch.float32)) / deviation
            dkernel = dkernel.view(width, patch, patch, 3) / (255 * deviation)
            dkernel += offset * dposition[1:].sum(0)[:, None, None, None]
            dkernel = dkernel.permute(0, 3, 1, 2)
        dweight = dkernel.reshape(weight.shape).to(weight.dtype, memory_format=torch.contiguous_format)
    if needs[0]:
        dpatches = linear(dtokens[:, 1:length].to(weight.dtype), weight.view(width, -1).T)
        grid = dpatches.view(count, down, across, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
        dframes = grid.reshape(frames.shape).to(frames.dtype)
    gradients = [
        dframes,
        dweight,
        dposition[0].to(class_embedding.dtype),
        dposition.to(position.dtype),
        dln_weight.to(ln_weight.dtype),
        dln_bias.to(ln_bias.dtype),
    ]
    return [grad for grad, need in zip(gradients, needs, strict=False) if need and grad is not None]
