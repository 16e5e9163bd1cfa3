"""Views: the frames, the part of the picture and the colors that a model sees.

A `View` is complete: frame numbers, a box of whole pixels, a size, a mirror, a color matrix. A transform draws views
from the frame count and size of a video alone, so views are drawn before the file is opened. `apply` executes a view on
decoded frames on the CPU. The GPU pipeline executes the same views.

A test view is that of the released code: the whole frame is resized, then cropped. Training follows the released X-CLIP
recipe (short side 256, multi-scale crop, flip, color jitter, gray) with two changes. Its two resizes are one box and
one resize. The jitter is one linear map for all frames of a video (contrast turns about mid gray, hue in YIQ); the
released code draws it anew for every frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np

from ..schema import Count, NotNegative, Range, Share, check
from .sampling import Sampling, frame_indices

Box = tuple[int, int, int, int]
"""(left, top, width, height) in whole pixels of the full-size frame, as displayed."""

LUMA = (0.299, 0.587, 0.114)
_YIQ = np.array([LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
_RGB = np.linalg.inv(_YIQ)
_GRAY = np.tile(_YIQ[0], (3, 1))
_STRIP = 56  # rows
_LONGEST = 16  # if a resized side is longer, in sizes of the view, the picture is not resized as a whole
_MIDDLE = 127.5  # mid gray, which a change of contrast keeps


@dataclass(frozen=True, eq=False)
class View:
    """The part of a video that one view shows: uint8 (T, size, size, 3).

    `frames`: frame numbers, int64 (T,). `crop`: the box that is resized to `scaled`, (width, height), by default
    (size, size). `corner`: (left, top) of the square of `size` in the resized box. `flip`: the square is mirrored left
    to right. `color`: float32 (3, 4), the map `matrix @ rgb + offset` on levels from 0 to 255; None changes nothing.
    `drawn_from`: (frames, width, height) of the view's video; `decode_views` refuses others.
    """

    frames: np.ndarray
    crop: Box
    size: int
    flip: bool = False
    color: np.ndarray | None = None
    drawn_from: tuple[int, int, int] | None = None
    scaled: tuple[int, int] | None = None
    corner: tuple[int, int] = (0, 0)

    @property
    def resized(self) -> tuple[int, int]:
        """(width, height) that `crop` is resized to."""
        return self.scaled or (self.size, self.size)


@dataclass(frozen=True)
class TrainTransform:
    """The training recipe of the paper. Each call of `views` draws one view.

    `frames`, `sampling`, `stride`: as in `frame_indices`. `scales`: sizes of the crop as shares of the short side. One
    is drawn for the width and one for the height, at most one step of the list apart. The crop lies in a corner or the
    center. `flip`, `jitter_probability`, `gray`: probabilities. `brightness`, `contrast`, `saturation`: x of factors
    drawn from [1 - x, 1 + x] (at least 0). `hue`: x of turns of the color circle drawn from [-x, x], at most 0.5.
    """

    random: ClassVar[bool] = True
    frames: Count = 8
    size: Count = 224
    sampling: Sampling = "sparse"
    stride: Count = 1
    scales: tuple[Annotated[float, Range(above=0, most=1)], ...] = (1.0, 0.875, 0.75, 0.66)
    flip: Share = 0.5
    jitter_probability: Share = 0.8
    brightness: NotNegative = 0.4
    contrast: NotNegative = 0.4
    saturation: NotNegative = 0.2
    hue: Annotated[float, Range(0, 0.5)] = 0.1
    gray: Share = 0.2

    def __post_init__(self) -> None:
        check(self)
        if not self.scales:
            raise ValueError("scales is empty; at least one number wanted")

    def views(self, total: int, width: int, height: int, rng: np.random.Generator) -> list[View]:
        """One random view of a video of `total` frames of this displayed size.

        The first 13 numbers of `rng` are always drawn, and the frame numbers after them. So another probability or
        range does not change the other values.
        """
        _check_video(total, width, height)
        u = rng.random(13)
        short, steps = min(width, height), len(self.scales)
        pairs = [(i, j) for i in range(steps) for j in range(steps) if abs(i - j) <= 1]
        i, j = pairs[int(u[0] * len(pairs))]
        across, down = (max(1, round(self.scales[each] * short)) for each in (i, j))
        box = (*_place(int(u[1] * 5), width - across, height - down), across, down)
        color = self._color(u[4:]) if u[3] < self.jitter_probability else np.eye(3, 4)
        if u[12] < self.gray:
            color = _GRAY @ color
        changed = not np.array_equal(color, np.eye(3, 4))
        frames = frame_indices(total, self.frames, self.sampling, stride=self.stride, rng=rng)
        return [
            View(
                frames,
                box,
                self.size,
                bool(u[2] < self.flip),
                color.astype(np.float32) if changed else None,
                (total, width, height),
            )
        ]

    def _color(self, u: np.ndarray) -> np.ndarray:
        """The four color changes as one float64 (3, 4). Four random numbers give their order."""
        bright, strong, vivid = (
            max(0.0, 1 - part) + (1 + part - max(0.0, 1 - part)) * draw
            for part, draw in zip((self.brightness, self.contrast, self.saturation), u[:3], strict=True)
        )
        return jitter(bright, strong, vivid, self.hue * (2 * u[3] - 1), np.argsort(u[4:8], kind="stable"))


@dataclass(frozen=True)
class TestTransform:
    """The paper's test views: `clips` views in time, `crops` in space.

    One crop: the frame is resized to a short side of 256 / 224 * size, and the center square of `size` is taken. Three
    crops: the frame is resized to a short side of `size`, and the squares lie at the start, center and end of the long
    side.
    """

    __test__: ClassVar[bool] = False  # pytest would collect it for its name
    random: ClassVar[bool] = False
    frames: Count = 8
    size: Count = 224
    clips: Count = 1
    crops: Literal[1, 3] = 1
    sampling: Sampling = "sparse"
    stride: Count = 1

    def __post_init__(self) -> None:
        check(self)

    def crops_of(self, width: int, height: int) -> list[View]:
        """The crops of a frame of this displayed size, as views without frame numbers."""
        short = self.size if self.crops == 3 else int(256 / 224 * self.size)
        scale = short / min(width, height)
        across, down = (int(side * scale + 0.5) for side in (width, height))
        spare_x, spare_y = (across - self.size) // 2, (down - self.size) // 2
        steps = (1,) if self.crops == 1 else (0, 1, 2)
        none, whole = np.empty(0, np.int64), (0, 0, width, height)
        return [
            View(none, whole, self.size, scaled=(across, down), corner=(spare_x * step, spare_y * step))
            for step in steps
        ]

    def views(self, total: int, width: int, height: int, rng: np.random.Generator | None = None) -> list[View]:
        """clips x crops views of a video of `total` frames of this displayed size, clip by clip. `rng` is not used."""
        _check_video(total, width, height)
        crops, found = self.crops_of(width, height), []
        for clip in range(self.clips):
            frames = frame_indices(total, self.frames, self.sampling, stride=self.stride, clip=clip, clips=self.clips)
            found += [replace(crop, frames=frames, drawn_from=(total, width, height)) for crop in crops]
        return found


def jitter(brightness: float, contrast: float, saturation: float, hue: float, order: np.ndarray) -> np.ndarray:
    """The map of these factors and this turn of hue, float64 (3, 4), on levels from 0 to 255.

    `order`: the order of the four changes, a permutation of 0 to 3. Unlike four separate steps, nothing is cut off
    between them.
    """
    angle = -2 * np.pi * hue  # the hue circle runs red, yellow, green; the angle in the (I, Q) plane runs the other way
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    eye, none = np.eye(3), np.zeros(3)
    steps = (
        (brightness * eye, none),
        (contrast * eye, np.full(3, (1 - contrast) * _MIDDLE)),
        (saturation * eye + (1 - saturation) * _GRAY, none),
        (_RGB @ turn @ _YIQ if hue else eye, none),
    )
    matrix, offset = eye, none
    for number in order:
        matrix, offset = steps[number][0] @ matrix, steps[number][0] @ offset + steps[number][1]
    return np.column_stack([matrix, offset])


def apply(view: View, frames_THWC: np.ndarray) -> np.ndarray:
    """The view of these full-size frames: uint8 (T, H, W, 3) in, uint8 (T, size, size, 3) out.

    The frames are those of `view.frames`, in that order. The steps are crop, bilinear resize (half-pixel centers, no
    antialiasing, edges of the box repeated: OpenCV's INTER_LINEAR), the square at `corner`, flip, color. With a color
    map the result is rounded once, at the end, and within half a level of the exact value. Without one it is within one
    level.
    """
    out = np.empty((len(frames_THWC), view.size, view.size, 3), np.uint8)
    for frame_HWC, out_SSC in zip(frames_THWC, out, strict=True):
        apply_frame(view, frame_HWC, out_SSC)
    return out


def apply_frame(view: View, frame_HWC: np.ndarray, out_SSC: np.ndarray) -> None:
    """`apply` for one frame, so that only one full-size frame needs to be in memory."""
    left, top, width, height = view.crop
    if left < 0 or top < 0 or width < 1 or height < 1:
        raise ValueError(f"crop {view.crop} is not a box of at least one pixel")
    box_HWC = frame_HWC[top : top + height, left : left + width]
    if box_HWC.shape[:2] != (height, width):
        raise ValueError(f"crop {view.crop} goes beyond the frame of {frame_HWC.shape[1]}x{frame_HWC.shape[0]} pixels")
    if view.color is not None:
        _apply_with_color(view, view.color, box_HWC, out_SSC)
        return
    (across, down), (x, y) = view.resized, view.corner
    if (width, height) == (across, down):
        picture_SSC = box_HWC[y : y + view.size, x : x + view.size]
    elif max(across, down) > _LONGEST * view.size:  # a picture a few pixels wide
        _apply_with_color(view, np.eye(3, 4, dtype=np.float32), box_HWC, out_SSC)
        return
    else:
        picture_SSC = _resized(box_HWC, across, down, x, y, view.size)
    out_SSC[...] = picture_SSC[:, ::-1] if view.flip else picture_SSC


def _resized(box_HWC: np.ndarray, across: int, down: int, x: int, y: int, size: int) -> np.ndarray:
    """The square of `size` at (x, y) of the box resized to (across, down): uint8 (size, size, 3).

    Only the part of the box that this square needs is resized.
    """
    import torch

    height, width = box_HWC.shape[:2]
    left, skip_x, right = _part(width, across, x, size)
    top, skip_y, bottom = _part(height, down, y, size)
    # torch would copy a box that is not contiguous with all cores, which decoding threads must not do. It refuses
    # turned and read-only memory. Its bilinear resize of bytes works in fixed point on the calling thread, within one
    # level of the exact value, and several times faster than in float.
    part_HWC = box_HWC[top:bottom, left:right]
    part_HWC = np.ascontiguousarray(part_HWC) if part_HWC.flags.writeable else part_HWC.copy()
    x_1CHW = torch.from_numpy(part_HWC)[None].permute(0, 3, 1, 2)
    x_1CHW = torch.ops.aten.upsample_bilinear2d(
        x_1CHW, [y - skip_y + size, x - skip_x + size], False, down / height, across / width
    )
    return x_1CHW[0].permute(1, 2, 0).numpy()[y - skip_y :, x - skip_x :]


def _part(length: int, scaled: int, start: int, size: int) -> tuple[int, int, int]:
    """The source pixels, of `length` resized to `scaled`, for the resized pixels from `start` to `start + size`.

    Returns the first of them, the number of resized pixels before it, and the end. The first must be a whole number of
    periods from the edge: only then do resized pixels lie at the same places between their neighbors.
    """
    period = scaled // math.gcd(length, scaled)
    skip = start // period * period
    if scaled > length:  # the pixel before the first is needed too
        skip = max(0, skip - period)
    end = min(length, int((start + size - 0.5) * length / scaled - 0.5) + 3)
    return skip * length // scaled, skip, end


def _apply_with_color(view: View, color: np.ndarray, box_HWC: np.ndarray, out_SSC: np.ndarray) -> None:
    """Resizes, mirrors and colors a box in float32 and rounds once: colors would amplify the error of a rounded resize.

    NumPy is used because torch would use all cores from every decoding thread. Strips of R rows keep the intermediate
    values in the cache.
    """
    (wide, tall), (x, y) = view.resized, view.corner
    low, high, down = _taps(box_HWC.shape[0], tall, y, view.size)
    left, right, across = _taps(box_HWC.shape[1], wide, x, view.size)
    if view.flip:
        left, right, across = left[::-1], right[::-1], across[::-1]
    for start in range(0, view.size, _STRIP):
        rows = slice(start, start + _STRIP)
        above_RWC = box_HWC[low[rows]]
        x_RWC = np.subtract(box_HWC[high[rows]], above_RWC, dtype=np.float32)
        x_RWC *= down[rows, None, None]
        x_RWC += above_RWC
        x_CRW = np.ascontiguousarray(x_RWC.transpose(2, 0, 1))
        before_CRS, x_CRS = x_CRW.take(left, axis=2), x_CRW.take(right, axis=2)
        x_CRS -= before_CRS
        x_CRS *= across
        x_CRS += before_CRS
        recolor(x_CRS.transpose(1, 2, 0), color, out_SSC[rows])


def _taps(length: int, scaled: int, start: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The taps of `size` resized pixels from `start` on, of `length` pixels resized to `scaled`, each (size,).

    Returns the source pixel before each, the one after it, and the weight of the latter.
    """
    at = np.clip((np.arange(start, start + size) + 0.5) * (length / scaled) - 0.5, 0, length - 1)
    low = at.astype(np.int64)
    return low, np.minimum(low + 1, length - 1), (at - low).astype(np.float32)


def recolor(picture_HWC: np.ndarray, color: np.ndarray, out_HWC: np.ndarray) -> None:
    """color[:, :3] @ rgb + color[:, 3] of each pixel, in float32, rounded half to even and clipped to 0..255 once.

    `picture_HWC`: uint8 or float32. `out_HWC`: uint8.
    """
    # NumPy, plane by plane: half the time of a matrix product, and no BLAS with a lower precision.
    r, g, b = np.ascontiguousarray(picture_HWC.transpose(2, 0, 1)).astype(np.float32, copy=False)
    part = np.empty_like(r)
    for channel, (red, green, blue, offset) in enumerate(color.astype(np.float32)):
        level = r * red
        level += np.multiply(g, green, out=part)
        level += np.multiply(b, blue, out=part)
        level += offset
        np.rint(level, out=level)
        out_HWC[..., channel] = np.clip(level, 0, 255, out=level)


def _place(position: int, spare_x: int, spare_y: int) -> tuple[int, int]:
    """(left, top) in one of the four corners (0 to 3) or the center (4), for the spare pixels in x and y."""
    if position == 4:
        return spare_x // 2, spare_y // 2
    return spare_x * (position % 2), spare_y * (position // 2)


def _check_video(total: int, width: int, height: int) -> None:
    if min(total, width, height) < 1:
        raise ValueError(f"a video of {total} frames of {width}x{height} pixels has nothing to take a view of")
