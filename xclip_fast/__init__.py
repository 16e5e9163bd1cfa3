"""X-CLIP video recognition, exact and as fast as the hardware allows."""

from .accelerate import accelerate
from .config import VARIANTS, TextConfig, VisionConfig, XCLIPConfig
from .kernels import backend
from .model import XCLIP, VideoFeatures
from .nn import FastCCTBlock
from .tokenizer import tokenize

__all__ = [
    "VARIANTS",
    "XCLIP",
    "FastCCTBlock",
    "TextConfig",
    "VideoFeatures",
    "VisionConfig",
    "XCLIPConfig",
    "accelerate",
    "backend",
    "tokenize",
]
__version__ = "0.1.0"
