"""The video files that decode.py decodes: generated scenes or frames of real videos, with chosen keyframe distances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from xclip_fast.data.motion import write_clip
from xclip_fast.data.transcode.transcoder import Purpose, transcode

# In place of the number of frames between keyframes: copies that transcode makes of the last kind before them.
COPY, TRAINING = "copy", "training"  # for any use; for training, where every frame is a keyframe
COPIES: dict[str, Purpose] = {COPY: "any", TRAINING: "training"}


def render(seed: int, frames: int, size: tuple[int, int]) -> list[np.ndarray]:
    """A scene that compresses about as real footage does: uint8 frames (height, width, 3).

    A slow camera moves over a textured background, textured discs cross it, and each frame has its own grain.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    ground, *skins = (texture(rng, 2 * height, 2 * width) for _ in range(3))
    y_HW, x_HW = np.mgrid[0:height, 0:width]
    turns, phases = rng.uniform(0.5, 1, 2), rng.uniform(0, 2 * np.pi, (2, 2))
    clip = []
    for now in range(frames):
        camera = [(1 + math.sin(now * turn / 150)) / 2 for turn in turns]
        picture = window(ground, camera[0] * (height - 1), camera[1] * (width - 1), size)
        for (a, b), skin in zip(phases, skins, strict=True):
            y = (1 + math.sin(now / 60 + a)) / 2 * (height - 1)
            x = (1 + math.cos(now / 60 + b)) / 2 * (width - 1)
            inside = (x_HW - x) ** 2 + (y_HW - y) ** 2 < (height / 7) ** 2
            picture[inside] = window(skin, height - 1 - y, width - 1 - x, size)[inside]
        grain = rng.normal(0, 1.5, (height, width, 1))
        clip.append(np.clip(picture + grain, 0, 255).astype(np.uint8))
    return clip


def window(picture: np.ndarray, top: float, left: float, size: tuple[int, int]) -> np.ndarray:
    """The part of this size at a fractional corner (bilinear)."""
    rows = slice(int(top), int(top) + size[0] + 1)
    columns = slice(int(left), int(left) + size[1] + 1)
    part = picture[rows, columns]
    part = part[:-1] + np.float32(top % 1) * (part[1:] - part[:-1])
    return part[:, :-1] + np.float32(left % 1) * (part[:, 1:] - part[:, :-1])


def texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise with a spectrum slightly steeper than that of natural pictures: float32 (height, width, 3)."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width))) / np.maximum(frequency, 1 / width) ** 1.25
    noise = np.fft.irfft2(spectrum, (height, width)).transpose(1, 2, 0)
    gray = noise[..., :1] + 0.4 * noise[..., 1:2] * np.array([1, -1, 0.5])  # color varies less than brightness
    return np.clip(120 + 45 * gray / gray.std(), 0, 255).astype(np.float32)


def footage(path: Path, frames: int, size: tuple[int, int]) -> list[np.ndarray]:
    """The middle of the video's frames, played forward and backward if it is short."""
    height, width = size
    clip = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            scale = max(height / frame.height, width / frame.width)
            scaled = frame.to_ndarray(
                width=round(scale * frame.width), height=round(scale * frame.height), format="rgb24"
            )
            top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
            clip.append(np.ascontiguousarray(scaled[top : top + height, left : left + width]))
            if len(clip) == frames:
                break
    turned = clip + clip[::-1]
    return (turned * (frames // len(turned) + 1))[:frames]


def write_clips(
    folder: Path, keyframes: Sequence[int | str], frames: int, size: tuple[int, int], real: Path | None = None
) -> dict[int | str, Path]:
    """Writes a clip of each kind in this (height, width): a generated scene, or a part of the video `real`."""
    clip = footage(real, frames, size) if real else render(0, frames, size)
    files: dict[int | str, Path] = {}
    for every in [kind for kind in keyframes if isinstance(kind, int)] or [250]:
        files[every] = folder / f"{every}.mp4"
        write_clip(files[every], clip, g=every, preset="medium")
    last = list(files.values())[-1]
    for copy, purpose in COPIES.items():
        if copy in keyframes:
            summary = transcode(last, folder / copy, purpose=purpose)
            if summary.failed:
                raise RuntimeError(f"transcode failed: {summary.failed}")
            files[copy] = folder / copy / last.name
    return {kind: files[kind] for kind in keyframes}
