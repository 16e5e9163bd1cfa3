"""The C++ library of csrc/cpu, loaded with ctypes: products and whole blocks of inference.

M rows, N outputs, K summed. Panels are rows in the library's own order.
"""

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ABI = 6  # that of xclip_fast_cpu_abi in csrc/cpu/interface.h
FILE = Path(__file__).parents[1] / "libxclip_fast_cpu.so"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# The structs of csrc/cpu/interface.h: integers and addresses (q), float32 (f), int32 (i).
_PRODUCT = struct.Struct("3q 4q2q 2qfi 4q q4q4q")
_PATCHES = struct.Struct("8q")
_BLOCK = struct.Struct("8q 4q4q f3i 14q 6q")


class Functions(NamedTuple):
    """Those of one instruction set.

    Attributes:
        dtype: of rows and panels.
        rows: panels have M up to the next multiple of it.
        unit: N, K and the channels of a head are multiples of it.
        kinds: bfloat16 numbers that make one of a panel, or 0: float32.
    """

    dtype: torch.dtype
    rows: int
    unit: int
    kinds: int
    product: Any
    block: Any
    patches: Any


SETS = {  # those of csrc/cpu/vector.h
    "avx2": (torch.float32, 8, 8, 0),
    "avx512": (torch.float32, 16, 16, 0),
    "avx512_bf16": (torch.bfloat16, 16, 32, 1),
    "amx": (torch.bfloat16, 16, 32, 1),
    "amx_fp32": (torch.float32, 16, 32, 3),
}


@functools.cache
def instruction_set(dtype: torch.dtype) -> str | None:
    """The one of ``SETS`` that computes with this dtype here, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    has_bf16 = capability == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    has_amx = has_bf16 and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()
    if dtype == torch.float32:
        return "amx_fp32" if has_amx else {"AVX512": "avx512", "AVX2": "avx2"}.get(capability)
    if dtype != torch.bfloat16 or not has_bf16:
        return None
    return "amx" if has_amx else "avx512_bf16"


@functools.cache
def load(name: str | None) -> tuple[Functions | None, str | None]:
    """The functions of an instruction set and None, or None and the reason why there are none."""
    if name is None:
        return None, f"it has no products for a CPU with {torch.backends.cpu.get_cpu_capability()}"
    if not FILE.exists():
        note = FILE.with_suffix(".failed")
        why = f": {note.read_text(encoding='utf-8').strip()}" if note.exists() else ""
        return None, f"no CPU library {FILE.name} in this package{why} (built by pip install where g++ is)"
    try:
        library = ctypes.CDLL(str(FILE))  # OpenMP's symbols are those that torch has loaded: one pool of threads
        abi = library[f"xclip_fast_cpu_abi_{name}"]()
        if abi != ABI:
            return None, f"the CPU library {FILE} has interface {abi}, wanted {ABI}: install again"
        found = [library[f"xclip_fast_cpu_{each}_{name}"] for each in ("product", "block", "patches")]
        for function in found:
            function.argtypes, function.restype = [ctypes.c_char_p], None
    except AttributeError:
        return None, f"the CPU library {FILE} has no functions for {name}, it is an older one: install again"
    except OSError as error:
        return None, f"the CPU library {FILE} does not load: {error}"
    return Functions(*SETS[name], *found), None


def functions(dtype: torch.dtype) -> Functions | None:
    """Those that compute with this dtype, or None."""
    return load(instruction_set(dtype))[0]


def panel_size(rows: int, width: int, dtype: torch.dtype) -> int:
    """The number of elements of ``dtype`` that the panels of (rows, width) take."""
    here = _functions(dtype)
    numbers = -(-rows // here.rows) * here.rows * width
    return numbers * 2 * here.kinds // dtype.itemsize if here.kinds else numbers


def takes(dtype: torch.dtype, *weights: Tensor) -> bool:
    """Whether the library multiplies rows of ``dtype`` with these weights, (N, K).

    They are contiguous, N and K multiples of ``unit``, and bfloat16 for rows of bfloat16.
    """
    here = functions(dtype)
    return here is not None and all(
        (w.dtype == dtype or (dtype == torch.float32 and w.dtype in _DTYPES))
        and w.is_contiguous()
        and not (w.shape[0] % here.unit or w.shape[1] % here.unit)
        for w in weights
    )


def _functions(dtype: torch.dtype) -> Functions:
    found = functions(dtype)
    assert found is not None, "takes() comes first"
    return found


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
) -> None:
    """LN(x) W^T + b + residual. All but the weight are of the dtype of ``panels``, float32 or bfloat16.

    Args:
        rows: M.
        panels: (panel_size(M, K),): x, or room for it if ``x`` is given.
        weight: (N, K), one that the library ``takes``.
        bias: (N,).
        x: (M, K) or (frames, length, K), with neighboring columns.
        norm: weight (K,), bias (K,) and eps of LN; None: no LN.
        last: (frames, K), in place of the last row of each frame of ``x``.
        y: (M, N) or (frames, length, N), with neighboring columns: the result.
        residual: like ``y``. It may be ``y`` itself.
        y_panels: in place of ``y`` and ``residual``, (panel_size(M, N),): quick_gelu of the result as panels.

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
        ("panels", panels, 1, panel_size(rows, summed, panels.dtype)),
        ("y_panels", y_panels, 1, panel_size(rows, outputs, panels.dtype)),
    ):
        if given is not None and (given.shape[-1] != width or given.numel() != count * width):
            raise RuntimeError(
                f"{name} is {tuple(given.shape)}, wanted {count} x {width} for a weight {outputs} x {summed}"
            )
    call = _PRODUCT.pack(
        *(rows, outputs, summed),
        *_rows(x),
        *((0, 0) if last is None else (last.data_ptr(), last.stride(0))),
        *(_address(ln_weight), _address(ln_bias), eps, _DTYPES[weight.dtype]),
        *(panels.data_ptr(), weight.data_ptr(), bias.data_ptr(), torch.get_num_threads()),
        _address(y_panels),
        *_rows(y),
        *_rows(residual),
    )
    _functions(panels.dtype).product(call)


