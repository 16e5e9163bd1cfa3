"""What both attentions and their backward passes share: softmax in one tile, tile arithmetic."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton import ONE_TILE
from ..triton.launching import cdiv, next_power_of_2, tile

LOG2_E = 1.4426950408889634


@triton.jit
def attend_tile(q, k, v, seen, scale):
    """softmax(q k^T scale) v over the keys that are ``seen`` (M, N): at least one a row. Float32 out, (M, C)."""
    # scores in powers of two: scale holds log2(e)
    s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    return tl.dot(p.to(v.dtype), v, input_precision="ieee") / tl.sum(p, 1)[:, None]


@triton.jit
def attend_tile_backward(q, k, v, do, seen, scale):
    """The probabilities p of ``attend_tile`` and the gradient ds of its scores, (M, N), in the dtype of q.

    Left to the caller, who stores one before computing the next: dq = ds k / sqrt(C), dk = ds^T q / sqrt(C),
    dv = p^T do.
    """
    s = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
    p = tl.exp2(s - tl.max(s, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    # dp = do v^T;  ds = p (dp - rowsum(p dp))
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    return p.to(q.dtype), ds.to(q.dtype)


def channels_contiguous(x: Tensor) -> Tensor:
    """x itself if the channels of a head are neighbors, as in every view of a packed projection; else a copy."""
    return x if x.stride()[-1] == 1 else x.contiguous()


def power_of_two(rows: int) -> int:
    """The tile of at least ``rows``: 16 is the least that tensor cores take; no rows, no tile."""
    return max(16, next_power_of_2(rows)) if rows else 0


def fits_one_tile(qkv: Tensor) -> bool:
    """Whether the backward kernel holds a sequence in one tile: it needs nothing saved then."""
    return qkv.shape[1] <= ONE_TILE[qkv.element_size()]


def sequence_tile(
    op: str, device: torch.device, sequences: int, length: int, size: int
) -> tuple[dict[str, Any], int, int]:
    """A kernel's tile with what follows from it for sequences of ``length`` rows of numbers of ``size`` bytes, and its
    numbers of query and of key blocks."""
    use = tile(op, device, sequences=sequences, length=length, bytes=size)
    full = (length - 1) // use["BLOCK_N"]
    last = power_of_two(length - full * use["BLOCK_N"])
    rest = power_of_two(length % use["BLOCK_M"])
    return {**use, "FULL": full, "LAST": last, "REST": rest}, cdiv(length, use["BLOCK_M"]), full + 1
