"""Video-specific prompting (paper, section 3.3, equation 10).

B videos, N patches, K labels, E embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..kernels.linear import linear
from .layers import init_linear, pair
from .parts import CrossAttention, Mlp, is_plain, layer_norm


class PromptLayer(nn.Module):
    """c + MHSA(LN(c), z), then + FFN(LN(.)): queries from the text, keys and values from the video's patches."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.cross_attn = CrossAttention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps)
        self.norm3 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, names=("0", "1", "3"))  # the released numbering, in which 2 is a dropout

    def forward(self, text: Tensor, patches_BNE: Tensor) -> Tensor:
        """text (K, E), shared by the videos, or (B, K, E); patches (B, N, E), normalized. Returns (B, K, E)."""
        attention, norm = self.cross_attn, self.norm1
        if not is_plain(self._modules, eps=norm.eps):
            text_BKE = text + attention(norm(text), patches_BNE)
            result: Tensor = text_BKE + self.mlp(self.norm3(text_BKE))
            return result
        query, key, value = pair(attention.q_proj), pair(attention.k_proj), pair(attention.v_proj)
        asked = linear(kernels.layer_norm(text, *pair(norm), norm.eps), *query)
        mixed_BKE = attention.attend(asked, linear(patches_BNE, *key), linear(patches_BNE, *value))
        text_BKE = text.expand(patches_BNE.shape[0], -1, -1)
        text_BKE = text_BKE + linear(mixed_BKE, *pair(attention.proj))
        ln, fc, projection = pair(self.norm3), pair(self.mlp[0]), pair(self.mlp[2])
        if kernels.cpu.takes(text_BKE, *ln, *fc, *projection):
            return kernels.cpu.feed_forward(text_BKE, ln, fc, projection, norm.eps)
        hidden = kernels.quick_gelu(linear(kernels.layer_norm(text_BKE, *ln, norm.eps), *fc))
        return text_BKE + linear(hidden, *projection)


class VideoSpecificPrompt(nn.Module):
    """alpha times the prompts of equation 10.

    The first layer's normalized text and its query are the same for every video and computed once.

    Args:
        width: E. layers, heads: of the generator. alpha: initial value of the learned scale (E,).
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
        patches_BNE = layer_norm(self.norm, patches_BNE)
        prompts = text_KE
        for layer in self.decoder:
            prompts = layer(prompts, patches_BNE)
        return self.alpha * prompts


def plain_logits(video_BE: Tensor, text_KE: Tensor, scale: Tensor) -> Tensor:
    """exp(scale) cos(v, c) (equation 3) if all videos share the labels' features: (B, K), at least float32."""
    precise = torch.promote_types(video_BE.dtype, torch.float32)
    with torch.autocast(video_BE.device.type, enabled=False):
        video_BE, text_KE = (F.normalize(features.to(precise), dim=-1) for features in (video_BE, text_KE))
        return scale.to(precise).exp() * (video_BE @ text_KE.T)