def block(
    x: Tensor, y: Tensor, heads: int, frames: int, part: int, eps: float, parameters: list[Tensor | None]
) -> None:
    """A residual block with quick_gelu (equations 7 to 9). All but the weights are of x's dtype, float32 or bfloat16.

    Args:
        x: (F, S, D), with neighboring columns. With messages, the last row of a frame is not read.
        y: the result. Like ``x``: with messages, the last row of a frame becomes 0. Or (F, D): the first row of each
            frame, and only these are computed past the attention.
        heads: D / heads is a multiple of the functions' ``unit``.
        frames: whose messages attend to each other; 0: no messages.
        part: frames that are computed at a time, so that memory does not grow with F.
        eps: of every LayerNorm.
        parameters: weight and bias of message_fc, message_in, message_out, in, out, fc and projection, then of
            message_ln, ln_1 and ln_2; None for those of the messages if there are none. The library ``takes`` the
            weights of the products, all of one dtype.

    Raises:
        RuntimeError: for sizes that do not fit each other.
    """
    count, length, width = x.shape
    here, linear, fc = _functions(x.dtype), parameters[6], parameters[11]
    assert fc is not None
    assert linear is not None
    hidden = len(fc)
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    ffn = [(hidden, width), (hidden,), (width, hidden), (width,)]
    wanted = [(width, width), (width,), *attention, *attention, *ffn, *[(width,)] * 6]
    given = [None if parameter is None else tuple(parameter.shape) for parameter in parameters]
    if not frames:
        wanted = [*wanted[6:14], *wanted[16:]]
        given = [*given[6:14], *given[16:]]
    if given != wanted or width % heads or (frames and count % frames) or y.shape not in (x.shape, (count, width)):
        raise RuntimeError(
            f"x is {tuple(x.shape)} with {heads} heads and videos of {frames} frames, y is {tuple(y.shape)}; "
            f"parameters are {given}, wanted {wanted}"
        )
    call = _BLOCK.pack(
        *(count, length, heads, width, hidden, frames, part, int(y.dim() == 2)),
        *_rows(x),
        *_rows(y if y.dim() == 3 else y[:, None]),
        *(eps, _DTYPES[linear.dtype], torch.get_num_threads(), 0),
        *(_address(parameter) for parameter in parameters),
    )
    here.block(call)


def patches(frames: Tensor, patch: int, mean: tuple[float, ...], std: tuple[float, ...], out: Tensor) -> None:
    """Normalized pixels of patches as rows, in the order of a convolution's weight (channel, row, column).

    Args:
        frames: uint8 (F, H, W, 3), contiguous; H and W multiples of ``patch``.
        mean, std: of each channel, of pixels in [0, 1].
        out: (F H W / patch^2, 3 patch^2), float32, overwritten.

    Raises:
        RuntimeError: for sizes that do not fit each other.
    """
    count, height, width, channels = frames.shape
    values = _levels(mean, std)
    if channels != 3 or len(values) != 3 or height % patch or width % patch or out.numel() != frames.numel():
        raise RuntimeError(
            f"frames are {tuple(frames.shape)} with {len(values)} means, wanted (F, H, W, 3) of H and W in multiples "
            f"of {patch}, and {out.numel()} numbers of pixels"
        )
    sizes, addresses = (count, height, width, patch), (values.data_ptr(), out.data_ptr())
    _functions(out.dtype).patches(_PATCHES.pack(frames.data_ptr(), *sizes, *addresses, torch.get_num_threads()))


@functools.lru_cache(8)
def _levels(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(u / 255 - mean) / std of each channel and level u, (3, 256)."""
    with torch.inference_mode(False):
        scale, shift = scale_and_shift(mean, std)
        level = torch.arange(256, dtype=torch.float32, device="cpu")
        return torch.addcmul(shift[:, None], level, scale[:, None])


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Of each channel, so that scale u + shift = (u / 255 - mean) / std: (3,) float32 each."""
    scale = [1 / (255 * deviation) for deviation in std]
    shift = [-m / deviation for m, deviation in zip(mean, std, strict=True)]
    return torch.tensor(scale, dtype=torch.float32, device="cpu"), torch.tensor(
        shift, dtype=torch.float32, device="cpu"
    )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows(x: Tensor | None) -> tuple[int, int, int, int]:
    """The struct ``Rows``: address, rows of a frame, and the strides of frames and rows."""
    if x is None:
        return 0, 0, 0, 0
    if x.dim() == 2:
        return x.data_ptr(), len(x), 0, x.stride(0)
    return x.data_ptr(), x.shape[1], x.stride(0), x.stride(1)
