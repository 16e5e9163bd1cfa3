"""The manifest of a data set: the facts about every video, from one pass over the files."""

from .manifest import Manifest, default_out, index, summary

__all__ = ["Manifest", "default_out", "index", "summary"]
