"""Triton kernels, one file an op, imported at the op's first call: kernels, then ``forward``, then ``backward``.

Every launch goes through ``launching``; tiles come from ``tiles.json``. Nothing here is imported by
``import xclip_fast``: a module of this folder is imported, and Triton with it, when its name is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import attention, column_sums, fold, gemm, layer_norm, message_kv, packed_attention, quick_gelu  # noqa: F401

# rows of a sequence that fit in one tile of attention's backward kernel, by bytes of a number: nothing is saved for it
ONE_TILE = {2: 64, 4: 32}


def __getattr__(name: str) -> Any:
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":  # Triton itself is missing
            raise
        raise AttributeError(f"{__name__} has no module {name}") from None
