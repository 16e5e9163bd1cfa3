"""Stored video features, and search in them by text or by example."""

from .index import Index
from .query import Hit

__all__ = ["Hit", "Index"]
