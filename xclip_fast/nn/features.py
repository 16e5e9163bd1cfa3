"""The result of the video tower for B videos of N patches; E is the embedding size."""

from typing import NamedTuple

from torch import Tensor


class VideoFeatures(NamedTuple):
    """Features of B videos."""

    video: Tensor  # (B, E)
    patches: Tensor  # (B, N, E), averaged over the frames; (B, 0, E) if the model has no prompts or none were wanted
