"""Intra-frame diffusion attention: a frame's L queries over its L tokens and its message (equation 8).

F frames (B * T), L tokens of a frame, H heads, C channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import Backend, Op


def _queries_keys_values(qkv_FL3HC: Tensor, message_F2HC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Heads first: queries (F, H, L, C), keys and values (F, H, L + 1, C) with the message as last row."""
    keys_values = torch.cat([qkv_FL3HC[:, :, 1:], message_F2HC[:, None]], dim=1)
    key, value = keys_values.permute(2, 0, 3, 1, 4).unbind(0)
    return qkv_FL3HC[:, :, 0].transpose(1, 2), key, value


def diffusion_attention_reference(qkv: Tensor, message: Tensor) -> Tensor:
    query, key, value = _queries_keys_values(qkv, message)
    # softmax(q [k; k_m]^T / sqrt(C)) [v; v_m]
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def _sdpa(qkv: Tensor, message: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*_queries_keys_values(qkv, message)).transpose(1, 2)


_op = Op(diffusion_attention_reference, Backend("sdpa", _sdpa))


def diffusion_attention(qkv: Tensor, message: Tensor) -> Tensor:
    """softmax(q [k; k_m]^T / sqrt(C)) [v; v_m] (equation 8): the message is a key and a value, never a query.

    Args:
        qkv: (F, L, 3, H, C), floating: the packed projection of F = B * T frames.
        message: (F, 2, H, C): each frame's message as key and value, from ``message_kv``.

    Returns:
        (F, L, H, C) in qkv's dtype.
    """
    return _op(qkv, message)
