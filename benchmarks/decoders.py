"""The contenders of decode.py: ways to decode a few frames of a video file.

Each takes a file and sorted frame numbers and returns uint8 RGB (n, H, W, 3), on one thread.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from xclip_fast.data.decode.decoder import Source, decode_frames
from xclip_fast.data.decode.picture import EXACT_COLOR

FULL, STORED, PLANNED, SEEKING = "full decode", "ours, stored plan", "ours, first sight", "seek for each frame"
OPENCV, OPENCV_SEEKING = "OpenCV, full", "OpenCV, seeking"


def converter() -> Callable[[av.VideoFrame], np.ndarray]:
    """Converts frames to RGB with our settings, so that the pixels and the work can be compared."""
    convert = functools.partial(VideoReformatter().reformat, format="rgb24", interpolation=EXACT_COLOR, threads=1)
    return lambda frame: convert(frame).to_ndarray()


def full_decode(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """Decode all frames and convert those asked for."""
    wanted, to_rgb = set(numbers), converter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return np.stack([to_rgb(frame) for place, frame in enumerate(container.decode(stream)) if place in wanted])


def seek_for_each(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """For each frame, seek to the keyframe before it and decode up to it: the usual loop."""
    found, to_rgb = [], converter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for place in numbers:
            time = (stream.start_time or 0) + round(place / stream.average_rate / stream.time_base)
            container.seek(time, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts >= time)
            found.append(to_rgb(frame))
    return np.stack(found)


def opencv(path: Path, numbers: Sequence[int], seek: bool) -> np.ndarray:
    import cv2

    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    found = []
    try:
        if seek:
            for place in numbers:
                capture.set(cv2.CAP_PROP_POS_FRAMES, place)
                found.append(capture.read()[1])
        else:
            wanted, place = set(numbers), -1
            while capture.grab():  # to the end: a full decode
                place += 1
                if place in wanted:
                    found.append(capture.retrieve()[1])
        return np.stack([cv2.cvtColor(picture, cv2.COLOR_BGR2RGB) for picture in found])
    finally:
        capture.release()


def contenders_of(planned: Source) -> Iterator[tuple[str, Callable[..., np.ndarray] | str]]:
    """Each contender's name, and its function or why it cannot run. `planned`: the file with its plan."""
    yield FULL, full_decode
    yield PLANNED, decode_frames
    yield STORED, lambda path, numbers: decode_frames(planned, numbers)
    yield SEEKING, seek_for_each
    note = "" if importlib.util.find_spec("cv2") else "not installed: pip install opencv-python-headless"
    for name, seek in ((OPENCV, False), (OPENCV_SEEKING, True)):
        yield name, note or functools.partial(opencv, seek=seek)
