"""Whether an ``XCLIP`` takes the videos and features that it is given.

B videos, T frames, E embedding size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .features import VideoFeatures

LARGEST_PIXEL = 30.0  # of normalized videos; of unnormalized ones, 255


def check_features(model: Any, video_features: VideoFeatures, text_features: Tensor | None) -> None:
    """Raises TypeError or ValueError if the features are not of this ``XCLIP``, as ``similarity`` says."""
    E = model.config.embed_dim
    if not isinstance(video_features, VideoFeatures):
        raise TypeError(f"video_features is a {type(video_features).__name__}; the result of encode_video wanted")
    video_BE, patches_BNE = video_features
    if video_BE.dim() != 2 or video_BE.shape[1] != E:
        raise ValueError(f"video features of shape {tuple(video_BE.shape)} given; (B, {E}) wanted, of this model")
    if model.head is not None:
        if text_features is not None:
            raise ValueError("text features given, but this model has a linear head (num_classes): leave them out")
        return
    if not isinstance(text_features, Tensor):
        raise TypeError(f"text_features is a {type(text_features).__name__}; the result of encode_text wanted")
    if text_features.dim() != 2 or text_features.shape[1] != E or not text_features.is_floating_point():
        raise ValueError(
            f"text features of shape {tuple(text_features.shape)} {text_features.dtype} given; floating (K, {E}) "
            "wanted, of this model"
        )
    wanted = (video_BE.shape[0], model.config.vision.patches, E)
    if model.prompts_generator is not None and patches_BNE.shape != wanted:
        raise ValueError(
            f"patch features of shape {tuple(patches_BNE.shape)} given; {wanted} wanted, as encode_video of this model "
            "gives them with patches=True"
        )


def check_video(model: Any, video: Tensor) -> None:
    """Raises TypeError or ValueError if an ``XCLIP`` does not take the video, as ``encode_video`` says."""
    size = model.config.vision.image_size
    if not isinstance(video, Tensor):
        raise TypeError(f"video is a {type(video).__name__}; a torch.Tensor wanted (torch.from_numpy makes one)")
    if video.dtype == torch.uint8:
        wanted, right = "uint8 (B, T, H, W, 3)", video.dim() == 5 and video.shape[2:] == (size, size, 3)
    else:
        wanted = "float (B, T, 3, H, W), normalized"
        right = video.is_floating_point() and video.dim() == 5 and video.shape[2:] == (3, size, size)
    if not right or video.shape[1] == 0:
        raise ValueError(
            f"video of shape {tuple(video.shape)} {video.dtype} given; {wanted} with H = W = {size} and T >= 1 wanted"
        )
    if video.dtype != torch.uint8:
        _check_range(model, video)


def _check_range(model: Any, video: Tensor) -> None:
    """Refuses NaN and pixels from 0 to 255. On a GPU, where reading waits, only the first call is checked."""
    if type(video) is not Tensor or torch.compiler.is_compiling() or video.device.type not in ("cpu", "cuda"):
        return
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return  # a transform without values, or a mode that records the computation
    if video.numel() == 0:
        return
    if video.is_cuda:
        if model.checked_range or torch.cuda.is_current_stream_capturing():
            return
        model.checked_range = True
    least, most = (bound.item() for bound in torch.aminmax(video.detach()))
    if not -LARGEST_PIXEL <= least <= most <= LARGEST_PIXEL:
        raise ValueError(
            f"the video's values reach from {least:g} to {most:g}; normalized ones lie within about 3 of 0. Pass "
            "uint8 (B, T, H, W, 3) as decoded, or (video / 255 - mean) / std with the config's image_mean and "
            "image_std"
        )
