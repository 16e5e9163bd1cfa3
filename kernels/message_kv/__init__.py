"""The message path of a block (equation 7): class tokens in, each frame's message as key and value out."""

from typing import Any

import torch
from torch import Tensor

from ..attention import triton_saved
from ..dispatch.parts import Part
from ..dispatch.support import on_triton

# A backend's forward(save, block) reads only the class tokens and returns the messages m (F, D) with their statistics
# (Spare of triton/rows.py); a function that writes their keys and values into a view (F, 2D), any row stride,
# for a projection that has not made them of m; and what backward wants, SAVED tensors: message token (F, D), qkv
# (F, 3D), m (F, D), mean and 1 / sigma of LN_m and of LN_1 (4, F), the attention (F, D) and its log-sum-exp.
# backward(dnormed (F, D), any row stride, saved, dtypes of the gradients that are wanted by name, block) returns the
# gradients of parameters by name and of the class tokens (F, D). dnormed is that of LN_1(m).


SAVED = 6


def _saved(b: Any) -> tuple[Tensor, ...]:
    """Empty tensors of the kind that forward saves."""
    frames, width = b.x.shape[0], b.x.shape[-1]
    empty = b.in_weight.new_empty
    qkv, mixed = empty(frames, 3 * width), empty(frames, width)
    lse = triton_saved(qkv.view(-1, b.frames, 3, b.heads, width // b.heads))
    statistics = empty(4, frames, dtype=torch.float32)
    return empty(frames, width), qkv, empty(frames, width), statistics, mixed, *(lse or (statistics.new_empty(0),))


MESSAGE = Part("message_kv", on_triton("message_kv", saved=_saved))
