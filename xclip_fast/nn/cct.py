"""The cross-frame communication block (paper, section 3.2, equations 7 to 9).

B videos, T frames, F = B T, L tokens of a frame (class token first), D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.common.block import first_rows
from .layers import Attention, Pair, Weights, attention_weights, block_weights, drop_path_scales, pair
from .parts import Mlp, add_branch, is_plain_block, self_attention


class Stream(NamedTuple):
    """The residual stream between blocks, with or without the spare row for the message after a frame's L rows.

    The first block that needs the row adds it, and later blocks find it there. So it is added once.
    """

    x: Tensor  # (F, L, D), or (F, L + 1, D) with the spare row
    spare: bool = False
    statistics: kernels.Statistics | None = None  # of its rows, if the block before computed them

    def tokens(self) -> Tensor:
        """(F, L, D)."""
        # not a slice: see VisionTower.forward
        return self.x.split([self.x.shape[1] - 1, 1], 1)[0] if self.spare else self.x

    def with_spare_row(self) -> Tensor:
        """(F, L + 1, D); a new last row holds zeros."""
        return self.x if self.spare else F.pad(self.x, (0, 0, 0, 1))


class DropScales(NamedTuple):
    """Drop path factors (B,) of the three residual branches. None: nothing is dropped."""

    fusion: Tensor | None = None
    diffusion: Tensor | None = None
    feed_forward: Tensor | None = None


Message = tuple[*Pair, *Pair, *Attention]  # as ``kernels.Block`` has them, from ``message_fc_weight`` on


def cct_block(
    stream: Stream,
    frames: int,
    weights: Weights,
    heads: int,
    eps: float,
    activation: str,
    message: Message,
    drop: DropScales,
    class_only: bool = False,
) -> Stream:
    """A block (equations 7 to 9), or its class rows (F, 1, D): only these are computed after the attention.

    The message joins as a key and a value only, so nothing is concatenated and no row is thrown away.
    """
    mean, rstd = stream.statistics or (None, None)
    x = stream.with_spare_row()
    block = kernels.Block(
        x,
        *weights,
        heads,
        eps,
        activation,
        *message,
        frames,
        *drop,
        rows=first_rows(x) if class_only else None,
        mean=mean,
        rstd=rstd,
        statistics=True,
    )
    x, statistics = kernels.cct_block(block)
    return Stream(x[:, None]) if class_only else Stream(x, True, statistics)


class FastCCTBlock(nn.Module):
    """A cross-frame communication block that replaces the released ``CrossFramelAttentionBlock``.

    Its state dict has the released names: ``message_fc``, ``message_ln``, ``message_attn``, ``attn``, ``ln_1``,
    ``mlp.c_fc``, ``mlp.c_proj``, ``ln_2``.

    Args:
        d_model: D, the width.
        nhead: H; D / H is 64 in every X-CLIP.
        num_frames: T, the frames of a video. ``forward`` takes another T.
        drop_path: probability that a sample (a video) skips a residual branch in training, drawn for each of
            the three branches (CFA, IFA, FFN).
        layer_norm_eps: added to the variances.
        batch_first: as in ``torch.nn.MultiheadAttention``: tokens are (B * T, L, D) instead of (L, B * T, D).
        activation: of the FFN; "gelu" in blocks that start from a ViT pretrained on images alone (Table 10).

    Shape:
        (L, B * T, D) -> (L, B * T, D), or with ``batch_first`` (B * T, L, D) -> (B * T, L, D); the T frames of
        a video are neighbors.
    """

    is_plain = is_plain_block

    def __init__(
        self,
        d_model: int,
        nhead: int,
        num_frames: int,
        *,
        drop_path: float = 0.0,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        activation: str = "quick_gelu",
    ) -> None:
        super().__init__()
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path {drop_path} must be at least 0 and below 1")
        if nhead < 1 or d_model % nhead:
            raise ValueError(f"d_model {d_model} does not divide into {nhead} heads; choose a divisor of {d_model}")
        if num_frames < 1:
            raise ValueError(f"num_frames {num_frames} must be at least 1")
        self.width = d_model
        self.heads = nhead
        self.num_frames = num_frames
        self.drop_path = drop_path
        self.batch_first = batch_first
        self.activation = activation
        self.message_fc = nn.Linear(d_model, d_model)
        self.message_ln = nn.LayerNorm(d_model, layer_norm_eps)
        self.message_attn = nn.MultiheadAttention(d_model, nhead)
        self.attn = nn.MultiheadAttention(d_model, nhead)
        self.ln_1 = nn.LayerNorm(d_model, layer_norm_eps)
        self.mlp = Mlp(d_model, activation)
        self.ln_2 = nn.LayerNorm(d_model, layer_norm_eps)

    def forward(self, x: Any, num_frames: int | None = None, class_only: bool = False) -> Any:
        """Tokens through the block.

        Args:
            x: (L, B * T, D), or (B * T, L, D) with ``batch_first``; floating. Or a ``Stream``, which towers pass from
                block to block.
            num_frames: T of this call (default: the block's).
            class_only: compute only the class rows of a ``Stream``.

        Returns:
            a tensor of x's shape and dtype; a ``Stream`` for a ``Stream``.

        Raises:
            ValueError: if x has another shape, or B * T is not a multiple of T.
        """
        frames = self.num_frames if num_frames is None else num_frames
        if isinstance(x, Stream):
            return self._run(x, frames, class_only)
        width = self.width
        layout = "(B * T, L, D)" if self.batch_first else "(L, B * T, D)"
        if x.dim() != 3 or x.shape[-1] != width:
            raise ValueError(f"tokens of shape {tuple(x.shape)} given; {layout} with D = {width} wanted")
        x_FLD = x if self.batch_first else x.transpose(0, 1)
        if frames < 1 or x_FLD.shape[0] % frames:
            raise ValueError(
                f"{x_FLD.shape[0]} frames in all are not whole videos of {frames}: pass num_frames, or check "
                f"batch_first={self.batch_first}, which takes {layout}"
            )
        y_FLD = self._run(Stream(x_FLD), frames).tokens()
        return y_FLD if self.batch_first else y_FLD.transpose(0, 1)

    def _run(self, stream: Stream, frames: int, class_only: bool = False) -> Stream:
        drop = self.draw_drop_scales(stream.x, frames)
        if not self.is_plain():
            y_FLD = self._call_modules(stream.tokens().transpose(0, 1), frames, drop).transpose(0, 1)
            return Stream(y_FLD[:, :1] if class_only else y_FLD)
        weights, message = self._weights()
        modules: Mapping[str, Any] = self._modules
        eps, activation = modules["ln_1"].eps, self.activation
        return cct_block(stream, frames, weights, self.heads, eps, activation, message, drop, class_only)

    def _weights(self) -> tuple[Weights, Message]:
        """The weights of the block and of its message."""
        modules = self._modules
        layers, attention = (*pair(modules["message_fc"]), *pair(modules["message_ln"])), modules["message_attn"]
        return block_weights(modules), (*layers, *attention_weights(attention))

    def _call_modules(self, x_LFD: Tensor, frames: int, drop: DropScales) -> Tensor:
        """Equations 7 to 9 by calling the modules, on tokens in the released layout."""
        m_TBD = self.message_fc(x_LFD[0]).unflatten(0, (-1, frames)).transpose(0, 1)
        m_TBD = add_branch(m_TBD, self_attention(self.message_attn, self.message_ln(m_TBD)), drop.fusion, dim=1)
        m_1FD = m_TBD.transpose(0, 1).flatten(0, 1)[None].to(x_LFD.dtype)
        normed = self.ln_1(torch.cat([x_LFD, m_1FD]))
        x_LFD = add_branch(x_LFD, self_attention(self.attn, normed)[:-1], drop.diffusion, dim=1)
        return add_branch(x_LFD, self.mlp(self.ln_2(x_LFD)), drop.feed_forward, dim=1)

    def draw_drop_scales(self, x: Tensor, frames: int) -> DropScales:
        probability = self.drop_path if self.training else 0.0
        return DropScales(*drop_path_scales(3, x.shape[0] // frames, probability, x))
