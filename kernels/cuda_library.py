"""The CUDA library of csrc/, loaded with ctypes, and its calls on tensors: products on Hopper's tensor cores with the
block's epilogues. The parts of a block name them as their backend ``cuda``.

M rows, N columns, K summed; docs/kernels.md derives the epilogues. Memory comes from torch, work goes on torch's
current stream, nothing waits.
"""

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .common.derived import cast

ABI = 8  # XCLIP_FAST_ABI of csrc/include/xclip_fast.h
TILES = {"auto": -1, "square": 0, "wide": 1}
DTYPES = {torch.bfloat16: 0, torch.float16: 1}
_HALF = ("Norm", "NormGelu", "Residual", "ResidualStatistics")
# (epilogue of csrc/include/gemm.cuh, dtype) -> its tiles: the calls of run_on_tile in csrc/product_*.cu
BUILT: dict[tuple[str, torch.dtype], tuple[str, ...]] = {
    **{(name, torch.bfloat16): ("wide", "square") for name in _HALF},
    **{(name, torch.float16): ("square",) for name in _HALF},
    **{(name, torch.bfloat16): ("square",) for name in ("NormGeluKept", "Slope")},
}
BESIDE = Path(__file__).with_name("libxclip_fast.so")

# result and arguments of each function: int, int64_t, pointer, float and string
_KINDS = {"i": ctypes.c_int, "l": ctypes.c_int64, "p": ctypes.c_void_p, "f": ctypes.c_float, "s": ctypes.c_char_p}
_SIGNATURES = {
    "abi": "i",
    "error": "s i",
    "check_device": "i i",
    "norm_linear": "i ii pl pl pppp i pp lll ip",
    "slope": "i ii pl pl pl pp p lll ip",
    "linear_residual": "i ii pl pl pp pl fppp p lll ip",
    "statistics_floats": "l ll",
}
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    f"xclip_fast_{name}": (_KINDS[kinds[0]], [_KINDS[kind] for kind in kinds[1:].replace(" ", "")])
    for name, kinds in _SIGNATURES.items()
}


# ---- the library


def path() -> Path:
    """Where the library is, or would be: ``XCLIP_FAST_CUDA_LIBRARY``, or beside this file."""
    return Path(os.environ.get("XCLIP_FAST_CUDA_LIBRARY") or BESIDE)


@functools.cache
def load(file: Path) -> tuple[Any, str | None]:
    """The library with its signatures and None, or None and the reason why there is none."""
    if not file.exists():
        note = file.with_suffix(".failed")
        why = f": {note.read_text(encoding='utf-8').strip()}" if note.exists() else ""
        return None, f"no CUDA library {file.name} beside this package{why} (built by pip install where nvcc is)"
    try:
        library = ctypes.CDLL(str(file))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:  # another machine's, or a part of it is missing
        return None, f"the CUDA library {file} does not load: {error}"
    if library.xclip_fast_abi() != ABI:
        return None, f"the CUDA library {file} has interface {library.xclip_fast_abi()}, wanted {ABI}: install again"
    return library, None


def refuse_device(kind: str, index: int | None) -> str | None:
    """Why the library does not run on this device, or None."""
    if kind != "cuda":
        return f"device {kind} is not cuda"
    library, reason = load(path())
    if library is None:
        return reason
    code = library.xclip_fast_check_device(torch.cuda.current_device() if index is None else index)
    return f"the CUDA library says: {_words(library, code)}" if code else None


# what torch.compiler.assume_constant_result does, which would import the compiler (and Triton) with this package
refuse_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _words(library: Any, code: int) -> str:
    words = library.xclip_fast_error(code)
    return f"{words.decode()} (code {code})"


def _place(x: Tensor) -> tuple[int, int]:
    """Device and stream for a call."""
    device = x.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)  # torch.cuda.current_stream makes an object first


@functools.cache
def _library() -> Any:
    """The library, found at the first call: later calls look neither at the environment nor at the file."""
    library, reason = load(path())
    if library is None:
        raise RuntimeError(reason)
    return library


_PLAIN = frozenset((int, float, type(None)))


def _call(name: str, *args: Any) -> None:
    library = _library()
    # isinstance(arg, Tensor) would take longer than the rest
    code = getattr(library, f"xclip_fast_{name}")(*[arg if type(arg) in _PLAIN else arg.data_ptr() for arg in args])
    if code:
        shapes = ", ".join(f"{tuple(arg.shape)} {arg.dtype}" for arg in args if isinstance(arg, Tensor))
        raise RuntimeError(f"xclip_fast_{name} failed with {shapes}: {_words(library, code)}")


