"""X-CLIP video recognition, exact and as fast as the hardware allows."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceleration import accelerate as accelerate
    from .config import VARIANTS as VARIANTS
    from .config import SwinConfig as SwinConfig
    from .config import TextConfig as TextConfig
    from .config import VisionConfig as VisionConfig
    from .config import XCLIPConfig as XCLIPConfig
    from .data.decode.decoder import decode as decode
    from .data.decode.windows import decode_windows as decode_windows
    from .kernels import backend as backend
    from .model import XCLIP as XCLIP
    from .nn import FastCCTBlock as FastCCTBlock
    from .nn import VideoFeatures as VideoFeatures
    from .search import Index as Index
    from .text.tokenizer import tokenize as tokenize

# Where each public name lives. It is imported at its first use, so that `xclip-fast --help` does not wait for torch.
_HOMES = {
    "VARIANTS": "config",
    "XCLIP": "model",
    "FastCCTBlock": "nn",
    "Index": "search",
    "SwinConfig": "config",
    "TextConfig": "config",
    "VideoFeatures": "nn",
    "VisionConfig": "config",
    "XCLIPConfig": "config",
    "accelerate": "acceleration",
    "backend": "kernels",
    "decode": "data.decode.decoder",
    "decode_windows": "data.decode.windows",
    "tokenize": "text.tokenizer",
}
__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
