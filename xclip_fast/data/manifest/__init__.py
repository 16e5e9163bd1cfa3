"""The manifest of a data set: every video, looked at once."""

from .manifest import Manifest, default_out, index, summary

__all__ = ["Manifest", "default_out", "index", "summary"]
