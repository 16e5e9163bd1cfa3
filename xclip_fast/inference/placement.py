"""The precision of a model on a device."""

from __future__ import annotations

import torch


def automatic_dtype(device: torch.device) -> torch.dtype:
    """The half precision that the device has matrix instructions for, bfloat16 first; otherwise float32."""
    if device.type == "cpu":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
