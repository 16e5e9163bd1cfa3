"""Drop-in modules of X-CLIP, one short file each."""

from .cct import FastCCTBlock
from .mit import MultiFrameIntegration
from .prompt import VideoSpecificPrompt
from .text import TextEncoder

__all__ = ["FastCCTBlock", "MultiFrameIntegration", "TextEncoder", "VideoSpecificPrompt"]
