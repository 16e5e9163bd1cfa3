"""Triton kernels, one file an op, imported at the op's first call: kernels, then ``forward``, then ``backward``.

Every launch goes through ``launching``; tiles come from ``tiles.json``. Nothing here is imported by
``import xclip_fast``.
"""

# rows of a sequence that fit in one tile of attention's backward kernel, by bytes of a number: nothing is saved for it
ONE_TILE = {2: 64, 4: 32}
