"""Video-specific prompting (paper, section 3.3, equation 10).

B videos, N patches, K labels, E embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels._linear import linear
from .layers import init_linear


class CrossAttention(nn.Module):
    """The projections of one prompt layer's attention, under their released names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)


class PromptLayer(nn.Module):
    """c + MHSA(LN(c), z), then + FFN(LN(.)): text asks, the video's patches answer."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.cross_attn = CrossAttention(width)
        self.norm1 = nn.LayerNorm(width, eps)
        self.norm3 = nn.LayerNorm(width, eps)
        # the released numbering of the two linear layers
        self.mlp = nn.ModuleDict({"0": nn.Linear(width, 4 * width), "3": nn.Linear(4 * width, width)})

    def forward(self, text: Tensor, patches_BNE: Tensor) -> Tensor:
        """text (K, E), shared by the videos, or (B, K, E); patches (B, N, E), normalised. Returns (B, K, E)."""
        attention, norm = self.cross_attn, self.norm1
        batch = patches_BNE.shape[0]
        query = linear(kernels.layer_norm(text, norm.weight, norm.bias, norm.eps), attention.q_proj.weight)
        mixed = F.scaled_dot_product_attention(
            self._split(query).expand(batch, -1, -1, -1),
            self._split(linear(patches_BNE, attention.k_proj.weight)),
            self._split(linear(patches_BNE, attention.v_proj.weight)),
        )
        mixed_BKE = mixed.transpose(1, 2).flatten(-2)
        text_BKE = text.expand(batch, -1, -1)
        text_BKE = text_BKE + linear(mixed_BKE, attention.proj.weight, attention.proj.bias)
        norm, fc, projection = self.norm3, self.mlp["0"], self.mlp["3"]
        hidden = linear(kernels.layer_norm(text_BKE, norm.weight, norm.bias, norm.eps), fc.weight, fc.bias)
        result: Tensor = text_BKE + linear(kernels.quick_gelu(hidden), projection.weight, projection.bias)
        return result

    def _split(self, x: Tensor) -> Tensor:
        """(..., rows, E) to heads first, (..., H, rows, E / H)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)


class VideoSpecificPrompt(nn.Module):
    """alpha times the prompts of equation 10.

    The first layer's normalised text and its query are the same for every video and computed once.

    Args:
        width: E. layers, heads: of the generator. alpha: initial value of the learnt scale (E,).
        eps: of the LayerNorms.
    """

    def __init__(self, width: int, layers: int, heads: int, alpha: float, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps)
        self.decoder = nn.ModuleList(PromptLayer(width, heads, eps) for _ in range(layers))
        self.alpha = nn.Parameter(torch.full((width,), alpha))
        init_linear(self)

    def forward(self, text_KE: Tensor, patches_BNE: Tensor) -> Tensor:
        """Text features (K, E) and mean patch features (B, N, E) to (B, K, E), added to the text features."""
        patches_BNE = kernels.layer_norm(patches_BNE, self.norm.weight, self.norm.bias, self.norm.eps)
        prompts = text_KE
        for layer in self.decoder:
            prompts = layer(prompts, patches_BNE)
        return self.alpha * prompts
