"""Config, model and processor of X-CLIP as classes of transformers, for its Auto classes (``register``)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import ModelOutput

from ..config import XCLIPConfig
from ..data.decode.decoder import decode
from ..data.remote import local_path
from ..data.transforms import TestTransform, apply
from ..files import read_json
from ..model import XCLIP
from ..nn.features import VideoFeatures
from ..text.tokenizer import tokenize
from ..weights import checkpoint
from ..weights.hub import locate
from ..weights.recipe import Trained
from .training import loss

Video = str | os.PathLike[str] | np.ndarray | Tensor | Sequence[Any]


class XCLIPFastConfig(PreTrainedConfig):
    """Our ``config.json`` as transformers reads it: the fields of ``XCLIPConfig``, under their names."""

    model_type = checkpoint.MODEL_TYPE

    def to_xclip(self) -> XCLIPConfig:
        names = [field.name for field in dataclasses.fields(XCLIPConfig)]
        return XCLIPConfig.from_dict({name: getattr(self, name) for name in names if hasattr(self, name)})


@dataclasses.dataclass
class XCLIPFastOutput(ModelOutput):
    """B videos, K texts. ``loss`` only with labels."""

    loss: Tensor | None = None
    logits_per_video: Tensor | None = None  # (B, K)
    logits_per_text: Tensor | None = None  # (K, B)
    video_embeds: Tensor | None = None  # (B, E)
    text_embeds: Tensor | None = None  # (K, E), without video-specific prompts


class XCLIPFastModel(PreTrainedModel):
    """``XCLIP`` (as ``self.xclip``) as a model of transformers."""

    config_class = XCLIPFastConfig
    base_model_prefix = "xclip"
    main_input_name = "pixel_values"
    input_modalities = ("video", "text")
    supports_gradient_checkpointing = False  # xclip.checkpoint_activations() is ours

    def __init__(self, config: XCLIPFastConfig) -> None:
        super().__init__(config)
        self.xclip = XCLIP(config.to_xclip())
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """XCLIP has initialized itself."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> XCLIPFastOutput:
        """Args:
        pixel_values: as for ``XCLIP.encode_video``: uint8 (B, T, H, W, 3), or normalized (B, T, 3, H, W).
        input_ids: (K, L) tokens of the texts, which end with the end-of-text token; None for a linear head.
        attention_mask: ignored, because tokens after the end-of-text token do not matter.
        labels: (B,), the number of each video's text, for a loss.
        """
        video = self.xclip.encode_video(pixel_values)
        text = None if input_ids is None else self.xclip.encode_text(input_ids)
        logits = self.xclip.similarity(video, text)
        return XCLIPFastOutput(
            loss=None
            if labels is None
            else loss({"logits_per_video": logits}, labels, kwargs.get("num_items_in_batch")),
            logits_per_video=logits,
            logits_per_text=logits.T,
            video_embeds=video.video,
            text_embeds=text,
        )

    def get_video_features(self, pixel_values: Tensor) -> VideoFeatures:
        """Of B videos: features (B, E) and patch features (B, N, E)."""
        return self.xclip.encode_video(pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Of K texts: (K, E)."""
        return self.xclip.encode_text(input_ids)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *model_args: Any,
        config: XCLIPFastConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> XCLIPFastModel:
        """As in transformers. The weights may have any layout that ``XCLIP.from_pretrained`` reads."""
        if pretrained_model_name_or_path is None or "state_dict" in kwargs:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        place = locate(pretrained_model_name_or_path, checkpoint.WEIGHTS, revision)
        found = checkpoint.read(place)
        state = {f"xclip.{name}": tensor for name, tensor in found.state.items()}
        config = XCLIPFastConfig(**found.config.to_dict())
        model = super().from_pretrained(None, config=config, state_dict=state, **kwargs)
        model.name_or_path = model.config._name_or_path = str(pretrained_model_name_or_path)
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the files of ``XCLIP.save_pretrained``. It replaces existing files, as models of transformers do."""
        if not is_main_process:
            return
        state = self.state_dict() if state_dict is None else state_dict
        ours = {name.removeprefix("xclip."): tensor for name, tensor in state.items()}
        checkpoint.write(ours, self.xclip.config, save_directory, overwrite=True)
        if kwargs.get("push_to_hub"):
            self.xclip.push_to_hub(kwargs.get("repo_id") or Path(save_directory).name, token=kwargs.get("token"))


class XCLIPFastProcessor:
    """Turns videos and texts into the model's inputs. Its settings are in the model's folder."""

    def __init__(self, config: XCLIPConfig, trained: Trained | None = None) -> None:
        self.config = config
        self.trained = trained or Trained()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], revision: str | None = None, **kwargs: Any
    ) -> XCLIPFastProcessor:
        folder = locate(pretrained_model_name_or_path, revision=revision)
        return cls(checkpoint.own_config(read_json(folder / "config.json")), Trained.read(folder))

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Does nothing: the model's ``save_pretrained`` writes the settings."""

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        videos: Video | None = None,
        return_tensors: str = "pt",
        num_frames: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Args:
            text: K texts, or one.
            videos: one, or a list: a path or an address of a video file, or its frames as uint8 (T, H, W, 3).
            num_frames: frames that are sampled (default: as in training).

        Returns:
            ``pixel_values`` uint8 (B, T, S, S, 3) of the videos and ``input_ids`` int64 (K, L) of the texts.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors is {return_tensors!r}; only torch's tensors ('pt') are supported")
        found: dict[str, Tensor] = {}
        if videos is not None:
            several = isinstance(videos, list | tuple)
            each: Any = videos if several else [videos]
            found["pixel_values"] = torch.stack([self.frames(video, num_frames) for video in each])
        if text is not None:
            found["input_ids"] = tokenize(text if isinstance(text, str) else list(text), self.config.label_tokens)
        return BatchFeature(found)

    def frames(self, video: Any, num_frames: int | None = None) -> Tensor:
        """The sampled and cropped frames of one video: uint8 (T, S, S, 3)."""
        size = self.config.vision.image_size
        chosen = self.trained.choose(frames=num_frames)
        frames, sampling, stride = chosen["frames"] or self.config.num_frames, chosen["sampling"], chosen["stride"]
        if isinstance(video, str | os.PathLike):
            with local_path(os.fspath(video)) as path:
                return decode(path, frames, sampling, size=size, stride=stride)
        pictures = np.asarray(video)
        if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
            raise ValueError(f"frames {pictures.dtype} {pictures.shape} given; uint8 (T, H, W, 3) wanted, or a path")
        total, height, width, _ = pictures.shape
        (view,) = TestTransform(frames, size, sampling=sampling, stride=stride).views(total, width, height)
        return torch.from_numpy(apply(view, pictures[view.frames]))
