"""Mixup, cutmix and label smoothing of a batch, on its device.

The random numbers depend on the key alone (NumPy's Philox, on the host), so there is no state to save.
Mixup: Zhang et al., ICLR 2018. Cutmix: Yun et al., ICCV 2019. The defaults are those of the X-CLIP paper's supplement.
B videos, T frames, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MixingConfig

_STREAM = 0x6D6978  # other numbers than the sampler's, which has the same seed


class Draw(NamedTuple):
    """How a batch is mixed with the same batch in reverse order."""

    share: float  # weight of the own label; 1: not mixed
    box: tuple[int, int, int, int] | None  # (left, top, right, bottom) that cutmix pastes; None: mixup


def draw(config: MixingConfig, size: tuple[int, int], key: tuple[int, int, int]) -> Draw:
    """How the batch of ``key`` = (seed, step, part) is mixed. ``size``: (height, width)."""
    seed, step, part = key
    counter = np.array([0, 0, part, step], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, _STREAM], np.uint64), counter=counter))
    mixed, cut = rng.random(2)
    if mixed >= config.probability or (config.mixup == 0 and config.cutmix == 0):
        return Draw(1.0, None)
    if config.cutmix == 0 or (config.mixup > 0 and cut >= config.switch):
        return Draw(float(rng.beta(config.mixup, config.mixup)), None)
    share = rng.beta(config.cutmix, config.cutmix)
    height, width = size
    y, x = int(rng.integers(height)), int(rng.integers(width))
    half_height, half_width = (int(side * np.sqrt(1 - share) / 2) for side in size)
    left, right = max(0, x - half_width), min(width, x + half_width)
    top, bottom = max(0, y - half_height), min(height, y + half_height)
    return Draw(1 - (right - left) * (bottom - top) / (height * width), (left, top, right, bottom))


def mix(
    frames: Tensor, labels_B: Tensor, classes: int, config: MixingConfig, key: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Mixes the videos with those of the batch in reverse order. Returns them with their targets.

    Args:
        frames: uint8 (B, T, H, W, 3). B may be 0. Mixup rounds to whole levels, so that the frames stay uint8.
        labels_B: int64 (B,), each in [0, classes).
        key: (seed, step, part of the step); the same key gives the same result.

    Returns:
        frames of the same shape and dtype (the input is not written to), and float32 targets (B, K) that sum to 1.
    """
    share, box = draw(config, (frames.shape[2], frames.shape[3]), key)
    smooth = config.label_smoothing
    targets_BK = F.one_hot(labels_B, classes).float() * (1 - smooth) + smooth / classes
    if share == 1.0:
        return frames, targets_BK
    if box is None:
        frames = torch.lerp(frames.flip(0).float(), frames.float(), share).round_().to(torch.uint8)
    else:
        left, top, right, bottom = box
        pasted = frames.flip(0)[:, :, top:bottom, left:right]
        frames = frames.clone()
        frames[:, :, top:bottom, left:right] = pasted
    return frames, torch.lerp(targets_BK.flip(0), targets_BK, share)
