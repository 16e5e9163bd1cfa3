"""The CUDA library of csrc/, loaded with ctypes, and its calls on tensors: products on Hopper's tensor cores with the
block's epilogues. The parts of a block and the ops on float8 name them as their backend ``cuda``.

M rows, N columns, K summed; docs/kernels.md derives the epilogues. Memory comes from torch, work goes on torch's
current stream, nothing waits.
"""

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import choices

ABI = 2  # XCLIP_FAST_ABI of csrc/include/xclip_fast.h
TILES = {"auto": -1, "small": 0, "square": 1, "wide": 2}
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
BESIDE = Path(__file__).with_name("libxclip_fast.so")

_INT, _SIZE, _POINTER, _FLOAT = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
_OPERANDS = [_INT, _INT, _POINTER, _SIZE, _POINTER, _SIZE]  # dtype, tile, x, its row stride, w, its row stride
_PLACE = [_INT, _POINTER]  # device, stream
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "xclip_fast_abi": (_INT, []),
    "xclip_fast_error": (ctypes.c_char_p, [_INT]),
    "xclip_fast_check_device": (_INT, [_INT]),
    "xclip_fast_norm_linear": (
        _INT,
        [*_OPERANDS, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE, *_PLACE],
    ),
    "xclip_fast_linear_residual": (
        _INT,
        [*_OPERANDS, _POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, *_PLACE],
    ),
    "xclip_fast_linear_residual_statistics": (
        _INT,
        [*_OPERANDS, *[_POINTER] * 3, _SIZE, _FLOAT, *[_POINTER] * 4, _SIZE, _SIZE, _SIZE, *_PLACE],
    ),
    "xclip_fast_linear_slope": (
        _INT,
        [*_OPERANDS, _POINTER, _SIZE, *[_POINTER] * 3, _SIZE, _SIZE, _SIZE, *_PLACE],
    ),
    "xclip_fast_statistics_floats": (_SIZE, [_SIZE, _SIZE]),
    "xclip_fast_column_floats": (_SIZE, [_SIZE, _SIZE]),
    "xclip_fast_check_message": (_INT, [_SIZE, _INT]),
    "xclip_fast_message_floats": (_SIZE, [_SIZE, _SIZE]),
    "xclip_fast_message_kv": (
        _INT,
        [_INT, _INT, _INT, _POINTER, _SIZE, *[_POINTER] * 3, _FLOAT, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, *_PLACE],
    ),
    "xclip_fast_fp8_linear": (
        _INT,
        [*_OPERANDS[1:], *[_POINTER] * 3, _INT, _FLOAT, _POINTER, _SIZE, _SIZE, _SIZE, *_PLACE],
    ),
    "xclip_fast_fp8_linear_residual": (
        _INT,
        [*_OPERANDS[1:], *[_POINTER] * 3, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, *_PLACE],
    ),
    "xclip_fast_layer_norm_fp8": (
        _INT,
        [_INT, _POINTER, _SIZE, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER, _SIZE, _SIZE, *_PLACE],
    ),
    "xclip_fast_row_statistics": (
        _INT,
        [_INT, _POINTER, _SIZE, _FLOAT, _POINTER, _POINTER, _SIZE, _SIZE, *_PLACE],
    ),
    "xclip_fast_fold": (
        _INT,
        [_INT, _INT, _POINTER, _SIZE, _SIZE, *[_POINTER] * 6, _SIZE, _SIZE, *_PLACE],
    ),
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


def refuse_device(kind: str, index: int | None, message_width: int | None = None) -> str | None:
    """Why the library's products, or its message path of a width, do not run on this device, or None."""
    if kind != "cuda":
        return f"device {kind} is not cuda"
    library, reason = load(path())
    if library is None:
        return reason
    index = torch.cuda.current_device() if index is None else index
    if message_width is None:
        code = library.xclip_fast_check_device(index)
    else:
        code = library.xclip_fast_check_message(message_width, index)
    return f"the CUDA library says: {_words(library, code)}" if code else None


# what torch.compiler.assume_constant_result does, which would import the compiler (and Triton) with this package
refuse_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _words(library: Any, code: int) -> str:
    words = library.xclip_fast_error(code)
    return f"{words.decode()} (code {code})"


def _place(x: Tensor) -> tuple[int, int]:
    """Device and stream for a call."""
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


def _library() -> Any:
    library, reason = load(path())
    if library is None:
        raise RuntimeError(reason)
    return library


def _call(name: str, *args: Any) -> None:
    library = _library()
    given = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
    code = getattr(library, name)(*given)
    if code:
        shapes = ", ".join(f"{tuple(arg.shape)} {arg.dtype}" for arg in args if isinstance(arg, Tensor))
        raise RuntimeError(f"{name} failed with {shapes}: {_words(library, code)}")


# ---- its calls on tensors


