"""What the video tower gives for B videos of N patches; E is the embedding size."""

from typing import NamedTuple

from torch import Tensor


class VideoFeatures(NamedTuple):
    """What the video tower knows of B videos."""

    video: Tensor  # (B, E)
    patches: Tensor  # (B, N, E), averaged over the frames; (B, 0, E) where no prompt asks for them
