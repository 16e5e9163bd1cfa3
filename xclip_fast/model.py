"""X-CLIP (Ni et al., ECCV 2022): both towers, video-specific prompting, similarity.

Suffixes of tensor names: B videos, T frames, F = B T, N patches, L = N + 1 tokens of a frame (class token first),
D width of the vision tower, K labels, E embedding size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .config import XCLIPConfig, variant
from .inference.cuda_graphs import GraphedVideoTower
from .kernels.linear import linear
from .nn.assembly import parts_of
from .nn.checks import check_features, check_video
from .nn.features import VideoFeatures
from .nn.layers import WithoutInit
from .nn.mit import MultiFrameIntegration
from .nn.parts import apply_linear, layer_norm
from .nn.prompt import VideoSpecificPrompt, plain_logits
from .nn.swin import SwinTower
from .nn.text import TextEncoder
from .nn.vit import VisionTower
from .text.templates import TEMPLATES, fill
from .text.tokenizer import tokenize
from .weights import checkpoint, hub

logger = logging.getLogger("xclip_fast")


class XCLIP(nn.Module):
    """X-CLIP with random weights. ``XCLIP.from_pretrained`` loads weights.

    Parts that the config leaves out (see the ablations of ``XCLIPConfig``) are None.

    Args:
        config: the shape, such as ``VARIANTS["B/16-8f"]``, or the name of a variant.
    """

    visual: VisionTower | SwinTower
    text: TextEncoder | None
    mit: MultiFrameIntegration | None
    prompts_visual_ln: nn.LayerNorm
    prompts_visual_proj: nn.Parameter
    prompts_generator: VideoSpecificPrompt | None
    prompts_vectors: nn.Parameter | None
    head: nn.Linear | None
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None

    def __init__(self, config: XCLIPConfig | str) -> None:
        super().__init__()
        config = variant(config) if isinstance(config, str) else config
        if not isinstance(config, XCLIPConfig):
            raise TypeError(f"config is a {type(config).__name__}; an XCLIPConfig or a variant's name wanted")
        self.config = config
        for name, part in parts_of(config).items():
            setattr(self, name, part)
        self.checked_range = False  # of a video on a GPU, by check_video
        self._graphed: dict[tuple[int, int], GraphedVideoTower] = {}

    def forward(self, video: Tensor, text: Tensor | str | Sequence[str] | None = None) -> Tensor:
        """Logits of every label for every video.

        Args:
            video: as for ``encode_video``.
            text: as for ``encode_text``. None for a model with a linear head (``num_classes``).

        Returns:
            (B, K), float32 (or float64): exp(logit_scale) cos(v, c_hat), equation 3, plus the ``logit_bias`` of models
            that have one; or the head's (B, num_classes).
        """
        if self.head is None and text is None:
            raise TypeError("no text given; labels or their tokens wanted (a model with num_classes takes none)")
        return self.similarity(self.encode_video(video), None if text is None else self.encode_text(text))

    def encode_video(self, video: Tensor, patches: bool = True) -> VideoFeatures:
        """Videos to features (equations 4 to 9).

        Args:
            video: uint8 (B, T, H, W, 3) as decoded, or normalized float (B, T, 3, H, W); H = W = the image size.
                For another T than the config's, the temporal embedding is interpolated, which is logged once.
            patches: compute the patch features, which ``similarity`` wants if the model has video-specific prompts.
                Without them the last block of a ViT computes class tokens alone after its attention.

        Returns:
            video features (B, E) and patch features, averaged over the frames (B, N, E).

        Raises:
            ValueError: if the video has another shape or dtype.
        """
        check_video(self, video)
        batch, frames = video.shape[:2]
        patches = patches and self.prompts_generator is not None
        with kernels.cpu.workspace():
            frame_FD, patches_FND = self.visual(video.flatten(0, 1), frames, patches)
        h_FE = linear(frame_FD, self.visual.proj.T)
        h_BTE = h_FE.unflatten(0, (batch, frames))
        video_BE = h_BTE.mean(1) if self.mit is None else self.mit(h_BTE)
        if not patches:
            return VideoFeatures(video_BE, patches_FND.new_empty(batch, 0, self.config.embed_dim))
        z_FND = layer_norm(self.prompts_visual_ln, patches_FND)
        # the projection is linear, so it is applied once to the mean
        z_BND = z_FND.unflatten(0, (batch, frames)).mean(1)
        return VideoFeatures(video_BE, linear(z_BND, self.prompts_visual_proj.T))

    def encode_text(self, text: Tensor | str | Sequence[str]) -> Tensor:
        """Labels to features (section 3.3).

        Args:
            text: K strings, one string, or integer tokens (K, any length up to the context) from ``tokenize``.
                ``torch.compile`` and ``torch.export`` take tokens only.

        Returns:
            (K, E). If the text encoder is frozen or gradients are off, a label set is encoded once and cached. Call
            ``model.text.forget()`` after editing weights through ``.data``; other changes are noticed.
        """
        if self.text is None:
            raise ValueError(
                f"this model has a linear head for {self.config.num_classes} classes and no text encoder: call "
                "model(video), or take a config with num_classes=None"
            )
        if not isinstance(text, Tensor):
            if torch.compiler.is_compiling():
                raise TypeError("strings cannot be compiled or exported: pass xclip_fast.tokenize(labels) instead")
            text = tokenize(text, self.config.label_tokens)
        return self.text(text, self.prompts_vectors)

    def encode_text_ensemble(self, labels: str | Sequence[str], templates: Sequence[str] = TEMPLATES) -> Tensor:
        """Labels to the mean of their normalized features over sentences (the ensemble of Table 9).

        Args:
            labels: K strings, or one. templates: sentences with ``{}`` in the label's place.

        Returns:
            (K, E), for ``similarity`` of a model with ``prompt="none"``. Cached as in ``encode_text``.
        """
        labels = [labels] if isinstance(labels, str) else list(labels)
        features = self.encode_text(fill(labels, templates))
        return F.normalize(features, dim=-1).unflatten(0, (len(labels), -1)).mean(1)

    def similarity(self, video_features: VideoFeatures, text_features: Tensor | None = None) -> Tensor:
        """Prompted cosine similarity (equations 10 and 3), or the logits of the linear head of Table 8.

        Args:
            video_features: of B videos, from ``encode_video``.
            text_features: (K, E), from ``encode_text``; None for a model with ``num_classes``.

        Returns:
            (B, K), float32 (or float64).

        Raises:
            TypeError, ValueError: if the features have another type or shape.
        """
        check_features(self, video_features, text_features)
        video_BE = video_features.video
        if self.head is not None:
            logits = apply_linear("head", self.head, video_BE)
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        assert text_features is not None
        if self.prompts_generator is None:
            logits_BK = plain_logits(video_BE, text_features, self.logit_scale)
        else:
            c_hat_BKE = text_features + self.prompts_generator(text_features, video_features.patches)
            logits_BK = kernels.cosine_logits(video_BE, c_hat_BKE, self.logit_scale)
        return logits_BK if self.logit_bias is None else logits_BK + self.logit_bias

    def graphed(self, batch: int = 1, frames: int | None = None) -> GraphedVideoTower:
        """Returns an ``encode_video`` for small batches on a GPU. It replays a CUDA graph.

            graphed = model.graphed(batch=1)
            with torch.inference_mode():
                features = graphed(video)
                logits = graphed.logits(video, model.encode_text(labels))

        Args:
            batch: the largest number of videos in a call. frames: T of each (default: the config's).

        Returns:
            a callable that takes videos and returns features as ``encode_video``, for inference only. Its ``logits``
            has ``similarity`` in the graph too. The same sizes give the same object. ``GraphedVideoTower`` says which
            changes it notices, ``clear_graphs`` what it keeps.

        Raises:
            ValueError: if a size is not positive, or the model is not on a CUDA device.
        """
        sizes = batch, self.config.num_frames if frames is None else frames
        if sizes not in self._graphed:
            self._graphed[sizes] = GraphedVideoTower(self, *sizes)
        return self._graphed[sizes]

    def clear_graphs(self) -> None:
        """Frees all CUDA graphs of this model. Objects from ``graphed`` capture again at their next call."""
        for graphed in self._graphed.values():
            graphed.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphed": {}}  # a copy of the model captures its own

    def checkpoint_activations(self, enabled: bool = True) -> XCLIP:
        """Stores only the input of each block for backward, which runs the block again. It holds for both towers.

        A training step takes about a third more computation and a fraction of the memory. Results and random draws
        (drop path) stay the same. Without gradients nothing changes.

        Returns:
            the model itself.
        """
        self.visual.recompute = enabled
        if self.text is not None:
            self.text.recompute = enabled
        return self

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        config: XCLIPConfig | str | None = None,
        clip: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> XCLIP:
        """A model with the weights of ``path``, in evaluation mode.

        Args:
            path: "org/name" on the Hugging Face Hub, or a path. The content of the file decides its layout: our own
                folder or file (safetensors and JSON), a Hugging Face X-CLIP folder, a VideoX ``.pth``, a ViFi-CLIP or
                ActionCLIP file. An image CLIP (OpenAI, open_clip, Hugging Face) or a ViT (timm) starts an X-CLIP, as
                in ``expand_from``.
            config: the shape, if the checkpoint does not define it. An image CLIP defines neither frames nor prompt
                layers; the default has 8 frames. An ablated config starts from an image CLIP only.
            clip: for a ViFi-CLIP, whose file lacks the token embedding: the image CLIP that it started from.
            device, dtype: of the parameters (default: the CPU and the checkpoint's dtype).

        Raises:
            checkpoint.CheckpointError: if the file cannot be read or is not such a checkpoint, or if keys are missing,
                unexpected or misshapen. All such keys are listed.
        """
        config = variant(config) if isinstance(config, str) else config
        found = checkpoint.read(path, config, clip=clip, check=False)
        if found.complete:
            with torch.device("meta"), WithoutInit():
                model = cls(found.config)
            checkpoint.check_keys(model.state_dict(), found.state, path)
            model.load_state_dict(found.state, assign=True)
        else:
            model = cls(found.config).expand_from(found)
            if new := sorted({name.split(".")[0] for name in model.state_dict() if name not in found.state}):
                kind = "image CLIP" if found.kind == "clip" else "image ViT"
                logger.warning(
                    "%s is an %s. Parameters missing from it are randomly initialized: %s", path, kind, ", ".join(new)
                )
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, layout: checkpoint.Layout = "xclip_fast", overwrite: bool = False
    ) -> None:
        """Writes weights and config into ``folder``, atomically.

        Args:
            folder: created if it does not exist. Its other files stay.
            layout: ``"huggingface"`` for ``transformers.XCLIPModel.from_pretrained``.
            overwrite: replace an existing checkpoint.

        Raises:
            FileExistsError: if the folder holds a checkpoint and ``overwrite`` is not set.
        """
        checkpoint.write(self.state_dict(), self.config, folder, layout=layout, overwrite=overwrite)

    def push_to_hub(self, name: str, *, layout: checkpoint.Layout = "xclip_fast", **options: Any) -> str:
        """Uploads weights and config to a repository of the Hugging Face Hub. A missing repository is created.

        Args:
            name: "org/name". layout: as for ``save_pretrained``.
            options: ``private``, ``token`` and ``message`` (of the commit).

        Returns:
            the address of the commit.

        Raises:
            ImportError: without the package huggingface_hub.
            OSError: if the Hub refuses the upload or cannot be reached.
        """
        return hub.upload(lambda folder: self.save_pretrained(folder, layout=layout), name, **options)

    def expand_from(self, clip: checkpoint.Start, part: checkpoint.Part = "both") -> XCLIP:
        """Copies the weights of an image CLIP (section 3.2): IFA, FFN and text tower. CFA, MIT and prompts stay new.

        Args:
            clip: a path, a state dict, or a module of OpenAI's, open_clip's or Hugging Face's CLIP. Or one of timm's
                ViTs, such as ``vit_base_patch16_224``, which gives the vision tower without projection (Table 10).
                Position embeddings of another grid are interpolated. A model with ``num_classes`` takes no text tower.
            part: the tower to start. The other one stays as it is.

        Returns:
            the model itself.

        Raises:
            checkpoint.CheckpointError: if widths, layers or vocabulary differ.
        """
        checkpoint.expand(self, clip, part)
        return self
