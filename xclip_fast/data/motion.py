"""Generated video clips whose classes differ only in the order of their frames.

The classes come in pairs, and one class of a pair is the other played backwards. With the same parameters both have the
same frames, so a model that ignores the order of the frames cannot tell the two apart better than chance. Each clip
depends only on (label, seed, index).
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from ..files import full_disk, locked, replaced
from .sampling import sample_rng

CLASSES = (
    "moving right",
    "moving left",
    "moving down",
    "moving up",
    "turning clockwise",
    "turning counterclockwise",
    "growing",
    "shrinking",
    "red then blue",
    "blue then red",
)
"""The labels. Each odd one is the one before it, played backwards."""

_RED, _BLUE = (225.0, 40.0, 40.0), (40.0, 60.0, 230.0)


def render(
    label: str, seed: int, index: int = 0, *, frames: int = 32, size: tuple[int, int] = (128, 128)
) -> np.ndarray:
    """A clip: uint8 RGB (frames, height, width, 3). `size` is (height, width), at least 16 pixels each.

    The two labels of a pair give the same frames in opposite order for the same (seed, index). Raises ValueError for an
    unknown label, no frames, or a smaller size.
    """
    if label not in CLASSES:
        raise ValueError(f"unknown label {label!r}; the classes are: {', '.join(CLASSES)}")
    if frames < 1 or min(size) < 16:
        raise ValueError(f"a clip needs at least 1 frame and 16 pixels a side; got {frames} frames of {size}")
    pair, backwards = divmod(CLASSES.index(label), 2)
    kind = CLASSES[2 * pair]
    rng = sample_rng(seed, pair, index)
    height, width = size
    unit = min(size)
    y_HW, x_HW = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5

    # Every clip draws the same numbers in the same order, whatever its kind.
    background_HWC = _background(rng, height, width)
    color = np.array(rng.uniform((130, 130, 130), (255, 255, 255)))
    shape = int(rng.integers(3))
    radius = rng.uniform(0.1, 0.18) * unit
    start, end, across, span = rng.uniform((0, 0.75, 0, np.pi / 2), (0.25, 1, 1, 3 * np.pi / 2))
    switch, angle = rng.uniform((0.3, 0), (0.7, 2 * np.pi))

    def inside(fraction: float, length: int) -> float:
        """The coordinate at a fraction from 0 to 1 that keeps the whole shape in the picture."""
        return radius + fraction * (length - 2 * radius)

    clip = np.empty((frames, height, width, 3), np.uint8)
    for frame, phase in enumerate(np.linspace(0, 1, frames)):
        along = start + (end - start) * phase
        x, y, r, ink = inside(across, width), inside(across, height), radius, color
        if kind == "moving right":
            x = inside(along, width)
        elif kind == "moving down":
            y = inside(along, height)
        elif kind == "growing":
            x, y, r = width / 2, height / 2, unit * (0.08 + 0.36 * along)
        elif kind == "red then blue":
            ink = np.array(_RED if phase < switch else _BLUE)
        if kind == "turning clockwise":  # a clock hand; y points down, so a growing angle turns clockwise
            turn = angle + span * phase
            distance_HW = _to_hand(x_HW - width / 2, y_HW - height / 2, turn, 0.42 * unit) - 0.06 * unit
        else:
            distance_HW = _to_shape(x_HW - x, y_HW - y, shape) - r
        cover_HW1 = np.clip(0.5 - distance_HW, 0, 1)[..., None]  # edges are smooth over one pixel
        clip[frame] = np.rint(background_HWC + cover_HW1 * (ink - background_HWC))
    return clip[::-1].copy() if backwards else clip


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A dark, smooth background: 5 x 5 random colors, interpolated. float (height, width, 3)."""
    grid = rng.uniform(10, 90, (5, 5, 3))
    for axis, length in ((0, height), (1, width)):
        place = np.linspace(0, 4, length)
        low = np.minimum(place.astype(int), 3)
        part = np.expand_dims(place - low, (1, 2) if axis == 0 else (0, 2))
        grid = np.take(grid, low, axis) * (1 - part) + np.take(grid, low + 1, axis) * part
    return grid


