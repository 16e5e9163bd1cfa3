"""X-CLIP video recognition, exact and as fast as the hardware allows."""

from typing import TYPE_CHECKING, Any

from .accelerate import accelerate
from .config import VARIANTS, TextConfig, VisionConfig, XCLIPConfig
from .kernels import backend
from .model import XCLIP, VideoFeatures
from .nn import FastCCTBlock
from .tokenizer import tokenize

if TYPE_CHECKING:
    from .data.decode import decode, decode_windows

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
    "decode",
    "decode_windows",
    "tokenize",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports what needs a video decoder when it is first asked for."""
    if name in ("decode", "decode_windows"):
        from .data import decode as decoding

        return getattr(decoding, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
