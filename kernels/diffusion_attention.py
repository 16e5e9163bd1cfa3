"""Intra-frame diffusion attention: a frame's L queries over its L tokens and its message (equation 8).

F frames (B * T), L tokens of a frame, H heads, C channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import Backend, Op, triton_backend

ONE_TILE = (
    64  # a frame shorter than this fits in one tile of the kernel with its message: nothing is saved for backward
)


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


def fits_one_tile(qkv: Tensor) -> bool:
    """Whether the kernel holds a frame and its message in one tile: backward needs nothing saved then."""
    return qkv.shape[1] < {2: 64, 4: 32}[qkv.element_size()]


def _refuse(qkv: Tensor, message: Tensor) -> str | None:
    channels = qkv.shape[-1]
    return None if channels in (16, 32, 64) else f"head size {channels} is not 16, 32 or 64"


def _saved(qkv: Tensor, message: Tensor) -> tuple[Tensor, ...]:
    """The output and, per query, log2 of the sum of the exponentials."""
    frames, length, _, heads, channels = qkv.shape
    if fits_one_tile(qkv):
        return ()
    return qkv.new_empty(frames, length, heads, channels), qkv.new_empty(frames, heads, length, dtype=torch.float32)


_op = Op(
    diffusion_attention_reference,
    Backend("sdpa", _sdpa),
    triton_backend("diffusion_attention", refuse=_refuse),
    saved=_saved,
    autocast=("qkv", "message"),
    sizes=lambda qkv, message: {"m": len(qkv), "length": qkv.shape[1], "heads": qkv.shape[3], "channels": qkv.shape[4]},
)


def diffusion_attention(qkv: Tensor, message: Tensor) -> Tensor:
    """softmax(q [k; k_m]^T / sqrt(C)) [v; v_m] (equation 8): the message is a key and a value, never a query.

    Args:
        qkv: (F, L, 3, H, C), floating: the packed projection of F = B * T frames.
        message: (F, 2, H, C): each frame's message as key and value, from ``message_kv``.

    Returns:
        (F, L, H, C) in qkv's dtype.
    """
    return _op(qkv, message)
