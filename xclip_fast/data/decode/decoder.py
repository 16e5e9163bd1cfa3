"""Frames of video files, decoded with PyAV.

Frame `i` is the i-th frame of a decode of the whole file, pixel for pixel, mostly without decoding the whole file
(`plan.py`). If the packets do not match the frames (odd containers), or a frame on the way is damaged, the whole file
is decoded: slower, with the same result. (Damage elsewhere in the file is not noticed; frames are then numbered by
packets.)

Colors are converted to 8-bit RGB by the matrix and range of the stream and rounded once. Color planes are enlarged
bilinearly. The result is that of NVIDIA DALI's CPU decoder, bit for bit. High dynamic range is not tone-mapped.
Rotation and mirroring by metadata are applied. The pixel aspect ratio is not, as in the readers of X-CLIP's training.
The PyAV wheel bundles FFmpeg with GPL encoders (x264, x265); mind that if you redistribute it.

Every function here takes a path or a `Source` (with a stored plan, or a member of a tar file).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..sampling import Sampling
from ..transforms import TestTransform, View, apply_frame
from .chosen import chosen_pictures
from .picture import Upright
from .plan import make_plan
from .reading import all_frames, no_frame, open_video
from .source import VideoError, as_source
from .times import clock_of, frame_times
from .video import Video, pack_plan
from .windows import Span, VideoPath, decode_spans

if TYPE_CHECKING:  # torch takes seconds to import, and `index`, `transcode` and `motion` need none of it
    import torch


def decode(
    path: VideoPath,
    frames: int = 8,
    sampling: Sampling = "sparse",
    *,
    size: int = 224,
    stride: int = 1,
    rng: np.random.Generator | None = None,
    start: float | None = None,
    end: float | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """Sampled frames of one video: uint8 (frames, size, size, 3), RGB.

    `start`, `end`: only the frames with start <= time < end, in seconds from the first frame; by default all.

    `sampling`, `stride` and `rng` are those of `frame_indices`; a video with fewer frames than wanted repeats them. The
    picture is the paper's test view, `TestTransform`: the center square after a resize to a short side of
    size * 256 / 224, with the pixels of an evaluation. `threads`: of the decoder of this file. Raises VideoError, also
    for a `start` after the end of the video.
    """
    source, begin = as_source(path), 0.0 if start is None else start
    if not 0 <= begin < (math.inf if end is None else end):
        raise ValueError(f"start is {start} and end is {end} seconds; 0 <= start < end wanted")

    def spans(duration: float) -> list[Span]:
        if begin >= duration:
            raise VideoError(f"{source}: lasts {duration:.3f} seconds, and the start is {begin:g}")
        return [(begin, duration if end is None else min(end, duration))]

    test = TestTransform(frames, size, sampling=sampling, stride=stride)
    parts = decode_spans(source, spans, test, rng=rng, threads=threads)
    with contextlib.closing(parts):
        return next(parts).frames


def decode_frames(path: VideoPath, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """The frames with these numbers, in this order, full size: uint8 (n, H, W, 3), RGB.

    Raises VideoError for a bad file or a picture size that changes, and IndexError for a number out of range.
    """
    source = as_source(path)
    wanted = [int(index) for index in indices]
    if not wanted:
        raise ValueError(f"{source}: no frame numbers given")

    def choose(times: np.ndarray) -> list[int]:
        total = len(times)
        if not 0 <= min(wanted) <= max(wanted) < total:
            raise IndexError(f"{source}: has frames 0 to {total - 1}; frames {min(wanted)} to {max(wanted)} are wanted")
        return wanted

    pictures = dict(chosen_pictures(source, choose))
    if len({picture.shape for picture in pictures.values()}) > 1:
        raise VideoError(f"{source}: the picture size changes within the video; use decode(), which resizes")
    return np.stack([pictures[number] for number in wanted])


def decode_views(path: VideoPath, views: Sequence[View], *, out: np.ndarray | None = None) -> np.ndarray:
    """Several views of one video: uint8 (V, T, S, S, 3), RGB. Each frame is decoded once, also for several views.

    All views must have the same number of frames and the same size. `out`: array for the result, uint8 of that shape.
    One full-size frame at a time is kept in memory. Raises VideoError for a bad file, and for a file whose frame count
    or size is not that of the views.
    """
    source = as_source(path)
    if not views or len({(len(view.frames), view.size) for view in views}) > 1:
        raise ValueError(
            f"{source}: at least one view wanted, all with one frame count and size; got {len(views)} views"
        )
    shape = (len(views), len(views[0].frames), views[0].size, views[0].size, 3)
    if out is None:
        out = np.empty(shape, np.uint8)
    if out.shape != shape or out.dtype != np.uint8:
        raise ValueError(f"{source}: out is {out.dtype} {out.shape}; uint8 {shape} wanted")
    drawn = {view.drawn_from for view in views if view.drawn_from is not None}
    counts = {count for count, _, _ in drawn} or ({len(source.plan.pts)} if source.plan else set())

    places: dict[int, list[tuple[int, int]]] = {}  # the view and the place in it of each frame number
    for number, view in enumerate(views):
        for step, frame in enumerate(view.frames.tolist()):
            places.setdefault(frame, []).append((number, step))

    def choose(times: np.ndarray) -> Collection[int]:
        if counts - {len(times)} or not 0 <= min(places) <= max(places) < len(times):
            known = " and ".join(map(str, sorted(counts))) or f"{max(places) + 1} at least"
            raise VideoError(f"{source}: has {len(times)} frames, not {known} as indexed; index it again")
        return places

    for frame, picture_HWC in chosen_pictures(source, choose):
        height, width = picture_HWC.shape[:2]
        for number, step in places[frame]:
            view = views[number]
            if view.drawn_from is not None and view.drawn_from[1:] != (width, height):
                wanted = "x".join(map(str, view.drawn_from[1:]))
                raise VideoError(
                    f"{source}: a frame has {width}x{height} pixels, not {wanted} as indexed; index it again"
                )
            left, top, across, down = view.crop
            if left + across > width or top + down > height:
                raise VideoError(f"{source}: a frame has {width}x{height} pixels; the crop {view.crop} goes beyond it")
            apply_frame(view, picture_HWC, out[number, step])
    return out


def probe(path: VideoPath) -> Video:
    """A video's size, codec, timing, true frame count and plan, under its own path.

    Decodes one frame, or all if the packets do not match the frames. Raises VideoError.
    """
    source = as_source(path)
    with open_video(source) as (container, stream):
        plan = make_plan(container, stream, verify=True)
    with open_video(source) as (container, stream):
        codec = stream.codec_context.codec.canonical_name
        frames = all_frames(container, stream)
        first = next(frames, None)
        if first is None:
            raise no_frame(source, stream)
        if plan is not None and first.pts != plan.pts[0]:
            plan = None  # the packets do not match the decoded frames
        width, height = Upright().size(first)
        base, step = clock_of(stream)
        times = plan.pts if plan else frame_times([first.pts, *(frame.pts for frame in frames)], step)
        count, span = len(times), (times[-1] - times[0]) * base
        # n frames span n - 1 intervals; the last frame lasts as long as the others on average.
        rate = (count - 1) / span if span else stream.average_rate or 25
        duration = float(count / rate)
        return Video(
            source.path,
            frames=count,
            width=width,
            height=height,
            codec=codec,
            pix_fmt=first.format.name,
            rotation=-first.rotation % 360,
            duration=duration,
            fps=count / duration,
            colorspace=int(first.colorspace),
            interlaced=bool(first.interlaced_frame),
            packed=None if plan is None else pack_plan(plan),
        )
