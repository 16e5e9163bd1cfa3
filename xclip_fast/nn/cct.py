"""The cross-frame communication block (paper, section 3.2, equations 7 to 9).

B videos, T frames, F = B T, L tokens of a frame (class token first), D width, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from .fp8 import Fp8Weights
from .layers import drop_path_scale, feed_forward
from .overlap import side_by_side
from .parts import Mlp, add_branch, is_plain, self_attention


class DropScales(NamedTuple):
    """Drop path factors (B,) of the three residual branches; None where nothing is dropped."""

    fusion: Tensor | None = None
    diffusion: Tensor | None = None
    feed_forward: Tensor | None = None


class AttentionWeights(NamedTuple):
    """An attention's packed projection (3D, D), (3D,) and output projection (D, D), (D,)."""

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


def cct_attention(
    x_FLD: Tensor,
    frames: int,
    heads: int,
    message_fc: nn.Linear,
    message_ln: nn.LayerNorm,
    fusion: AttentionWeights,
    ln_1: nn.LayerNorm,
    diffusion: AttentionWeights,
    drop: DropScales,
    fp8: Fp8Weights | None = None,
) -> Tensor:
    """x + IFA(LN_1([x, m]))[:L] with m from CFA (equations 7 and 8), x (F, L, D) -> (F, L, D).

    The message joins as a key and a value only, so nothing is concatenated and no row is thrown away. Its path and the
    projection of the frames' tokens depend on x alone. With ``fp8`` that projection takes its weight from there.
    """
    width = x_FLD.shape[-1]
    if fp8 is None and drop.fusion is None and drop.diffusion is None and message_ln.eps == ln_1.eps:
        message_fc_wb, message_ln_wb, ln_1_wb = ((part.weight, part.bias) for part in (message_fc, message_ln, ln_1))
        if kernels.cpu.takes(x_FLD, *message_fc_wb, *message_ln_wb, *fusion, *ln_1_wb, *diffusion):
            return kernels.cpu.cross_frame_attention(
                x_FLD, frames, heads, message_fc_wb, message_ln_wb, fusion, ln_1_wb, diffusion, ln_1.eps
            )

    def message() -> Tensor:
        return kernels.message_kv(
            x_FLD[:, 0],
            frames,
            message_fc.weight,
            message_fc.bias,
            message_ln.weight,
            message_ln.bias,
            *fusion,
            ln_1.weight,
            ln_1.bias,
            diffusion.in_weight[width:],
            diffusion.in_bias[width:],
            heads,
            ln_1.eps,
            drop.fusion,
        )

    def projection() -> Tensor:
        norm, bias = (ln_1.weight, ln_1.bias), diffusion.in_bias
        if fp8 is None:
            return kernels.ln_linear(x_FLD, *norm, diffusion.in_weight, bias, ln_1.eps)
        return kernels.ln_linear_fp8(x_FLD, *norm, fp8.qkv, fp8.qkv_scale, bias, ln_1.eps)

    message_F2HC, qkv = side_by_side(x_FLD, message, projection)
    mixed = kernels.diffusion_attention(qkv.unflatten(-1, (3, heads, width // heads)), message_F2HC)
    return kernels.linear_residual(mixed.flatten(-2), diffusion.out_weight, diffusion.out_bias, x_FLD, drop.diffusion)


class FastCCTBlock(nn.Module):
    """One cross-frame communication block, a drop-in for the released ``CrossFramelAttentionBlock``.

    Its state dict has the released names: ``message_fc``, ``message_ln``, ``message_attn``, ``attn``, ``ln_1``,
    ``mlp.c_fc``, ``mlp.c_proj``, ``ln_2``.

    Args:
        d_model: D, the width.
        nhead: H; D / H is 64 in every X-CLIP.
        num_frames: T, the frames of a video; ``forward`` may be given another.
        drop_path: probability that a sample (a video) skips a residual branch in training, drawn for each of
            the three branches (CFA, IFA, FFN).
        layer_norm_eps: added to the variances.
        batch_first: as in ``torch.nn.MultiheadAttention``: tokens are (B * T, L, D) instead of (L, B * T, D).
        activation: of the FFN; "gelu" in blocks that start from a ViT pretrained on images alone (Table 10).

    Shape:
        (L, B * T, D) -> (L, B * T, D), or with ``batch_first`` (B * T, L, D) -> (B * T, L, D); the T frames of
        a video are neighbors.
    """

    fp8: Fp8Weights | None  # what XCLIP.quantize puts there; it may be used in evaluation mode only

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
        self.register_module("fp8", None)

    def forward(self, x: Tensor, num_frames: int | None = None) -> Tensor:
        """Tokens through the block.

        Args:
            x: (L, B * T, D), or (B * T, L, D) with ``batch_first``; floating.
            num_frames: T of this call, if not the block's own.

        Returns:
            of x's shape and dtype.

        Raises:
            ValueError: if x is not of that shape, or B * T is not a multiple of T.
            RuntimeError: if it is quantized, and in training mode or asked for gradients.
        """
        frames = self.num_frames if num_frames is None else num_frames
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
        if self.fp8 is not None and self.training:
            raise RuntimeError("a quantized block is for inference only: call eval(), or dequantize() to train it")
        drop = self.draw_drop_scales(x_FLD, frames)
        if not self.is_plain():
            y_LFD = self._call_modules(x_FLD.transpose(0, 1), frames, drop)
            return y_LFD.transpose(0, 1) if self.batch_first else y_LFD
        x_FLD = self.attend(x_FLD, frames, drop)
        fc, projection, norm = self.mlp.c_fc, self.mlp.c_proj, self.ln_2
        if self.fp8 is None:
            x_FLD = feed_forward(x_FLD, norm, fc, projection, drop.feed_forward, self.activation)
        else:
            x_FLD = kernels.mlp_fp8(
                x_FLD,
                norm.weight,
                norm.bias,
                self.fp8.fc,
                self.fp8.fc_scale,
                fc.bias,
                self.fp8.projection,
                self.fp8.projection_scale,
                projection.bias,
                self.fp8.hidden_scale,
                norm.eps,
            )
        return x_FLD if self.batch_first else x_FLD.transpose(0, 1)

    def attend(self, x_FLD: Tensor, frames: int, drop: DropScales) -> Tensor:
        """The block up to its FFN: (F, L, D) -> (F, L, D)."""
        return cct_attention(
            x_FLD,
            frames,
            self.heads,
            self.message_fc,
            self.message_ln,
            _attention_weights(self.message_attn),
            self.ln_1,
            _attention_weights(self.attn),
            drop,
            self.fp8,
        )

    def is_plain(self) -> bool:
        """Whether the block computes from the parameters of its parts; see ``parts.is_plain``."""
        return is_plain(self._modules, heads=self.heads, eps=self.ln_1.eps, activation=self.activation)

    def _call_modules(self, x_LFD: Tensor, frames: int, drop: DropScales) -> Tensor:
        """Equations 7 to 9 by calling the parts, which see tokens in the released layout."""
        m_TBD = self.message_fc(x_LFD[0]).unflatten(0, (-1, frames)).transpose(0, 1)
        m_TBD = add_branch(m_TBD, self_attention(self.message_attn, self.message_ln(m_TBD)), drop.fusion, dim=1)
        m_1FD = m_TBD.transpose(0, 1).flatten(0, 1)[None].to(x_LFD.dtype)
        normed = self.ln_1(torch.cat([x_LFD, m_1FD]))
        x_LFD = add_branch(x_LFD, self_attention(self.attn, normed)[:-1], drop.diffusion, dim=1)
        return add_branch(x_LFD, self.mlp(self.ln_2(x_LFD)), drop.feed_forward, dim=1)

    def draw_drop_scales(self, x_FLD: Tensor, frames: int) -> DropScales:
        """Fresh drop path factors for each video and branch; none outside training."""
        if not self.training or self.drop_path == 0.0:
            return DropScales()
        return DropScales(*(drop_path_scale(x_FLD.shape[0] // frames, self.drop_path, x_FLD) for _ in range(3)))


def _attention_weights(attention: nn.MultiheadAttention) -> AttentionWeights:
    out = attention.out_proj
    return AttentionWeights(attention.in_proj_weight, attention.in_proj_bias, out.weight, out.bias)