def matrix(x: Tensor) -> Tensor:
    """x (..., K) as rows (M, K) that TMA reads: a view where base and row stride are in whole 16 bytes, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    step = 16 // x.element_size()
    fits = rows.stride(1) == 1 and rows.stride(0) >= rows.shape[1] and rows.stride(0) % step == 0
    if fits and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _measured(tile: str, call: str, x: Tensor, weight: Tensor, **sizes: int) -> str:
    """For the tile "auto" the one that was measured to be the fastest for such sizes, if any was."""
    name = f"cuda {call}"
    architecture = choices.architecture(x) if tile == "auto" and choices.known(name) else None
    if architecture is None:
        return tile
    where = {"dtype": str(x.dtype).removeprefix("torch."), "m": len(x), "n": len(weight), "k": x.shape[1], **sizes}
    return next(iter(choices.order(name, architecture, where)), tile)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    activation: bool = False,
    keep: bool = False,
    tile: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """y = act(r (x W^T - mu s) + b), and what the activation was applied to if ``keep``.

    Args:
        x: (M, K), weight: (N, K), one half-precision dtype. bias: (N,).
        norm: mu (M,), r (M,), s (N,), float32; None: no LayerNorm.

    Returns:
        (M, N) in x's dtype, twice if ``keep``.
    """
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    u = torch.empty_like(y) if keep else None
    if M:
        tile = _measured(tile, "norm_linear", x, weight, activation=int(activation))
        x, weight, bias = matrix(x), matrix(weight), _floats(bias)
        operands = (DTYPES[x.dtype], TILES[tile], x, x.stride(0), weight, weight.stride(0))
        rest = (*(norm or (None, None, None)), bias, int(activation), u, y)
        _call("xclip_fast_norm_linear", *operands, *rest, M, N, K, *_place(x))
    return y, u


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    scale: Tensor | None = None,
    *,
    tile: str = "auto",
) -> Tensor:
    """residual + scale (x W^T + b): x (M, K), weight (N, K), residual (M, N) of one half-precision dtype, bias (N,),
    scale (M,) -> (M, N)."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M:
        tile = _measured(tile, "linear_residual", x, weight)
        x, weight, residual, bias, scale = matrix(x), matrix(weight), matrix(residual), _floats(bias), _floats(scale)
        operands = (DTYPES[x.dtype], TILES[tile], x, x.stride(0), weight, weight.stride(0))
        rest = (bias, scale, residual, residual.stride(0), y)
        _call("xclip_fast_linear_residual", *operands, *rest, M, N, K, *_place(x))
    return y


def linear_residual_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    scale: Tensor | None,
    eps: float,
    *,
    tile: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """``linear_residual``, with the mean and 1 / sqrt(variance + eps) of its rows, float32 (M,) each."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
    if M:
        x, weight, residual, bias, scale = matrix(x), matrix(weight), matrix(residual), _floats(bias), _floats(scale)
        operands = (DTYPES[x.dtype], TILES[tile], x, x.stride(0), weight, weight.stride(0))
        rest = (bias, scale, residual, residual.stride(0), eps, _floats_of("statistics", M, N, x.device), mean, rstd, y)
        _call("xclip_fast_linear_residual_statistics", *operands, *rest, M, N, K, *_place(x))
    return y, mean, rstd


def linear_slope(
    x: Tensor, weight: Tensor, u: Tensor, *, column_sums: bool = False, tile: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """(x W^T) quick_gelu'(u), and, if wanted, the sums of its columns, float32 (N,).

    Args:
        x: (M, K), weight: (N, K), u: (M, N), of one half-precision dtype.

    Returns:
        (M, N), and (N,) or None.
    """
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    sums = torch.empty(N, dtype=torch.float32, device=x.device) if column_sums else None
    if M:
        tile = _measured(tile, "linear_slope", x, weight)
        x, weight, u = matrix(x), matrix(weight), matrix(u)
        operands = (DTYPES[x.dtype], TILES[tile], x, x.stride(0), weight, weight.stride(0))
        partials = _floats_of("column", M, N, x.device) if column_sums else None
        _call("xclip_fast_linear_slope", *operands, u, u.stride(0), partials, sums, y, M, N, K, *_place(x))
    elif sums is not None:
        sums.zero_()
    return y, sums


def _floats_of(what: str, M: int, N: int, device: torch.device) -> Tensor:
    """Room for what the library keeps beside a result of M and N: ``xclip_fast_<what>_floats``."""
    count = getattr(_library(), f"xclip_fast_{what}_floats")(M, N)
    return torch.empty(count, dtype=torch.float32, device=device)


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of the rows of x (M, D), float32 (M,) each."""
    M, D = x.shape
    mean, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2))
    if M:
        x = matrix(x)
        call = (DTYPES[x.dtype], x, x.stride(0), eps, mean, rstd, M, D)
        _call("xclip_fast_row_statistics", *call, *_place(x))
    return mean, rstd


