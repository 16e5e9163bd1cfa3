"""Scaled cosine similarity of videos and their prompted labels (equation 3)."""

import torch
from torch import Tensor

from ..dispatch import Op
from ..dispatch.support import on_triton


def cosine_logits_reference(video: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    precise = torch.promote_types(video.dtype, torch.float32)
    video, text = video.to(precise), text.to(precise)
    # exp(scale) <v, c> / (|v| |c|), one norm a row: no normalized copy
    dots = torch.einsum("be,bke->bk", video, text)
    norms = torch.linalg.vector_norm(video, dim=-1)[:, None] * torch.linalg.vector_norm(text, dim=-1)
    return dots * (scale.to(precise).exp() / norms)


def _saved(video: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Dot products (B, K), norms of the videos (B,) and of the labels (B, K)."""
    shape = text.shape[:2]
    return tuple(video.new_empty(size, dtype=torch.float32) for size in (shape, shape[:1], shape))


_op = Op(
    cosine_logits_reference,
    on_triton("cosine_logits"),
    example=lambda sizes, make: (
        make.normal(sizes.videos, sizes.embed),
        make.normal(sizes.videos, sizes.labels, sizes.embed),
        make.normal(),
    ),
    saved=_saved,
)


def cosine_logits(video: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """exp(scale) cos(v, c) (equation 3, with CLIP's temperature).

    Args:
        video: (B, E), floating.
        text: (B, K, E), each video's own prompted labels.
        scale: (), the logarithm of the temperature's inverse.

    Returns:
        (B, K), float32 (float64 for float64 input). A zero vector gives NaN, as it has no direction.
    """
    return _op(video, text, scale)
