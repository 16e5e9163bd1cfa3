"""X-CLIP (Ni et al., ECCV 2022): both towers, video-specific prompting, similarity.

Suffixes of tensor names: B videos, T frames, F = B T, N patches, L = N + 1 tokens of a frame (class token first),
D width of the vision tower, K labels, E embedding size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import checkpoint, kernels
from .config import VisionConfig, XCLIPConfig, variant
from .kernels._linear import linear
from .nn.cct import FastCCTBlock
from .nn.layers import init_block, init_linear
from .nn.mit import MultiFrameIntegration
from .nn.prompt import VideoSpecificPrompt
from .nn.text import TextEncoder, Transformer
from .tokenizer import tokenize

logger = logging.getLogger("xclip_fast")


class VideoFeatures(NamedTuple):
    """What the video tower knows of B videos."""

    video: Tensor  # (B, E)
    patches: Tensor  # (B, N, E), averaged over the frames


class VisionTower(nn.Module):
    """The cross-frame communication transformer (section 3.2): frames (F, ...) to tokens (F, L, D)."""

    def __init__(self, config: XCLIPConfig) -> None:
        super().__init__()
        vision = config.vision
        self.config = config
        self.conv1 = nn.Conv2d(3, vision.width, vision.patch_size, vision.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(vision.width))
        self.positional_embedding = nn.Parameter(torch.empty(vision.patches + 1, vision.width))
        self.ln_pre = nn.LayerNorm(vision.width, config.layer_norm_eps)
        self.transformer = Transformer([_cct_block(config, index) for index in range(vision.layers)])
        self.ln_post = nn.LayerNorm(vision.width, config.layer_norm_eps)
        self.proj = nn.Parameter(torch.empty(vision.width, config.embed_dim))
        self._init(vision)

    def forward(self, frames: Tensor, num_frames: int) -> Tensor:
        """uint8 (F, H, W, 3) or normalised (F, 3, H, W), F = B * num_frames, to tokens (F, L, D)."""
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
        )
        for block in self.transformer.resblocks:
            x_FLD = block(x_FLD, num_frames)
        return x_FLD

    def _init(self, vision: VisionConfig) -> None:
        for parameter in (self.class_embedding, self.positional_embedding, self.proj):
            nn.init.normal_(parameter, std=vision.width**-0.5)
        block: Any
        for block in self.transformer.resblocks:
            init_block(block, vision.width, vision.layers)
            init_linear(block.message_fc)
            init_linear(block.message_attn)


class XCLIP(nn.Module):
    """X-CLIP with random weights; ``XCLIP.from_pretrained`` reads anybody's.

    Args:
        config: the shape; ``VARIANTS["B/16-8f"]`` and its kin, or a variant's name.
    """

    def __init__(self, config: XCLIPConfig | str) -> None:
        super().__init__()
        config = variant(config) if isinstance(config, str) else config
        if not isinstance(config, XCLIPConfig):
            raise TypeError(f"config is a {type(config).__name__}; an XCLIPConfig or a variant's name wanted")
        width, embed, eps = config.vision.width, config.embed_dim, config.layer_norm_eps
        assert config.mit_heads is not None
        assert config.prompt_heads is not None
        self.config = config
        self.visual = VisionTower(config)
        self.text = TextEncoder(config.text, embed, eps)
        self.mit = MultiFrameIntegration(
            embed, config.num_frames, config.mit_layers, config.mit_heads, config.mit_residual, eps
        )
        self.prompts_visual_ln = nn.LayerNorm(width, eps)
        self.prompts_visual_proj = nn.Parameter(nn.init.normal_(torch.empty(width, embed), std=width**-0.5))
        self.prompts_generator = VideoSpecificPrompt(
            embed, config.prompt_layers, config.prompt_heads, config.prompt_alpha, eps
        )
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale))

    def forward(self, video: Tensor, text: Tensor | str | Sequence[str]) -> Tensor:
        """Logits of every label for every video.

        Args:
            video: as for ``encode_video``. text: as for ``encode_text``.

        Returns:
            (B, K), float32 (or float64): exp(logit_scale) cos(v, c_hat), equation 3.
        """
        return self.similarity(self.encode_video(video), self.encode_text(text))

    def encode_video(self, video: Tensor) -> VideoFeatures:
        """Videos to features (equations 4 to 9).

        Args:
            video: uint8 (B, T, H, W, 3) as decoded, or normalised float (B, T, 3, H, W); H = W = the image size.
                Another T than the config's works: the temporal embedding is interpolated, and logged once.

        Returns:
            video features (B, E) and patch features, averaged over the frames (B, N, E).

        Raises:
            ValueError: if the video has another shape or dtype.
        """
        self._check_video(video)
        batch, frames = video.shape[:2]
        x_FLD = self.visual(video.flatten(0, 1), frames)
        norm = self.visual.ln_post
        h_FE = kernels.ln_linear(x_FLD[:, 0], norm.weight, norm.bias, self.visual.proj.T, None, norm.eps)
        norm = self.prompts_visual_ln
        z_FND = kernels.layer_norm(x_FLD[:, 1:], norm.weight, norm.bias, norm.eps)
        # the projection is linear: one of the mean instead of the mean of T
        z_BND = z_FND.unflatten(0, (batch, frames)).mean(1)
        return VideoFeatures(
            video=self.mit(h_FE.unflatten(0, (batch, frames))),
            patches=linear(z_BND, self.prompts_visual_proj.T),
        )

    def encode_text(self, text: Tensor | str | Sequence[str]) -> Tensor:
        """Labels to features (section 3.3).

        Args:
            text: K strings, one string, or integer tokens (K, any length up to the context) from ``tokenize``, which
                is what ``torch.compile`` and ``torch.export`` take.

        Returns:
            (K, E). While the text encoder is frozen or no gradient is wanted, a label set seen before is not
            encoded again. Weights edited through ``.data`` are not noticed: call ``model.text.forget()`` then.
        """
        if isinstance(text, Tensor):
            return self.text(text)
        if torch.compiler.is_compiling():
            raise TypeError("strings cannot be compiled or exported: pass xclip_fast.tokenize(labels) instead")
        return self.text(tokenize(text, self.config.text.context_length))

    def similarity(self, video_features: VideoFeatures, text_features: Tensor) -> Tensor:
        """Prompted cosine similarity (equations 10 and 3).

        Args:
            video_features: of B videos, from ``encode_video``.
            text_features: (K, E), from ``encode_text``.

        Returns:
            (B, K), float32 (or float64).
        """
        c_hat_BKE = text_features + self.prompts_generator(text_features, video_features.patches)
        return kernels.cosine_logits(video_features.video, c_hat_BKE, self.logit_scale)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: XCLIPConfig | str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> XCLIP:
        """A model with the weights of ``path``, in evaluation mode.

        Args:
            path: what it is, is seen from its content: our own folder or file (safetensors and JSON), a Hugging
                Face X-CLIP folder, a VideoX ``.pth``, or an image CLIP (OpenAI, open_clip, Hugging Face), from
                which ``expand_from`` starts an X-CLIP.
            config: the shape, where the checkpoint does not say it or another is wanted (an image CLIP says
                neither frames nor prompt layers; the default has 8 frames).
            device, dtype: of the parameters; by default the CPU and the checkpoint's own dtype.

        Raises:
            checkpoint.CheckpointError: if the file is unreadable or no such checkpoint, or if keys are missing,
                unexpected or misshapen; all are listed.
        """
        found = checkpoint.read(path, variant(config) if isinstance(config, str) else config)
        if found.complete:
            with torch.device("meta"):
                model = cls(found.config)
            model.load_state_dict(found.state, assign=True)
        else:
            model = cls(found.config).expand_from(found)
            logger.warning(
                "%s is an image CLIP: cross-frame attention, multi-frame transformer and prompts start untrained", path
            )
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        layout: Literal["xclip_fast", "huggingface"] = "xclip_fast",
        overwrite: bool = False,
    ) -> None:
        """Write weights and config into ``folder``, atomically.

        Args:
            folder: made if it does not exist; its other files stay.
            layout: ``"huggingface"`` is what ``transformers.XCLIPModel.from_pretrained`` reads.
            overwrite: replace a checkpoint that is there already.

        Raises:
            FileExistsError: if a checkpoint is there and ``overwrite`` is not set.
        """
        checkpoint.write(self.state_dict(), self.config, folder, layout=layout, overwrite=overwrite)

    def expand_from(self, clip: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module | Any) -> XCLIP:
        """Start from an image CLIP as section 3.2 says: IFA, FFN and text inherit; CFA, MIT and prompts stay new.

        Args:
            clip: a path, a state dict, or a module of OpenAI's, open_clip's or Hugging Face's CLIP. Position
                embeddings of another grid are interpolated.

        Returns:
            the model itself.

        Raises:
            checkpoint.CheckpointError: if widths, layers or vocabulary differ.
        """
        checkpoint.expand(self, clip)
        return self

    def _check_video(self, video: Tensor) -> None:
        size = self.config.vision.image_size
        if not isinstance(video, Tensor):
            raise TypeError(f"video is a {type(video).__name__}; a torch.Tensor wanted (torch.from_numpy makes one)")
        if video.dtype == torch.uint8:
            wanted, right = "uint8 (B, T, H, W, 3)", video.dim() == 5 and video.shape[2:] == (size, size, 3)
        else:
            wanted = "float (B, T, 3, H, W), normalised"
            right = video.is_floating_point() and video.dim() == 5 and video.shape[2:] == (3, size, size)
        if not right or video.shape[1] == 0:
            raise ValueError(
                f"video of shape {tuple(video.shape)} {video.dtype} given; "
                f"{wanted} with H = W = {size} and T >= 1 wanted"
            )


def _cct_block(config: XCLIPConfig, index: int) -> FastCCTBlock:
    vision = config.vision
    return FastCCTBlock(
        vision.width,
        vision.heads,
        config.num_frames,
        drop_path=vision.drop_path * index / max(1, vision.layers - 1),
        layer_norm_eps=config.layer_norm_eps,
        batch_first=True,
    )
