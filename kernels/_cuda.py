"""The CUDA library of csrc/ behind ``ln_linear``, ``linear_residual`` and ``mlp``, loaded with ctypes: products on
Hopper's tensor cores with the block's epilogues.

Nothing of it has been measured or run on a GPU yet, so it is never chosen by itself: only ``XCLIP_FAST_BACKEND=cuda``
and ``with backend("cuda")`` take it. A library that is missing, or of another interface, is a reason of refusal.

M rows, N columns, K summed; docs/kernels.md derives the epilogues. Memory comes from torch, work goes on torch's
current stream, nothing waits.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._dispatch import Backend, forced_backend
from .quick_gelu import quick_gelu_reference

ABI = 1  # XCLIP_FAST_ABI of csrc/include/xclip_fast.h
TILES = {"auto": -1, "small": 0, "square": 1, "wide": 2}
DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
HALF = (torch.bfloat16, torch.float16)
# Rows from which LayerNorm is folded into the product: with fewer, folding the weight costs more. Not measured.
FOLD_FROM = 4096
UNMEASURED = "not measured on a GPU yet, so taken only if asked for (XCLIP_FAST_BACKEND=cuda or backend('cuda'))"
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
    "xclip_fast_linear_slope": (
        _INT,
        [*_OPERANDS, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, *_PLACE],
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


@torch.compiler.assume_constant_result
def refuse_device(kind: str, index: int | None) -> str | None:
    """Why the library does not run on this device, or None."""
    if kind != "cuda":
        return f"device {kind} is not cuda"
    index = torch.cuda.current_device() if index is None else index
    properties = torch.cuda.get_device_properties(index)
    if (properties.major, properties.minor) != (9, 0):
        return f"compute capability {properties.major}.{properties.minor} is not 9.0"
    library, reason = load(path())
    if library is None:
        return reason
    code = library.xclip_fast_check_device(index)
    return f"the CUDA library says: {_words(library, code)}" if code else None


def _words(library: Any, code: int) -> str:
    words = library.xclip_fast_error(code)
    return f"{words.decode()} (code {code})"


def _place(x: Tensor) -> tuple[int, int]:
    """Device and stream for a call."""
    return x.get_device(), torch.cuda.current_stream(x.device).cuda_stream


def _call(name: str, *args: Any) -> None:
    library, reason = load(path())
    if library is None:
        raise RuntimeError(reason)
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
        x, weight, residual, bias, scale = matrix(x), matrix(weight), matrix(residual), _floats(bias), _floats(scale)
        operands = (DTYPES[x.dtype], TILES[tile], x, x.stride(0), weight, weight.stride(0))
        rest = (bias, scale, residual, residual.stride(0), y)
        _call("xclip_fast_linear_residual", *operands, *rest, M, N, K, *_place(x))
    return y


def linear_slope(x: Tensor, weight: Tensor, u: Tensor, *, tile: str = "auto") -> Tensor:
    """(x W^T) quick_gelu'(u): x (M, K), weight (N, K), u (M, N) of one half-precision dtype -> (M, N)."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if M:
        x, weight, u = matrix(x), matrix(weight), matrix(u)
        operands = (DTYPES[x.dtype], TILES[tile], x, x.stride(0), weight, weight.stride(0))
        _call("xclip_fast_linear_slope", *operands, u, u.stride(0), y, M, N, K, *_place(x))
    return y


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


# ---- the ops


