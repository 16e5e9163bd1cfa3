"""Backward of the message path: products of the library and the backward of its parts. LN(.) is recomputed."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention import reference_backward, takes
from ..attention import triton as attention
from ..layer_norm.triton import normalize_backward
from ..linear import product
from ..triton.column_sums import scaled


def backward(
    dnormed: Tensor, saved: Sequence[Tensor], wanted: Mapping[str, torch.dtype], b: Any
) -> tuple[dict[str, Tensor | None], Tensor]:
    token, qkv, message, (mean, rstd, mean_1, rstd_1), mixed, lse = saved
    dtype, width, frames = message.dtype, message.shape[1], b.frames
    given: dict[str, Tensor | None] = {}

    def weight(name: str, dy: Tensor, x: Tensor) -> None:
        """The gradient of the weight of y = x W^T + b."""
        if f"{name}_weight" in wanted:
            given[f"{name}_weight"] = product(dy.T, x, wanted[f"{name}_weight"])

    # LN_1(m), whose parameters have their gradients elsewhere
    known = mean_1, rstd_1, b.ln_1_weight
    above = normalize_backward(dnormed, message, *known, drop_scale=b.drop_fusion, low_dtype=dtype)
    dmessage, _, _, _, dbranch, given["message_out_bias"] = above
    assert dbranch is not None
    # m = token + s (attention Wo + bo)
    heads = qkv.view(-1, frames, 3, b.heads, width // b.heads)
    dmixed = torch.mm(dbranch, b.message_out_weight).view(heads[:, :, 0].shape)
    backward = attention.backward if takes(heads.shape[-1]) else reference_backward
    dqkv = backward(dmixed, heads, mixed.view(dmixed.shape), (lse,))[0].reshape(qkv.shape)
    weight("message_out", dbranch, mixed)
    # qkv = LN_m(token) W + b, and the residual
    below = normalize_backward(
        torch.mm(dqkv, b.message_in_weight),
        token,
        mean,
        rstd,
        b.message_ln_weight,
        extra=dmessage,
        bias=b.message_ln_bias,
        normed_dtype=dtype,
        low_dtype=dtype,
    )
    dtoken, given["message_ln_weight"], given["message_ln_bias"], normed, _, given["message_fc_bias"] = below
    assert normed is not None
    weight("message_in", dqkv, normed)
    given["message_in_bias"] = scaled(dqkv, dtype)[1]
    # token = x_class Wm + bm
    weight("message_fc", dtoken, b.x[:, 0].to(dtype))
    return given, torch.mm(dtoken, b.message_fc_weight)
