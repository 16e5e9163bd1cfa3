"""Decoding of chosen frames of a video file on the CPU."""

from .decoder import VideoError, VideoInfo, decode, decode_frames, decode_many, decode_views, probe

__all__ = ["VideoError", "VideoInfo", "decode", "decode_frames", "decode_many", "decode_views", "probe"]
