"""``accelerate``: another library's X-CLIP or CLIP computes its blocks with our kernels."""

from .blocks import accelerate

__all__ = ["accelerate"]
