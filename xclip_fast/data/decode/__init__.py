"""Decoding of chosen frames of a video file on the CPU."""

from .decoder import VideoInfo, decode, decode_frames, decode_many, decode_views, probe
from .source import VideoError

__all__ = ["VideoError", "VideoInfo", "decode", "decode_frames", "decode_many", "decode_views", "probe"]
