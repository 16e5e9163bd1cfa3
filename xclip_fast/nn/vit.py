"""The vision tower of X-CLIP: a ViT whose frames exchange messages (paper, section 3.2), or a plain ViT.

A vision tower (this one and ``swin.SwinTower``) turns frames into a feature and patches of each. ``proj`` maps a
feature to the embedding, and ``transformer.resblocks`` are all blocks.

B videos, T frames, F = B T, N patches, L = N + 1 tokens of a frame (class token first), D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..config import VisionConfig, XCLIPConfig
from ..kernels.common.block import first_rows
from ..kernels.patch_embed import constants
from .cct import FastCCTBlock, Stream
from .layers import TransformerBlock, init_block, init_linear, run_block
from .parts import is_plain, is_watched, layer_norm
from .text import Transformer


def normalized(frames: Tensor, like: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (F, H, W, 3) to normalized (F, 3, H, W) in the dtype of ``like``; floats are normalized already."""
    if frames.dtype == torch.uint8:
        precise = torch.promote_types(like.dtype, torch.float32)
        mean_3, std_3 = (constants(values, like, precise) for values in (mean, std))
        frames = ((frames.to(precise) / 255 - mean_3) / std_3).permute(0, 3, 1, 2)
    return frames.to(like.dtype)


class VisionTower(nn.Module):
    """The cross-frame communication transformer (section 3.2): frames (F, ...) to features and patches."""

    def __init__(self, config: XCLIPConfig) -> None:
        super().__init__()
        vision = config.vision
        assert isinstance(vision, VisionConfig)
        self.config, self.vision = config, vision
        self.recompute = False  # see XCLIP.checkpoint_activations
        self.conv1 = nn.Conv2d(3, vision.width, vision.patch_size, vision.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(vision.width))
        self.positional_embedding = nn.Parameter(torch.empty(vision.patches + 1, vision.width))
        if vision.pre_norm:
            self.ln_pre = nn.LayerNorm(vision.width, config.vision_eps)
        self.transformer = Transformer([_block(config, vision, index) for index in range(vision.layers)])
        self.ln_post = nn.LayerNorm(vision.width, config.vision_eps)
        self.proj = nn.Parameter(torch.empty(vision.width, config.embed_dim))
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(parameter, std=vision.width**-0.5)
        block: Any
        for block in self.transformer.resblocks:
            init_block(block, vision.width, vision.layers)
            if vision.cross_frame:
                init_linear(block.message_fc)
                init_linear(block.message_attn)

    def forward(self, frames: Tensor, num_frames: int, patches: bool = True) -> tuple[Tensor, Tensor]:
        """Frames to the feature of each (F, D), its normalized class token, and its patches (F, N, D).

        Args:
            frames: uint8 (F, H, W, 3) or normalized (F, 3, H, W), F = B * num_frames.
            patches: whether to compute them. If not, the last block computes class tokens alone after its attention,
                and the patches are (F, 0, D), except where a hook sees the whole block, or where its class has a
                ``forward`` of its own.
        """
        pre_norm = self.ln_pre if self.vision.pre_norm else None
        blocks, cross_frame = self.transformer.resblocks, self.vision.cross_frame
        watched = cross_frame and any(is_watched(block) for block in blocks)
        spare = False
        if pre_norm is None or not is_plain({"conv1": self.conv1, "ln_pre": pre_norm}):
            x_FLD = self._embed(frames)
            x_FLD = x_FLD if pre_norm is None else pre_norm(x_FLD)
        else:
            spare = cross_frame and not watched
            x_FLD = kernels.patch_embed(
                frames,
                self.conv1.weight,
                self.class_embedding,
                self.positional_embedding,
                self.ln_pre.weight,
                self.ln_pre.bias,
                self.config.image_mean,
                self.config.image_std,
                self.ln_pre.eps,
                spare,
            )
        *before, last = blocks
        own = type(last).forward not in (FastCCTBlock.forward, TransformerBlock.forward)  # it may not know the argument
        class_only = not (patches or watched or own or is_watched(last))
        if not cross_frame:
            videos = x_FLD.shape[0] // num_frames
            for block in before:
                x_FLD = run_block(block, self.recompute, x_FLD, False, None, 0, None, videos)
            rows = first_rows(x_FLD) if class_only else None
            x_FLD = run_block(last, self.recompute, x_FLD, False, None, 0, rows, videos)
            x_FLD = x_FLD[:, None] if class_only else x_FLD
        else:
            stream: Any = x_FLD if watched else Stream(x_FLD, spare)
            for block in before:
                stream = run_block(block, self.recompute, stream, num_frames)
            stream = run_block(last, self.recompute, stream, num_frames, *([True] if class_only else []))
            x_FLD, spare, _ = stream if isinstance(stream, Stream) else Stream(stream)
        # the gradients of a split are put side by side in one pass; those of slices are padded and added
        sizes = [1, 0 if class_only else self.vision.patches, *([1] if spare else [])]
        class_F1D, patches_FND, *_ = x_FLD.split(sizes, 1)
        return layer_norm(self.ln_post, class_F1D.squeeze(1)), patches_FND

    def _embed(self, frames: Tensor) -> Tensor:
        """Equation 4 without CLIP's LayerNorm after it, by calling the convolution: the ViTs of Table 10."""
        pixels = normalized(frames, self.conv1.weight, self.config.image_mean, self.config.image_std)
        patches_FND = self.conv1(pixels).flatten(2).transpose(1, 2)
        class_F1D = self.class_embedding.to(patches_FND.dtype).expand(frames.shape[0], 1, -1)
        return torch.cat([class_F1D, patches_FND], 1) + self.positional_embedding


def _block(config: XCLIPConfig, vision: VisionConfig, index: int) -> nn.Module:
    drop_path = vision.drop_path * index / max(1, vision.layers - 1)
    if not vision.cross_frame:
        return TransformerBlock(
            vision.width, vision.heads, config.vision_eps, drop_path=drop_path, activation=vision.activation
        )
    return FastCCTBlock(
        vision.width,
        vision.heads,
        config.num_frames,
        drop_path=drop_path,
        layer_norm_eps=config.vision_eps,
        batch_first=True,
        activation=vision.activation,
    )
