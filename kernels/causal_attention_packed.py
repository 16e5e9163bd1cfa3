"""Causal attention of the text encoder over labels of unequal length, packed without padding.

S tokens in all, K labels, H heads, C channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import Backend, Op, triton_backend


def _unpack(qkv_S3HC: Tensor, offsets_K1: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Padded to (K, longest, 3, H, C), and each token's label and place in it.

    Padding stands after a label's last token, where causal attention never looks.
    """
    tokens, labels = qkv_S3HC.shape[0], offsets_K1.shape[0] - 1
    offsets_K1 = offsets_K1.long()
    label_S = torch.repeat_interleave(
        torch.arange(labels, device=qkv_S3HC.device), offsets_K1.diff(), output_size=tokens
    )
    place_S = torch.arange(tokens, device=qkv_S3HC.device) - offsets_K1[label_S]
    padded = qkv_S3HC.new_zeros(labels, longest, *qkv_S3HC.shape[1:])
    return padded.index_put((label_S, place_S), qkv_S3HC), label_S, place_S


def causal_attention_packed_reference(qkv: Tensor, offsets: Tensor, longest: int) -> Tensor:
    padded, label_S, place_S = _unpack(qkv, offsets, longest)
    query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    future = torch.ones(longest, longest, dtype=torch.bool, device=qkv.device).triu(1)
    mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ value
    return mixed.transpose(1, 2)[label_S, place_S]


def _sdpa(qkv: Tensor, offsets: Tensor, longest: int) -> Tensor:
    padded, label_S, place_S = _unpack(qkv, offsets, longest)
    query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixed.transpose(1, 2)[label_S, place_S]


def _refuse(qkv: Tensor, offsets: Tensor, longest: int) -> str | None:
    if qkv.shape[-1] not in (16, 32, 64):
        return f"head size {qkv.shape[-1]} is not 16, 32 or 64"
    # what fits in one tile of the kernel without spilling registers
    if qkv.dtype == torch.float32:
        limit, where = 32, "in float32"
    elif longest > 64 and qkv.device.type == "cuda" and torch.cuda.get_device_capability(qkv.device)[0] < 9:
        limit, where = 64, "before compute capability 9.0"
    else:
        limit, where = 128, "in a tile"
    return None if longest <= limit else f"the longest label has {longest} tokens, more than {limit} {where}"


_op = Op(
    causal_attention_packed_reference,
    triton_backend("causal_attention_packed", refuse=_refuse),
    Backend("sdpa", _sdpa),
    saved=lambda qkv, offsets, longest: (),
    autocast=("qkv",),
)


def causal_attention_packed(qkv: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """softmax(causal(q k^T / sqrt(C))) v within each label.

    Args:
        qkv: (S, 3, H, C), floating: the packed projection of all labels' tokens, one label after another.
        offsets: (K + 1,), integer: label k owns rows offsets[k] to offsets[k + 1] - 1; offsets[K] = S.
        longest: the largest number of tokens of a label.

    Returns:
        (S, H, C) in qkv's dtype.
    """
    return _op(qkv, offsets, longest)