def _to_shape(x_HW: np.ndarray, y_HW: np.ndarray, shape: int) -> np.ndarray:
    """Distance from the center of a disc, a square or a diamond, in the norm whose ball has that shape."""
    if shape == 0:
        return np.hypot(x_HW, y_HW)
    return np.maximum(abs(x_HW), abs(y_HW)) if shape == 1 else abs(x_HW) + abs(y_HW)


def _to_hand(x_HW: np.ndarray, y_HW: np.ndarray, angle: float, length: float) -> np.ndarray:
    """Distance from the segment that starts at the origin and points to `angle`."""
    dx, dy = np.cos(angle), np.sin(angle)
    reach_HW = np.clip(x_HW * dx + y_HW * dy, 0, length)
    return np.hypot(x_HW - reach_HW * dx, y_HW - reach_HW * dy)


def write_clip(
    path: str | os.PathLike[str],
    frames: np.ndarray | Sequence[np.ndarray],
    fps: int = 25,
    codec: str = "libx264",
    *,
    pix_fmt: str = "yuv420p",
    times: Sequence[float] | None = None,
    **options: str | int | float,
) -> None:
    """Encode uint8 RGB frames (T, H, W, 3) as a video file; the suffix gives the container.

    `times` gives each frame's time in seconds (variable frame rate); `options` go to the encoder (g=12, bf=0, crf=18).
    One thread, so the same frames give the same bytes; only x264's slower presets than ultrafast give others now and
    then on a CPU with AVX-512. The file appears whole or not at all. Raises ValueError for no frames, or for odd sides
    where the codec and pixel format cannot have them.
    """
    path = Path(path)
    if len(frames) == 0:
        raise ValueError(f"{path}: no frames to write")
    if times is not None and len(times) != len(frames):
        raise ValueError(f"{path}: {len(times)} times for {len(frames)} frames")
    height, width = frames[0].shape[:2]
    if codec in ("libx264", "libx265") and "420" in pix_fmt and (height % 2 or width % 2):
        raise ValueError(f"{path}: {codec} needs even sides for {pix_fmt}, got {width}x{height}; use pix_fmt='yuv444p'")
    with replaced(path) as part, av.open(part, "w") as container:
        stream = container.add_stream(codec, rate=fps, options={key: str(value) for key, value in options.items()})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.thread_count = 1
        unit = stream.codec_context.time_base = Fraction(1, fps if times is None else 1000)
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), "rgb24")
            frame.time_base = unit
            frame.pts = number if times is None else round(1000 * times[number])
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_dataset(
    folder: str | os.PathLike[str],
    clips_per_class: int,
    seed: int = 0,
    *,
    frames: int = 32,
    size: tuple[int, int] = (128, 128),
    progress: Callable[[int, int], None] | None = None,
    **options: str | int | float,
) -> None:
    """Write `folder/<label with underscores>/<index>.mp4` for every class and index.

    A file that is there already with the same content stays as it is; with other content it raises FileExistsError. So
    it does if another process is writing into the folder. `progress(done, total)` is called after each clip; `options`
    go to the encoder, H.264 with the preset ultrafast if they name no other.
    """
    if options.get("codec", "libx264") == "libx264":
        options = {"preset": "ultrafast", **options}
    for number, label in enumerate(CLASSES):
        home = Path(folder) / label.replace(" ", "_")
        home.mkdir(parents=True, exist_ok=True)
        new = home / ".new.mp4"
        with full_disk(home), locked(home / ".writing", home):
            for index in range(clips_per_class):
                path = home / f"{index:05d}.mp4"
                write_clip(new, render(label, seed, index, frames=frames, size=size), **options)  # type: ignore[arg-type]
                try:
                    if not path.exists():
                        os.replace(new, path)
                    elif not filecmp.cmp(new, path, shallow=False):
                        raise FileExistsError(f"{path}: exists with other content; delete it or choose another folder")
                finally:
                    new.unlink(missing_ok=True)
                if progress:
                    progress(number * clips_per_class + index + 1, len(CLASSES) * clips_per_class)
