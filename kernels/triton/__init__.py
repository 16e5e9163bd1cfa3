"""What Triton kernels share: launching, tiles, rows, the GEMM, column sums. The kernels of an op are in its folder.

As an attribute, ``triton.gemm`` is gemm.py of this folder and ``triton.layer_norm`` is triton.py of the folder
layer_norm. Either is imported, and Triton with it, when it is first asked for: ``import xclip_fast`` imports neither.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..attention import triton as attention  # noqa: F401
    from ..layer_norm import triton as layer_norm  # noqa: F401
    from ..quick_gelu import triton as quick_gelu  # noqa: F401
    from . import column_sums, fold, gemm, rows  # noqa: F401

# rows of a sequence that fit in one tile of attention's backward kernel, by bytes of a number: nothing is saved for it
ONE_TILE = {2: 64, 4: 32}


def __getattr__(name: str) -> Any:
    places = f"{__name__}.{name}", f"{__name__.rpartition('.')[0]}.{name}.triton"
    for place in places:
        try:
            found = globals()[name] = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if not place.startswith(str(error.name)):  # Triton itself is missing
                raise
        else:
            return found
    raise AttributeError(f"there are no Triton kernels {' or '.join(places)}")
