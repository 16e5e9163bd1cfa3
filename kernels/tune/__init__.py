"""Measuring on this GPU: ``python -m xclip_fast.kernels.tune`` (``__main__.py``)."""
