"""The arguments of a block, written once: the op's schema, its reference and its kernels all read them from here."""

from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """F frames (or other sequences), S rows of each, D width, H heads; R the rows that leave the block.

    With a message the last row of every frame is spare: the message's key and value take the place of its own, and what
    comes out in it is dead, finite and without influence. The block's equations are 7 to 9 of the paper.
    """

    x: Tensor  # (F, S, D), or (M, D): the rows of packed sequences, with offsets
    ln_1_weight: Tensor  # (D,)
    ln_1_bias: Tensor  # (D,)
    in_weight: Tensor  # (3D, D): queries, keys, values
    in_bias: Tensor  # (3D,)
    out_weight: Tensor  # (D, D)
    out_bias: Tensor  # (D,)
    ln_2_weight: Tensor  # (D,)
    ln_2_bias: Tensor  # (D,)
    fc_weight: Tensor  # (4D, D)
    fc_bias: Tensor  # (4D,)
    projection_weight: Tensor  # (D, 4D)
    projection_bias: Tensor  # (D,)
    heads: int
    eps: float = 1e-5
    activation: str = "quick_gelu"  # or one of GELUS
    # the message path (equation 7); without it a plain pre-norm block
    message_fc_weight: Tensor | None = None  # (D, D)
    message_fc_bias: Tensor | None = None  # (D,)
    message_ln_weight: Tensor | None = None  # (D,)
    message_ln_bias: Tensor | None = None  # (D,)
    message_in_weight: Tensor | None = None  # (3D, D)
    message_in_bias: Tensor | None = None  # (3D,)
    message_out_weight: Tensor | None = None  # (D, D)
    message_out_bias: Tensor | None = None  # (D,)
    frames: int = 0  # T, with a message: F is a multiple
    # drop path factors of each sample, 0 or 1 / (1 - p); the rows are a multiple of their number
    drop_fusion: Tensor | None = None  # (B,): of CFA
    drop_attention: Tensor | None = None
    drop_feed_forward: Tensor | None = None
    # attention
    causal: bool = False  # no row sees a later one; packed sequences always are
    offsets: Tensor | None = None  # (K + 1,) integer: sequence k owns rows offsets[k] to offsets[k + 1] - 1
    longest: int = 0  # rows of the longest sequence, with offsets
    # (W, H, S, S): added to the scores before their softmax; sequence f takes that of window f mod W
    bias: Tensor | None = None
    rows: Tensor | None = None  # (R,) integer, without repeats: only these rows of x are computed past the attention
    # the row statistics of x, where the block before left them: mean and 1 / sqrt(variance + eps), (M,) float32
    mean: Tensor | None = None
    rstd: Tensor | None = None
    statistics: bool = False  # leave them for the next block, if they cost nothing
    backend: str = ""  # the one asked for when a graph was traced; "": ask now


# the activations that are GELU, with torch's name of the approximation
GELUS = {"gelu": "none", "gelu_tanh": "tanh"}

# what autocast lowers: the weights of products
LOWERED = (
    "in_weight",
    "out_weight",
    "fc_weight",
    "projection_weight",
    "message_fc_weight",
    "message_in_weight",
    "message_out_weight",
    "bias",
)


def first_rows(x: Tensor) -> Tensor:
    """The place of each frame's first row among all rows of x (F, S, D): (F,)."""
    return torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
