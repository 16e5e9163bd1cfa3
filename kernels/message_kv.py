"""The message path of a block (equation 7): class tokens in, each frame's message as key and value out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cuda_library, triton
from .attention import triton_saved
from .parts import Case, Part
from .support import HALF, UNMEASURED, Backend, on_triton

# Rows up to which it is one kernel of the CUDA library, whose time is that of its weights. Not measured.
CUDA_ROWS = 64

# A backend's forward(save, block) reads only the class tokens and returns the messages m (F, D) with their statistics
# (triton/layer_norm.Spare), or None; a function that writes their keys and values into a view (F, 2D), any row stride,
# for a projection that has not made them of m; and what backward wants, SAVED tensors: message token (F, D), qkv
# (F, 3D), m (F, D), mean and 1 / sigma of LN_m and of LN_1 (4, F), the attention (F, D) and its log-sum-exp.
# backward(dm (F, D), saved, names of the arguments whose gradient is wanted, block) returns the gradients of parameters
# by name and of the class tokens (F, D).


def _triton_forward(save: bool, b: Any) -> tuple[Any, Callable[[Tensor], None], tuple[Tensor, ...]]:
    return triton.message_kv.forward(save, b)


def _triton_backward(dm: Tensor, saved: Any, wanted: set[str], b: Any) -> tuple[dict[str, Tensor], Tensor]:
    return triton.message_kv.backward(dm, saved, wanted, b)


SAVED = 6


def _saved(b: Any) -> tuple[Tensor, ...]:
    """Empty tensors of the kind that forward saves."""
    frames, width = b.x.shape[0], b.x.shape[-1]
    empty = b.in_weight.new_empty
    qkv, mixed = empty(frames, 3 * width), empty(frames, width)
    lse = triton_saved(qkv.view(-1, b.frames, 3, b.heads, width // b.heads))
    statistics = empty(4, frames, dtype=torch.float32)
    return empty(frames, width), qkv, empty(frames, width), statistics, mixed, *(lse or (statistics.new_empty(0),))


def _cuda_forward(save: bool, b: Any) -> tuple[None, Callable[[Tensor], None], tuple[Tensor, ...]]:
    key_value = cuda_library.message_kv(b)

    def write(to: Tensor) -> None:
        to.copy_(key_value)

    return None, write, ()


def _refuse_cuda(case: Case) -> str | None:
    if case.sequences > CUDA_ROWS:
        return f"{case.sequences} rows are over {CUDA_ROWS}"
    if case.width % 64 or case.channels != 64:
        return f"width {case.width} in {case.heads} heads: heads of 64 channels wanted"
    if case.drops:
        return "drop path is for training"
    if not 1 <= case.frames <= 64:
        return f"{case.frames} frames are not between 1 and 64"
    return cuda_library.refuse_device(case.device.type, case.device.index, case.width)


MESSAGE = Part(
    "message_kv",
    on_triton(_triton_forward, _triton_backward, saved=_saved),
    Backend("cuda", _cuda_forward, dtypes=HALF, opt_in=UNMEASURED, inference_only=True, refuse=_refuse_cuda),
)
