"""Causal attention of packed labels, each over itself. M rows, K labels, H heads of C channels."""

import torch
from torch import Tensor

from ..attention import attention_reference, takes
from ..dispatch.parts import Case, Part
from ..dispatch.support import on_triton


def packed_reference(qkv_M3HC: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Causal attention of each label over itself.

    Args:
        qkv_M3HC: (M, 3, H, C), the rows of all labels, one label after another.
        offsets: (K + 1,), integer: label k owns rows offsets[k] to offsets[k + 1] - 1; offsets[K] = M.
        longest: rows of the longest label.

    Returns:
        (M, H, C).
    """
    rows, labels = qkv_M3HC.shape[0], offsets.shape[0] - 1
    offsets, device = offsets.long(), qkv_M3HC.device
    label_M = torch.repeat_interleave(torch.arange(labels, device=device), offsets.diff(), output_size=rows)
    place_M = torch.arange(rows, device=device) - offsets[label_M]
    # padding stands behind a label's last token, where causal attention never looks
    padded = qkv_M3HC.new_zeros(labels, longest, *qkv_M3HC.shape[1:]).index_put((label_M, place_M), qkv_M3HC)
    return attention_reference(padded, causal=True)[label_M, place_M]


def _refuse(case: Case) -> str | None:
    if not takes(case.channels):
        return f"head size {case.channels} is not 16, 32 or 64"
    # what fits in one tile of the kernel without spilling registers
    limit, where = 128, "in a tile"
    if case.dtype == torch.float32:
        limit, where = 32, "in float32"
    elif case.device.type == "cuda" and torch.cuda.get_device_capability(case.device)[0] < 9:
        limit, where = 64, "before compute capability 9.0"
    return None if case.length <= limit else f"the longest label has {case.length} tokens, more than {limit} {where}"


# as ATTENTION, of qkv (M, 3, H, C); mixing is offsets and longest
PACKED_ATTENTION = Part(
    "packed_attention",
    on_triton("packed_attention", refuse=_refuse, saved=lambda qkv: ()),
)
