"""Decoding of chosen frames of a video file on the CPU."""

from .decoder import decode, decode_frames, decode_views, probe
from .source import VideoError
from .video import Video

__all__ = ["Video", "VideoError", "decode", "decode_frames", "decode_views", "probe"]
