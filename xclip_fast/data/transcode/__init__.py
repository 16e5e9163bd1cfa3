"""Copies of videos that decode fast."""

from .transcoder import Summary, transcode

__all__ = ["Summary", "transcode"]
