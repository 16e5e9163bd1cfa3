"""Drop-in modules of X-CLIP, one short file each."""

from .cct import FastCCTBlock
from .features import VideoFeatures
from .mit import MultiFrameIntegration
from .prompt import VideoSpecificPrompt
from .text import TextEncoder

__all__ = ["FastCCTBlock", "MultiFrameIntegration", "TextEncoder", "VideoFeatures", "VideoSpecificPrompt"]
