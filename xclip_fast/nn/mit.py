"""The multi-frame integration transformer (paper, equation 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.dispatch import log_once
from .layers import TransformerBlock, init_linear


class MultiFrameIntegration(nn.Module):
    """Frame features to one video feature: AvgPool(MIT(h + e_temp) + h), or without the residual (equation 6).

    Args:
        width: E. frames: T of the temporal position encoding. layers, heads: of the transformer.
        residual: add the frame features to the transformer's output before pooling, as the released weights need.
        eps: of the LayerNorms. temporal_std: of the temporal position encoding, initially.
        interpolated: for another T, the encoding is interpolated along time. Otherwise its first T are used.

    Shape:
        (B, T, E) -> (B, E).
    """

    def __init__(
        self,
        width: int,
        frames: int,
        layers: int,
        heads: int,
        residual: bool,
        eps: float,
        temporal_std: float = 0.02,
        interpolated: bool = True,
    ) -> None:
        super().__init__()
        self.interpolated = interpolated
        self.residual = residual
        self.positional_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, frames, width), std=temporal_std))
        self.resblocks = nn.ModuleList(TransformerBlock(width, heads, eps) for _ in range(layers))
        init_linear(self)

    def forward(self, h_BTE: Tensor) -> Tensor:
        x_BTE = h_BTE + self._position(h_BTE.shape[1])
        for block in self.resblocks:
            x_BTE = block(x_BTE)
        if self.residual:
            x_BTE = x_BTE + h_BTE
        return x_BTE.mean(1)

    def _position(self, frames: int) -> Tensor:
        position_1TE = self.positional_embedding
        if frames == position_1TE.shape[1]:
            return position_1TE
        if not self.interpolated:
            if frames > position_1TE.shape[1]:
                raise ValueError(f"{frames} frames given; this model has positions for {position_1TE.shape[1]}")
            return position_1TE[:, :frames]
        if not torch.compiler.is_compiling():
            trained = position_1TE.shape[1]
            log_once(f"the temporal embedding of {trained} frames is interpolated to the {frames} given")
        return F.interpolate(position_1TE.transpose(1, 2), size=frames, mode="linear").transpose(1, 2)
