"""Batches of a manifest's videos, on the CPU or through NVIDIA DALI."""

from .batches import Batch, DataError, Report
from .loader import Loader, loader

__all__ = ["Batch", "DataError", "Loader", "Report", "loader"]