def _normalised(rows: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> tuple[Tensor, ...]:
    """(rows, gamma, beta, LN(rows), mean, rstd) in the dtype that LayerNorm runs in: that of all, or float32."""
    kind = rows.dtype if rows.dtype == gamma.dtype == beta.dtype else torch.float32
    rows, gamma, beta = rows.to(kind), gamma.to(kind), beta.to(kind)
    return rows, gamma, beta, *torch.ops.aten.native_layer_norm(rows, [rows.shape[1]], gamma, beta, eps)


def _project(
    rows: Tensor,
    gamma: Tensor,
    beta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: bool,
    save: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """act(LN(rows) W^T + bias), and, if ``save``, the rows' mean and rstd and the pre-activation if there is one."""
    keep = activation and save
    fold_it = rows.dtype == weight.dtype and rows.shape[0] >= FOLD_FROM
    statistics = row_statistics(rows, eps) if fold_it or save else ()
    if fold_it:
        folded, sums, shift = fold(weight, gamma, beta, bias)
        norm = (*statistics, sums)
        y, u = norm_linear(rows, folded, shift, norm, activation=activation, keep=keep)
    else:
        normed = _normalised(rows, gamma, beta, eps)[3].to(weight.dtype)
        y, u = norm_linear(normed, weight, bias, activation=activation, keep=keep)
    if not save:
        return y, ()
    return y, statistics if u is None else (*statistics, u)


def _slope(u: Tensor) -> Tensor:
    """d quick_gelu / du in float32."""
    u = u.float()
    s = torch.sigmoid(1.702 * u)
    return s * (1 + 1.702 * u * (1 - s))


def _linear_backward(
    du: Tensor, rows: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, eps: float, needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of LN(rows) W^T that ``needs`` names, among rows, gamma, beta, weight; LN(rows) is recomputed."""
    result = []
    wide, wide_gamma, wide_beta, normed, mean, rstd = _normalised(rows, gamma, beta, eps)
    if any(needs[:3]):
        dnormed = torch.mm(du, weight).to(normed.dtype)
        grads = torch.ops.aten.native_layer_norm_backward(
            dnormed, wide, [wide.shape[1]], mean, rstd, wide_gamma, wide_beta, list(needs[:3])
        )
        for grad, like, need in zip(grads, (rows, gamma, beta), needs, strict=False):
            if need:
                result.append(grad.to(like.dtype))
    if needs[3]:
        result.append(torch.mm(du.T, normed.to(weight.dtype)))
    return result


def _ln_linear(
    save: bool,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows = x.reshape(-1, x.shape[-1])
    y, saved = _project(rows, ln_weight, ln_bias, weight, bias, eps, activation, save)
    return (y.view(*x.shape[:-1], weight.shape[0]),), saved


def _ln_linear_backward(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    activation: bool,
) -> list[Tensor]:
    du = grads[0].reshape(-1, weight.shape[0])
    if activation:
        du = du * _slope(saved[2])
    dbias = du.sum(0, dtype=torch.float32) if needs[4] and bias is not None else None
    rows = x.reshape(-1, x.shape[-1])
    result = _linear_backward(du.to(weight.dtype), rows, ln_weight, ln_bias, weight, eps, needs)
    if needs[0]:
        result[0] = result[0].view(x.shape)
    if dbias is not None and bias is not None:
        result.append(dbias.to(bias.dtype))
    return result


def _sample_scale(drop_scale: Tensor | None, rows: int) -> Tensor | None:
    """A sample's drop path factor for each of its rows: (B,) -> (M,) float32."""
    if drop_scale is None or rows == 0:
        return None
    samples = drop_scale.shape[0]
    return drop_scale.float()[:, None].expand(samples, rows // samples).reshape(rows)


def _add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, drop_scale: Tensor | None) -> Tensor:
    """residual + s (x W^T + b) on rows. A residual of another dtype is added outside the product."""
    scale = _sample_scale(drop_scale, x.shape[0])
    if residual.dtype == x.dtype:
        return linear_residual(x, weight, bias, residual, scale)
    product, _ = norm_linear(x, weight, bias)
    return residual + (product if scale is None else product * scale[:, None])


def _linear_residual(
    save: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    drop_scale: Tensor | None,
    eps: float,
    statistics: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows = x.reshape(-1, x.shape[-1]).to(weight.dtype)
    y = _add(rows, weight, bias, residual.reshape(-1, weight.shape[0]), drop_scale)
    if statistics:
        mean, rstd = (row.view(residual.shape[:-1]) for row in row_statistics(y, eps))
    else:
        mean, rstd = (torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
    return (y.view(residual.shape), mean, rstd), ()


def _dproduct(dy: Tensor, weight: Tensor, drop_scale: Tensor | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """s dy in the weight's dtype, and a function that sums it over the rows like a bias, in a bias's dtype."""
    dy = dy.reshape(-1, weight.shape[0])
    scale = _sample_scale(drop_scale, dy.shape[0])
    scaled = dy if scale is None else dy * scale[:, None]
    return scaled.to(weight.dtype), lambda bias: scaled.sum(0, dtype=torch.float32).to(bias.dtype)


def _refuse_drop_gradient(need: bool) -> None:
    if need:
        raise NotImplementedError(
            "drop_scale requires a gradient, which the cuda backend does not compute: detach it, or use "
            "xclip_fast.kernels.backend('reference')"
        )


def _linear_residual_backward(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    drop_scale: Tensor | None,
    eps: float,
    statistics: bool,
) -> list[Tensor]:
    _refuse_drop_gradient(needs[4])
    result = []
    dproduct, dbias = _dproduct(grads[0], weight, drop_scale)
    if needs[0]:
        result.append(torch.mm(dproduct, weight).view(x.shape).to(x.dtype))
    if needs[1]:
        result.append(torch.mm(dproduct.T, x.reshape(-1, x.shape[-1]).to(weight.dtype)))
    if needs[2]:
        result.append(dbias(bias))
    if needs[3]:
        result.append(grads[0].to(residual.dtype))
    return result


def _mlp(
    save: bool,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    drop_scale: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows = x.reshape(-1, x.shape[-1])
    hidden, saved = _project(rows, ln_weight, ln_bias, weight1, bias1, eps, True, save)
    return (_add(hidden, weight2, bias2, rows, drop_scale).view(x.shape),), saved


def _mlp_backward(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    drop_scale: Tensor | None,
) -> list[Tensor]:
    _refuse_drop_gradient(needs[8])
    u = saved[2]
    dproduct, dbias2 = _dproduct(grads[0], weight2, drop_scale)
    # du = (s dy W2) quick_gelu'(u)
    du = linear_slope(dproduct, weight2.T, u)
    result = _linear_backward(du, x.reshape(-1, x.shape[-1]), ln_weight, ln_bias, weight1, eps, needs)
    if needs[0]:
        result[0] = result[0].view(x.shape) + grads[0].to(x.dtype)
    if needs[4]:
        result.append(du.sum(0, dtype=torch.float32).to(bias1.dtype))
    if needs[5]:
        result.append(torch.mm(dproduct.T, quick_gelu_reference(u)))
    if needs[6]:
        result.append(dbias2(bias2))
    return result


# ---- what it supports


def _refuse(x: Tensor, *weights: Tensor) -> str | None:
    """Why products of x with these weights are not taken, or None."""
    if forced_backend() != "cuda":
        return UNMEASURED
    reason = refuse_device(x.device.type, x.device.index)
    if reason is not None:
        return reason
    autocast = torch.is_autocast_enabled(x.device.type)
    for weight in weights:
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.dtype
        if dtype not in HALF:
            return f"a weight of dtype {dtype} is not bfloat16 or float16"
        if x.dtype not in (dtype, torch.float32) and not autocast:
            return f"x of dtype {x.dtype} beside a weight of dtype {dtype}"
        if weight.shape[0] % 8 or weight.shape[1] % 8 or 0 in weight.shape:
            return f"weight {tuple(weight.shape)}: both sizes must be multiples of 8, for rows in whole 16 bytes"
    return None


def cuda_backend(op: str, refuse: Callable[..., str | None] | None = None) -> Backend:
    """The backend of one of the three ops; ``refuse`` gives the op's own reasons, of any backend with kernels."""
    forward, backward, weights = {
        "ln_linear": (_ln_linear, _ln_linear_backward, (3,)),
        "linear_residual": (_linear_residual, _linear_residual_backward, (1,)),
        "mlp": (_mlp, _mlp_backward, (3, 5)),
    }[op]

    def refusal(*args: Any) -> str | None:
        reason = _refuse(args[0], *(args[index] for index in weights))
        return reason or (refuse(*args) if refuse else None)

    return Backend("cuda", forward, backward, refuse=refusal)
