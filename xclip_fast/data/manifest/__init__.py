"""The manifest of a data set: the facts about every video, from one pass over the files."""

from .indexing import default_out, index
from .manifest import Manifest
from .text_summary import summary

__all__ = ["Manifest", "default_out", "index", "summary"]
