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
    dfused: Tensor, saved: Sequence[Tensor], wanted: Mapping[str, torch.dtype], b: Any
) -> tuple[dict[str, Tensor], Tensor]:
    message, qkv, _, (mean, rstd, *_), mixed, lse = saved
    dtype, width, frames = message.dtype, message.shape[1], b.frames
    given: dict[str, Tensor] = {}

    def parameters(name: str, dy: Tensor, x: Tensor) -> None:
        """The gradients of the weight and the bias of y = x W^T + b."""
        if f"{name}_weight" in wanted:
            given[f"{name}_weight"] = product(dy.T, x, wanted[f"{name}_weight"])
        if f"{name}_bias" in wanted:
            given[f"{name}_bias"] = scaled(dy, dy.dtype, sums_dtype=getattr(b, f"{name}_bias").dtype)[1]

    # m + s (attention Wo + bo)
    dbranch = dfused
    if b.drop_fusion is not None:
        dbranch = (dfused.view(-1, frames, width) * b.drop_fusion[:, None, None].to(dtype)).view_as(dfused)
    heads = qkv.view(-1, frames, 3, b.heads, width // b.heads)
    dmixed = torch.mm(dbranch, b.message_out_weight).view(heads[:, :, 0].shape)
    backward = attention.backward if takes(heads.shape[-1]) else reference_backward
    dqkv = backward(dmixed, heads, mixed.view(dmixed.shape), (lse,))[0].reshape(qkv.shape)
    parameters("message_out", dbranch, mixed)
    # qkv = LN_m(m) W + b, and the residual
    dmessage, given["message_ln_weight"], given["message_ln_bias"], normed, *_ = normalize_backward(
        torch.mm(dqkv, b.message_in_weight),
        message,
        mean,
        rstd,
        b.message_ln_weight,
        extra=dfused,
        bias=b.message_ln_bias,
        normed_dtype=dtype,
    )
    assert normed is not None
    parameters("message_in", dqkv, normed)
    # m = x_class Wm + bm
    parameters("message_fc", dmessage, b.x[:, 0].to(dtype))
    return given, torch.mm(dmessage, b.message_fc_weight)
