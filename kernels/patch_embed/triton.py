"""patch_embed: frames to normalized, positioned tokens: the patches as rows, their product by the library, and LN_pre,
which adds class embedding and positions.

F frames, N patches of P x P pixels, L = N + 1 tokens, D width, K = 3 P^2 pixels of a patch.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..common.derived import kept
from ..layer_norm.triton import Positions, normalize, normalize_backward
from ..linear import linear, product
from ..triton.launching import Prepared, cdiv, prepared, tile
from ..triton.rows import rows_of


@triton.jit
def patches_kernel(
    frames_ptr,  # uint8 (F, H, W, 3) if LEVELS, else float (F, 3, H, W)
    patches_ptr,  # (F, length, K): row 1 + n of a frame is its patch n, all else is zeros
    length,
    patches,
    across,  # patches of one row of the frame
    frame_stride,
    channel_stride,
    y_stride,
    x_stride,
    red_scale,  # of each channel, only if LEVELS: 1 / (255 std), then -mean / std
    green_scale,
    blue_scale,
    red_shift,
    green_shift,
    blue_shift,
    LEVELS: tl.constexpr,
    PATCH: tl.constexpr,
    K: tl.constexpr,  # 3 P^2, or more
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """patches[f, 1 + n] = patch n of frame f, normalized"""
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    block, blocks_of_frame = tl.program_id(0) // blocks, tl.cdiv(length, ROWS)
    frame = (block // blocks_of_frame).to(tl.int64)
    row = block % blocks_of_frame * ROWS + tl.arange(0, ROWS)
    patch = row - 1
    corner = (patch // across) * PATCH * y_stride + (patch % across) * PATCH * x_stride
    if LEVELS:  # a row of a patch is 3 P neighboring bytes
        offset = k // (3 * PATCH) * y_stride + k % (3 * PATCH)
    else:
        pixel = k % (PATCH * PATCH)
        offset = k // (PATCH * PATCH) * channel_stride + pixel // PATCH * y_stride + pixel % PATCH * x_stride
    held = ((patch >= 0) & (patch < patches))[:, None] & (k < 3 * PATCH * PATCH)[None, :]
    at = frames_ptr + frame * frame_stride + corner[:, None] + offset[None, :]
    pixels = tl.load(at, mask=held, other=0).to(tl.float32)
    if LEVELS:
        channel = k % 3
        scale = tl.where(channel == 0, red_scale, tl.where(channel == 1, green_scale, blue_scale))
        shift = tl.where(channel == 0, red_shift, tl.where(channel == 1, green_shift, blue_shift))
        pixels = tl.where(held, pixels * scale[None, :] + shift[None, :], 0.0)
    to = patches_ptr + frame * length * K + row[:, None] * K + k[None, :]
    tl.store(to, pixels.to(patches_ptr.dtype.element_ty), mask=(row < length)[:, None] & (k < K)[None, :])


@prepared
def _patches(
    device: torch.device, count: int, levels: bool, patch: int, columns: int, numbers: tuple[Any, ...]
) -> Prepared:
    config = tile("patch_embed", device)
    grid = (count * cdiv(numbers[0], config["ROWS"]) * cdiv(columns, config["BLOCK_K"]),)
    return Prepared(device, patches_kernel, grid, numbers, LEVELS=levels, PATCH=patch, K=columns, **config)


def patches_of(
    frames: Tensor, weight: Tensor, position: Tensor, mean: Sequence[float], std: Sequence[float], spare: bool
) -> Tensor:
    """The normalized patches in the weight's dtype, (F (L + spare), K), with K rounded up to whole 16 columns.

    Row 1 + n of a frame is its patch n: (P, P, 3) of uint8 frames, (3, P, P) of float ones. All else is zeros.
    """
    count, down, across = _grid(frames, weight, position)
    patch, levels, length = weight.shape[-1], frames.dtype == torch.uint8, position.shape[0] + spare
    if levels:
        if frames.stride()[2:] != (3, 1):
            frames = frames.contiguous()
        frame, y, x, channel = frames.stride()
        shifts = (-1.0 * each / deviation for each, deviation in zip(mean, std, strict=True))
        affine = (*(1 / (255.0 * deviation) for deviation in std), *shifts)
    else:
        frame, channel, y, x = frames.stride()
        affine = (0.0,) * 6
    patches = weight.new_empty(count * length, cdiv(3 * patch * patch, 16) * 16)
    numbers = (length, down * across, across, frame, channel, y, x, *affine)
    _patches(frames.device, count, levels, patch, patches.shape[1], numbers)(frames, patches)
    return patches


def _columns(weight: Tensor, levels: bool) -> Tensor:
    """The weight (D, K) of the columns of ``patches_of``."""
    columns = (weight.permute(0, 2, 3, 1) if levels else weight).flatten(1)
    # always copied: a kept view, as of a channels_last weight, would keep the weight alive
    return F.pad(columns, (0, -columns.shape[1] % 16))


def forward(save: bool, *args: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of the arguments of ``patch_embed_reference``."""
    frames, weight, class_embedding, position, ln_weight, ln_bias, mean, std, eps, spare = args
    levels = frames.dtype == torch.uint8
    columns = kept(f"columns {levels}", functools.partial(_columns, levels=levels), weight)
    product = linear(patches_of(frames, weight, position, mean, std, spare), columns)
    shape = (frames.shape[0], position.shape[0] + spare, weight.shape[0])  # len() of a tensor takes longer
    positions = Positions(position.contiguous(), class_embedding.contiguous(), shape[1])
    dtype = torch.promote_types(weight.dtype, position.dtype)
    tokens, out, *statistics = normalize(
        product, ln_weight.contiguous(), ln_bias.contiguous(), eps, dtype, save, positions=positions
    )
    assert out is not None
    saved = (tokens.view(shape), *(each.view(shape[:2]) for each in statistics if each is not None)) if save else ()
    return (out.view(shape),), saved


