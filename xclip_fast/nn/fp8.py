"""The float8 copies of a block's three large weights. ``XCLIP.quantize`` makes them; docs/kernels.md derives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import kernels


class Fp8Weights(nn.Module):
    """IFA's packed projection and the FFN's two layers in e4m3 with a scale for each output channel, D width.

    They stay e4m3 and float32 if the model is moved to another dtype. They are not in its state dict, because they are
    made from weights that are.

    Args:
        qkv: (3D, D). fc: (4D, D). projection: (D, 4D). Floating.
        hidden_scale: the static scale of quick_gelu's output.

    Raises:
        ValueError: if a weight holds NaN or infinity.
    """

    qkv: Tensor
    qkv_scale: Tensor
    fc: Tensor
    fc_scale: Tensor
    projection: Tensor
    projection_scale: Tensor  # times hidden_scale

    def __init__(self, qkv: Tensor, fc: Tensor, projection: Tensor, hidden_scale: float) -> None:
        super().__init__()
        self.hidden_scale = hidden_scale
        for name, weight in (("qkv", qkv), ("fc", fc), ("projection", projection)):
            weight8, scale = kernels.quantize_weight(weight)
            if not scale.isfinite().all():
                raise ValueError(f"the weight {name} holds NaN or infinity: it cannot be quantized")
            self.register_buffer(name, weight8, persistent=False)
            self.register_buffer(f"{name}_scale", scale, persistent=False)
        self.projection_scale *= hidden_scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Weights:
        """``to``, ``cuda``, ``half`` and the like change the device, not the dtypes."""
        buffers: Any = self._buffers
        for name, buffer in buffers.items():
            moved = fn(buffer)
            buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self
