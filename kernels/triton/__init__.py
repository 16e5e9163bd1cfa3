"""Triton kernels, one file an op, imported at the op's first call: kernels, then ``forward``, then ``backward``.

Every launch goes through ``_launch``; tiles come from ``tiles.json``. Nothing here is imported by
``import xclip_fast``.
"""
