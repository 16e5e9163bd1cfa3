"""The C++ library of csrc/cpu.cpp, loaded with ctypes: products of inference on CPUs with AVX2.

M rows, N outputs, K summed. Panels are rows in the library's own order: (M up to the next multiple of 8, K) floats.
"""

import ctypes
import functools
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 2  # that of xclip_fast_cpu_abi in csrc/cpu.cpp
FILE = Path(__file__).parents[1] / "libxclip_fast_cpu.so"
UNIT = 8  # M is rounded up to it; N and K are multiples of it
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# The structs of csrc/cpu.cpp: integers and addresses (q), float32 (f), int32 (i).
_PRODUCT = struct.Struct("3q 4q4q 2qfi 3q2i q4q4q")
_ATTENTION = struct.Struct("5q3qfi")


@functools.cache
def load() -> tuple[Any, str | None]:
    """The library and None, or None and the reason why products do not run on it."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX2":  # with AVX-512 oneDNN has wider registers
        return None, f"it is made for AVX2, and torch uses {capability} here"
    if not FILE.exists():
        note = FILE.with_suffix(".failed")
        why = f": {note.read_text(encoding='utf-8').strip()}" if note.exists() else ""
        return None, f"no CPU library {FILE.name} in this package{why} (built by pip install where g++ is)"
    try:
        library = ctypes.CDLL(str(FILE))  # OpenMP's symbols are those that torch has loaded: one pool of threads
        abi = library.xclip_fast_cpu_abi()
        if abi != ABI:
            return None, f"the CPU library {FILE} has interface {abi}, wanted {ABI}: install again"
        for function in (library.xclip_fast_cpu_product, library.xclip_fast_cpu_attention):
            function.argtypes, function.restype = [ctypes.c_char_p], None
    except (OSError, AttributeError) as error:
        return None, f"the CPU library {FILE} does not load: {error}"
    return library, None


def panel_floats(rows: int, width: int) -> int:
    """The size of the panels of (rows, width)."""
    return -(-rows // UNIT) * UNIT * width


def takes(*weights: Tensor) -> bool:
    """Whether the library multiplies with these: (N, K), contiguous, in a dtype and of widths that it knows."""
    return load()[0] is not None and all(
        w.dtype in _DTYPES and w.is_contiguous() and not (w.shape[0] % UNIT or w.shape[1] % UNIT) for w in weights
    )


def product(
    rows: int,
    panels: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    last: Tensor | None = None,
    y: Tensor | None = None,
    residual: Tensor | None = None,
    y_panels: Tensor | None = None,
    quick_gelu: bool = False,
) -> None:
    """act(LN(x) W^T + b) + residual, in float32.

    Args:
        rows: M.
        panels: (panel_floats(M, K),): x, or room for it if ``x`` is given.
        weight: (N, K), one of float32, bfloat16 and float16.
        bias: (N,), float32.
        x: (M, K) or (frames, length, K), float32, with neighboring columns.
        norm: weight (K,), bias (K,) and eps of LN; None: no LN.
        last: (frames, K), float32, in place of the last row of each frame of ``x``.
        y: (M, N) or (frames, length, N), float32, with neighboring columns: the result.
        residual: like ``y``. It may be ``y`` itself.
        y_panels: in place of ``y``, (panel_floats(M, N),): the result as panels.
        quick_gelu: whether act is quick_gelu.

    Raises:
        RuntimeError: for sizes that do not fit those of the weight.
    """
    ln_weight, ln_bias, eps = norm or (None, None, 0.0)
    outputs, summed = weight.shape
    for name, given, count, width in (
        ("x", x, rows, summed),
        ("bias", bias, 1, outputs),
        ("weight of LayerNorm", ln_weight, 1, summed),
        ("bias of LayerNorm", ln_bias, 1, summed),
        ("last", last, 1 if x is None else len(x), summed),
        ("y", y, rows, outputs),
        ("residual", residual, rows, outputs),
        ("panels", panels, 1, panel_floats(rows, summed)),
        ("y_panels", y_panels, 1, panel_floats(rows, outputs)),
    ):
        if given is not None and (given.shape[-1] != width or given.numel() != count * width):
            raise RuntimeError(
                f"{name} is {tuple(given.shape)}, wanted {count} x {width} for a weight {outputs} x {summed}"
            )
    call = _PRODUCT.pack(
        *(rows, outputs, summed),
        *_rows(x),
        *((0, 0, 0, 0) if last is None else (last.data_ptr(), 1, last.stride(0), 0)),
        *(_address(ln_weight), _address(ln_bias), eps, _DTYPES[weight.dtype]),
        *(panels.data_ptr(), weight.data_ptr(), bias.data_ptr(), quick_gelu, torch.get_num_threads()),
        _address(y_panels),
        *_rows(y),
        *_rows(residual),
    )
    load()[0].xclip_fast_cpu_product(call)


def attention_floats(keys: int, channels: int) -> int:
    """The size of the scratch memory of ``attention``."""
    padded = panel_floats(keys, 1)
    return torch.get_num_threads() * ((channels + 24) * padded + 48 * channels)


def attention(qkv: Tensor, queries: int, scratch: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of the first ``queries`` rows of each frame.

    Args:
        qkv: (frames, rows, 3, heads, C), float32, contiguous; at least 4 rows, C a multiple of 8.
        scratch: ``attention_floats(rows, C)`` floats.

    Returns:
        (frames, queries, heads, C).
    """
    frames, keys, _, heads, channels = qkv.shape
    y = qkv.new_empty(frames, queries, heads, channels)
    sizes = frames, keys, queries, heads, channels
    addresses = qkv.data_ptr(), y.data_ptr(), scratch.data_ptr()
    call = _ATTENTION.pack(*sizes, *addresses, channels**-0.5, torch.get_num_threads())
    load()[0].xclip_fast_cpu_attention(call)
    return y


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows(x: Tensor | None) -> tuple[int, int, int, int]:
    """The struct ``Rows``: address, rows of a frame, and the strides of frames and rows."""
    if x is None:
        return 0, 0, 0, 0
    if x.dim() == 2:
        return x.data_ptr(), len(x), 0, x.stride(0)
    return x.data_ptr(), x.shape[1], x.stride(0), x.stride(1)