def fold(weight: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """W' = W diag(gamma) (N, K) in W's dtype, the sums of its rows and W beta + bias, float32 (N,) each."""
    N, K = weight.shape
    folded = torch.empty(N, K, dtype=weight.dtype, device=weight.device)
    sums, shift = (torch.empty(N, dtype=torch.float32, device=weight.device) for _ in range(2))
    kinds = {parameter.dtype for parameter in (gamma, beta, bias) if parameter is not None}
    kind = kinds.pop() if len(kinds) == 1 else torch.float32
    gamma, beta = (parameter.to(kind).contiguous() for parameter in (gamma, beta))
    bias = None if bias is None else bias.to(kind).contiguous()
    call = (DTYPES[weight.dtype], DTYPES[kind], weight, weight.stride(0), weight.stride(1), gamma, beta, bias)
    _call("xclip_fast_fold", *call, folded, sums, shift, N, K, *_place(weight))
    return folded, sums, shift


def message_kv(
    x: Tensor,
    frames: int,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    eps: float,
    *,
    blocks: int = 0,
) -> Tensor:
    """The message path as one cooperative kernel, for few rows.

    Args:
        x: (F, D) class tokens of whole videos of ``frames``.
        weights: the message token's (D, D), CFA's QKV (3D, D) and output (D, D), IFA's key and value (2D, D), of x's
            half-precision dtype. biases: of their rows.
        norms: weight and bias (D,) of the LayerNorms before CFA and before IFA.
        blocks: of the grid; 0: the library chooses.

    Returns:
        (F, 2D) in x's dtype.
    """
    F, D = x.shape
    key_value = torch.empty(F, 2 * D, dtype=x.dtype, device=x.device)
    if F:
        x, weights = matrix(x), [weight.contiguous() for weight in weights]
        vectors = _alike(x.dtype, *biases, *norms)
        biases, norms = vectors[:4], vectors[4:]
        workspace = _floats_of("message", F, D, x.device)
        pointers = ((ctypes.c_void_p * 4)(*(t.data_ptr() for t in given)) for given in (weights, biases, norms))
        call = (DTYPES[x.dtype], DTYPES[biases[0].dtype], blocks, x, x.stride(0), *pointers, eps, F, frames, D)
        _call("xclip_fast_message_kv", *call, workspace, key_value, *_place(x))
    return key_value


def _alike(dtype: torch.dtype, *vectors: Tensor) -> list[Tensor]:
    """Contiguous, and of one dtype: this one if all have it, else float32."""
    if any(vector.dtype != dtype for vector in vectors):
        dtype = torch.float32
    return [vector.to(dtype).contiguous() for vector in vectors]


# ---- 8 bits, e4m3


def layer_norm_fp8(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LN(x) in e4m3, each row over its largest magnitude / 448: x (M, D) -> (M, D) and scales, float32 (M,)."""
    M, D = x.shape
    y = torch.empty(M, D, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    if M:
        x, gamma, beta = matrix(x), gamma.float().contiguous(), beta.float().contiguous()
        call = (DTYPES[x.dtype], x, x.stride(0), gamma, beta, eps, y, scale, M, D)
        _call("xclip_fast_layer_norm_fp8", *call, *_place(x))
    return y, scale


def _fp8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    h_scale: float,
    tile: str,
) -> Tensor:
    (M, K), N = x.shape, weight.shape[0]
    if M:
        x, weight, bias = matrix(x), matrix(weight), _floats(bias)
        x_scale, w_scale = x_scale.float().contiguous(), w_scale.float().contiguous()
        rest = (x_scale, w_scale, bias, int(y.dtype == x.dtype), h_scale, y, M, N, K)
        _call("xclip_fast_fp8_linear", TILES[tile], x, x.stride(0), weight, weight.stride(0), *rest, *_place(x))
    return y


def fp8_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, *, tile: str = "auto"
) -> Tensor:
    """x_scale w_scale (x W^T) + b: x (M, K), weight (N, K) e4m3, scales (M,) and (N,), bias (N,) -> (M, N) bfloat16."""
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16, device=x.device)
    return _fp8_linear(x, x_scale, weight, w_scale, bias, y, 1.0, tile)


def fp8_linear_gelu(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    h_scale: float,
    *,
    tile: str = "auto",
) -> Tensor:
    """quick_gelu of what ``fp8_linear`` computes, over ``h_scale``, in e4m3, saturated at 448: (M, N)."""
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    return _fp8_linear(x, x_scale, weight, w_scale, bias, y, h_scale, tile)


def fp8_linear_residual(
    x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, residual: Tensor, *, tile: str = "auto"
) -> Tensor:
    """residual + w_scale (x W^T) + b: x (M, K), weight (N, K) e4m3, w_scale (N,) with the scale of x in it, bias (N,),
    residual (M, N) bf16 -> bf16 (M, N)."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=torch.bfloat16, device=x.device)
    if M:
        x, weight, residual, bias = matrix(x), matrix(weight), matrix(residual), _floats(bias)
        w_scale = w_scale.float().contiguous()
        rest = (w_scale, bias, residual, residual.stride(0), y, M, N, K)
        _call(
            "xclip_fast_fp8_linear_residual", TILES[tile], x, x.stride(0), weight, weight.stride(0), *rest, *_place(x)
        )
    return y