def _grid(frames: Tensor, weight: Tensor, position: Tensor) -> tuple[int, int, int]:
    """Frames, patches downwards, patches across; ``ValueError`` where the sizes do not fit."""
    patch = weight.shape[-1]
    count, height, length = frames.shape[:3] if frames.dtype == torch.uint8 else (frames.shape[0], *frames.shape[2:])
    if height % patch or length % patch or position.shape[0] != height // patch * (length // patch) + 1:
        raise ValueError(
            f"frames of {height} x {length} pixels and positions {tuple(position.shape)} do not fit: patches of "
            f"{patch} want sides that are multiples of {patch}, and a position for each patch and the class token"
        )
    return count, height // patch, length // patch


def backward(grads: Sequence[Any], saved: Sequence[Tensor], needs: Sequence[Any], *args: Any) -> list[Tensor]:
    frames, weight, class_embedding, position, ln_weight, ln_bias, mean, std, _, spare = args
    tokens, row_mean, row_rstd = saved
    count, down, across = _grid(frames, weight, position)
    width, _, patch, _ = weight.shape
    rows = tokens.view(-1, width), row_mean.view(-1), row_rstd.view(-1), ln_weight.contiguous()
    dtokens, dln_weight, dln_bias, _, dproduct, _ = normalize_backward(rows_of(grads[0]), *rows, low_dtype=weight.dtype)
    assert dproduct is not None
    dtokens = dtokens.view(tokens.shape)
    length = position.shape[0]  # a spare row has no gradient
    dposition = dtokens[:, :length].sum(0, dtype=torch.float32)
    dframes = dweight = None
    if needs[1]:
        patches = patches_of(frames, weight, position, mean, std, spare)
        dcolumns = product(dproduct.T, patches, needs[1])[:, : 3 * patch * patch]
        if frames.dtype == torch.uint8:
            dcolumns = dcolumns.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
        dweight = dcolumns.reshape(weight.shape).contiguous()
    if needs[0]:
        dpatches = linear(dproduct.view(tokens.shape), weight.flatten(1).T)[:, 1:length]
        grid = dpatches.reshape(count, down, across, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
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
