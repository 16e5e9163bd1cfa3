"""Frames to tokens: normalize, embed patches, add class token and positions, LN_pre (equation 4).

F frames (B * T), N = h w patches of P x P pixels, L = N + 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cpu
from ..common.example import Maker, Sizes
from ..dispatch import Op
from ..dispatch.support import on_triton
from ..layer_norm import layer_norm_reference, refuse_rows
from ..linear import linear


def constants(values: Sequence[float], like: Tensor, dtype: torch.dtype) -> Tensor:
    """A small vector on ``like``'s device, made there: a copy from the CPU would wait for the GPU, and is refused while
    a CUDA graph is captured."""
    return torch.stack([like.new_full((), value, dtype=dtype) for value in values])


def for_levels(weight: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The weight of 8-bit levels less 128, (D, 3 P P) with the channel last as in the pixels, and the bias (D,) in at
    least float32: W ((u / 255 - mean) / std) = W' (u - 128) + b'. Levels about their middle are exact in bfloat16."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    deviation = constants(std, weight, precise)[:, None, None]
    offset = (128 / 255 - constants(mean, weight, precise)[:, None, None]) / deviation
    bias = (weight.to(precise) * offset).sum((1, 2, 3))
    folded = (weight.to(precise) / (255 * deviation)).to(weight.dtype)
    return folded.permute(0, 2, 3, 1).reshape(len(weight), -1), bias


def by_patch(frames: Tensor, patch: int) -> Tensor:
    """A view of pixels, uint8 (F, H, W, 3) as (F, h, w, P, P, 3), or float (F, 3, H, W) as (F, h, w, 3, P, P)."""
    if frames.dtype == torch.uint8:
        return frames.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).transpose(2, 3)
    return frames.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)


def patch_embed_reference(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    position: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    eps: float,
    spare: bool,
) -> Tensor:
    (width, _, patch, _), count = weight.shape, frames.shape[0]
    grid, kernel, bias = by_patch(frames, patch).to(weight.dtype), weight.reshape(width, -1), None
    if frames.dtype == torch.uint8:
        kernel, bias = for_levels(weight, mean, std)
        grid, bias = grid - 128, bias.to(weight.dtype)
    patches_FND = linear(grid.reshape(count, position.shape[0] - 1, kernel.shape[1]), kernel, bias)
    # z0 = [x_class, E x_1, ..., E x_N] + e_spa
    class_F1D = class_embedding.to(patches_FND.dtype).expand(count, 1, width)
    tokens_FLD = torch.cat([class_F1D, patches_FND], dim=1) + position
    return layer_norm_reference(F.pad(tokens_FLD, (0, 0, 0, int(spare))), ln_weight, ln_bias, eps)


def _saved(frames: Tensor, weight: Tensor, class_embedding: Tensor, position: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The tokens before LN_pre (F, L or L + 1, D) and the mean and 1 / sigma of each."""
    shape = (frames.shape[0], position.shape[0] + rest[-1], position.shape[1])
    tokens = weight.new_empty(shape, dtype=torch.promote_types(weight.dtype, position.dtype))
    return tokens, *(weight.new_empty(shape[:2], dtype=torch.float32) for _ in range(2))


def _example(sizes: Sizes, make: Maker) -> tuple[Any, ...]:
    width, patch = sizes.width, sizes.patch
    weight, class_embedding = make.linear(width, 3 * patch * patch)
    return (
        make.levels(sizes.sequences, sizes.image, sizes.image, 3),
        weight.view(width, 3, patch, patch),
        *(class_embedding, make.normal(sizes.tokens, width), *make.norm(width)),
        *([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 1e-5, True),
    )


_op = Op(
    patch_embed_reference,
    on_triton("patch_embed", refuse=lambda frames, weight, class_embedding, *_: refuse_rows(class_embedding)),
    example=_example,
    saved=_saved,
    autocast=("weight",),
    sizes=lambda frames, weight, class_embedding, position, *_: {
        "m": len(frames),
        "length": len(position),
        "n": len(weight),
        "levels": int(frames.dtype == torch.uint8),
    },
)


def patch_embed(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    position: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    eps: float = 1e-5,
    spare: bool = False,
) -> Tensor:
    """Frames to the tokens that enter the first block (equation 4 and CLIP's LN_pre).

    Args:
        frames: uint8 (F, H, W, 3), as decoded; or normalized float (F, 3, H, W). H and W are multiples of P.
        weight: (D, 3, P, P), the embedding E of normalized pixels.
        class_embedding: (D,).
        position: (L, D), L = H W / P^2 + 1.
        ln_weight, ln_bias: (D,).
        mean, std: three numbers each, of pixels in [0, 1], for uint8 frames; unused for float ones.
        spare: a row more for each frame, for the message of the first block.

    Returns:
        (F, L, D), or (F, L + 1, D) with a spare row of finite numbers behind each frame's.
    """
    parameters = weight, class_embedding, position, ln_weight, ln_bias
    if type(frames) is Tensor and not frames.requires_grad and cpu.takes(*parameters) and len(frames):
        return F.pad(cpu.patch_embed(frames, *parameters[:3], parameters[3:], mean, std, eps), (0, 0, 0, int(spare)))
    return _op(frames, *parameters, list(mean), list(std), eps, spare)
