"""The message path of a block as one op: class tokens in, each frame's message as key and value out."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._cuda_ops import message_kv_cuda_backend
from ._dispatch import Op, triton_backend
from ._linear import linear
from .layer_norm import layer_norm_reference
from .linear_residual import linear_residual_reference


def message_kv_reference(
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
) -> Tensor:
    width = fc_weight.shape[0]
    # m = x_class Wm + bm
    m_FD = linear(class_tokens, fc_weight, fc_bias)
    # m = m + CFA(LN_m(m)): attention over the T messages of one video
    normed_FD = layer_norm_reference(m_FD, message_ln_weight, message_ln_bias, eps)
    qkv = linear(normed_FD, qkv_weight, qkv_bias).view(-1, frames, 3, heads, width // heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed_FD = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, width)
    m_FD = linear_residual_reference(mixed_FD, out_weight, out_bias, m_FD, drop_scale, eps, False)[0]
    # [k_m, v_m] = LN_1(m) [Wk, Wv] + b
    normed_FD = layer_norm_reference(m_FD, ln_1_weight, ln_1_bias, eps)
    return linear(normed_FD, kv_weight, kv_bias).view(-1, 2, heads, width // heads)


def _refuse(class_tokens: Tensor, frames: int, fc_weight: Tensor, *rest: Any) -> str | None:
    width, heads = fc_weight.shape[0], rest[11]
    if not 1 <= frames <= 64:
        return f"{frames} frames are not between 1 and 64"
    if width > 2048 or width // heads > 128:
        return f"width {width} is over 2048, or its {heads} heads have over 128 channels"
    if {fc_weight.dtype} != {rest[index].dtype for index in (3, 5, 9)}:
        return "the weights are of several dtypes"
    return None


def _saved(class_tokens: Tensor, frames: int, fc_weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """m (F, D), qkv (F, 3D), m after CFA (F, D), mean and 1 / sigma of both LayerNorms (4, F)."""
    (rows, width), empty = class_tokens.shape, fc_weight.new_empty
    wide = (empty(rows, width), empty(rows, 3 * width), empty(rows, width))
    return *wide, empty(4, rows, dtype=torch.float32)


_op = Op(
    message_kv_reference,
    triton_backend("message_kv", refuse=_refuse),
    message_kv_cuda_backend(_refuse),
    saved=_saved,
    autocast=("fc_weight", "qkv_weight", "out_weight", "kv_weight"),
    sizes=lambda class_tokens, frames, *_: {"m": len(class_tokens), "k": class_tokens.shape[1], "frames": frames},
)


def message_kv(
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
    eps: float = 1e-5,
    drop_scale: Tensor | None = None,
) -> Tensor:
    """Message tokens, cross-frame fusion attention (equation 7) and IFA's key and value of each message.

    Args:
        class_tokens: (B * T, D), floating, any stride between rows.
        frames: T.
        fc_weight (D, D), fc_bias (D,): the message token's linear transformation.
        message_ln_*: (D,), the LayerNorm before CFA.
        qkv_weight (3D, D), qkv_bias (3D,), out_weight (D, D), out_bias (D,): CFA.
        ln_1_*: (D,), the LayerNorm before IFA.
        kv_weight (2D, D), kv_bias (2D,): IFA's key and value projections.
        heads: H, of both attentions.
        drop_scale: (B,) or None: each video's drop path factor on CFA's residual.

    Returns:
        (B * T, 2, H, D / H): key and value.
    """
    return _op(
        class_tokens,
        frames,
        fc_weight,
        fc_bias,
        message_ln_weight,
        message_ln_bias,
        qkv_weight,
        qkv_bias,
        out_weight,
        out_bias,
        ln_1_weight,
        ln_1_bias,
        kv_weight,
        kv_bias,
        heads,
        eps,
        drop_scale,
    )
