"""The videos that NVIDIA DALI 2 decodes correctly. Does not import DALI."""

from __future__ import annotations

import importlib.util

from .video import DamagedPlan, Video

INSTALL = "pip install nvidia-dali-cuda130"

# DALI's GPU decoder counts decoded pictures, so the frames of codecs with hidden pictures (VP9, AV1) may be shifted.
_CODECS = {
    True: {"h264": 64, "hevc": 144},
    False: {"vp9": 1, "mjpeg": 1},
}  # with a GPU or without: shortest side in pixels
_LONGEST_SIDE = 4096  # of H.264, on every NVDEC
_LARGEST_FILE = 1 << 28  # bytes
BT601, BT709 = (2, 4, 5, 6), 1  # FFmpeg's AVColorSpace; 2: not stated, which all readers treat as BT.601


def missing() -> str | None:
    """The reason why DALI cannot be used here, or None. Does not import DALI."""
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        found = False
    return None if found else f"NVIDIA DALI is not installed; install it with `{INSTALL}`"


def require() -> None:
    why = missing()
    if why is not None:
        raise ImportError(why)


def supported(video: Video, *, gpu: bool = True) -> str | None:
    """The reason why this video must be decoded on the CPU, or None if DALI gives its right frames and colors.

    `gpu=False`: for DALI's CPU operators (VP9 and MJPEG), which the tests run.
    """
    codecs = _CODECS[gpu]
    if video.error is not None:
        return f"has an error: {video.error}"
    try:
        plan = video.plan
    except DamagedPlan as error:
        return f"damaged: {error}"
    if video.codec not in codecs:
        return f"codec: {video.codec or 'unknown'}, and DALI is known to be right for {' and '.join(codecs)} only"
    if video.pix_fmt not in ("yuv420p", "yuvj420p"):
        return f"pixel format: {video.pix_fmt}, and DALI decodes 8-bit 4:2:0 only"
    if video.rotation:
        return f"rotation: {video.rotation} degrees"
    if video.interlaced:
        return "interlaced"
    if video.width % 2 or video.height % 2:
        return f"odd side: {video.width}x{video.height}"
    if min(video.width, video.height) < codecs[video.codec] or max(video.width, video.height) > _LONGEST_SIDE:
        return f"size: {video.width}x{video.height} has a side outside {codecs[video.codec]} to {_LONGEST_SIDE} pixels"
    if video.size > _LARGEST_FILE:
        return f"large file: {video.size} bytes, and DALI reads a file whole"
    if video.colorspace not in (*BT601, BT709):
        return f"color matrix: number {video.colorspace} of FFmpeg, which is neither BT.601 nor BT.709"
    if plan is None:
        return "its packets do not match its frames"
    # DALI numbers the packets by their pts, without negative ones, and counts hidden ones as frames.
    if plan.pts[0] < 0 or not {key for key, _ in plan.keyframes} <= set(plan.pts):
        return "an edit list hides frames"
    # DALI seeks a keyframe by pts. The demuxer seeks by dts and would land on a later keyframe whose dts comes early.
    if any(dts <= pts for (pts, _), (_, dts) in zip(plan.keyframes, plan.keyframes[1:], strict=False)):
        return "keyframes too close to each other to seek to"
    # After a seek, NVDEC drops frames that are shown before their HEVC keyframe, and gives their times to later frames.
    # Such frames delay the keyframe's pts. (H.264 is sought at IDR frames only, which have no such frames.)
    if video.codec == "hevc" and len({pts - dts for pts, dts in plan.keyframes}) > 1:
        return "HEVC with open groups of pictures"
    return None


def container(head: bytes) -> str | None:
    """The reason why a file with these first bytes needs the CPU, or None. MP4 and Matroska seek by exact time."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip") or head[:4] == b"\x1aE\xdf\xa3":
        return None
    return "neither MP4 nor Matroska"