# ---- its calls on tensors


def matrix(x: Tensor) -> Tensor:
    """x (..., K) as rows (M, K) that TMA reads: a view where base and row stride are in whole 16 bytes, else a copy."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    row, column = rows.stride()
    if column == 1 and row >= rows.shape[1] and not (row * rows.element_size() | rows.data_ptr()) % 16:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def tiles(epilogue: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The tiles that a product with this epilogue takes, or none if it was not built for operands of ``dtype``."""
    return ("auto", *BUILT[epilogue, dtype]) if (epilogue, dtype) in BUILT else ()


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else cast(x, torch.float32).contiguous()


def _operands(x: Tensor, weight: Tensor, tile: str) -> tuple[Any, ...]:
    x, weight = matrix(x), matrix(weight)
    return TILES[tile], x, x.stride(0), weight, weight.stride(0)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
    activation: bool = False,
    keep: bool = False,
    tile: str = "auto",
) -> tuple[Tensor, ...]:
    """y = act(u) with u = r (x W^T - mu s) + b.

    Args:
        x: (M, K), weight: (N, K), one half-precision dtype. bias: (N,).
        norm: mu (M,), r (M,), s (N,), float32; None: no LayerNorm.
        keep: u is wanted, too (bfloat16).

    Returns:
        (M, N) in x's dtype; with ``keep`` y and u.
    """
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    u = torch.empty(M, N, dtype=x.dtype, device=x.device) if keep else None
    if M:
        rest = (*(norm or (None, None, None)), _floats(bias), int(activation), u)
        _call("norm_linear", DTYPES[x.dtype], *_operands(x, weight, tile), *rest, y, M, N, K, *_place(x))
    return (y,) if u is None else (y, u)


def slope(dy: Tensor, weight: Tensor, u: Tensor, *, tile: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of quick_gelu(u) W^T: du = (dy W) quick_gelu'(u).

    Args:
        dy: (M, K), weight: (K, N), u: (M, N), bfloat16.

    Returns:
        du (M, N); the sums of its columns before they were rounded (N,) float32, on one device always in the same
        order; quick_gelu(u) (M, N).
    """
    (M, K), N = dy.shape, weight.shape[1]
    du, h = (torch.empty(M, N, dtype=u.dtype, device=u.device) for _ in range(2))
    parts = torch.empty(4 * -(-M // 128), N, dtype=torch.float32, device=dy.device)
    if M:
        u = matrix(u)
        rest = (u, u.stride(0), h, parts, du, M, N, K)
        _call("slope", DTYPES[dy.dtype], *_operands(dy, weight, tile), *rest, *_place(dy))
    return du, parts.sum(0), h


def linear_residual(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor,
    drop_scale: Tensor | None = None,
    statistics_eps: float | None = None,
    tile: str = "auto",
) -> tuple[Tensor, ...]:
    """residual + s (x W^T + b), and, if ``statistics_eps`` is given, mean and 1 / sqrt(variance + eps) of its rows.

    Args:
        x: (M, K), weight: (N, K), residual: (M, N), of one half-precision dtype. bias: (N,).
        drop_scale: (B,), M a multiple of B: s of each M / B rows.

    Returns:
        (M, N) in that dtype, and, if wanted, float32 (M,) twice.
    """
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    mean = rstd = partials = scale = None
    if statistics_eps is not None:
        mean, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
        partials = torch.empty(_statistics_floats(M, N), dtype=torch.float32, device=x.device)
    if drop_scale is not None:
        samples = drop_scale.shape[0]
        scale = drop_scale.float()[:, None].expand(samples, M // max(samples, 1)).reshape(-1)
    if M:
        residual = matrix(residual)
        rest = (_floats(bias), scale, residual, residual.stride(0), statistics_eps or 0.0, partials, mean, rstd)
        _call("linear_residual", DTYPES[x.dtype], *_operands(x, weight, tile), *rest, y, M, N, K, *_place(x))
    return (y,) if mean is None or rstd is None else (y, mean, rstd)


@functools.lru_cache(1024)
def _statistics_floats(M: int, N: int) -> int:
    return int(_library().xclip_fast_statistics_floats(M, N))
