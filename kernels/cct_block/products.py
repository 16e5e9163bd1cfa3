"""The products of a block with what rides in their epilogues, or in one pass beside them: cuBLAS, Triton, CUTLASS.

M rows, D width, I columns summed, O columns out.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cuda_library
from ..arguments import GELUS
from ..derived import cast, kept
from ..parts import HALF, UNMEASURED, Candidate, Case, Part

if TYPE_CHECKING:
    from ..triton.layer_norm import Spare

# Rows from which LayerNorm is folded into the CUDA library's product: with fewer, folding the weight costs more than
# it saves. Not measured.
FOLD_FROM = 4096
FLOATS = (*HALF, torch.float32)


class Normed(NamedTuple):
    """What is known of LN(x): itself, and the statistics of x's rows (M,) float32; None for what is not there."""

    rows: Tensor | None = None  # (M, D)
    mean: Tensor | None = None
    rstd: Tensor | None = None


class Norm(NamedTuple):
    """A LayerNorm."""

    weight: Tensor
    bias: Tensor
    eps: float


class Layer(NamedTuple):
    """act(LN(x) W^T + b)."""

    norm: Norm
    weight: Tensor  # (O, D)
    bias: Tensor  # (O,)
    activation: str = ""  # "", "quick_gelu" or one of GELUS


class Target(NamedTuple):
    """What a product is added to, and what is wanted of the sum z = x + s (a W^T + b)."""

    x: Tensor  # (M, D)
    drop_scale: Tensor | None = None  # s of each sample
    norm: Norm | None = None  # LN(z), where that costs nothing, in dtype
    dtype: torch.dtype | None = None
    statistics: bool = False
    later: Tensor | None = None  # (D,): added to the z that is returned, not to what is normalized; library only


# A candidate of "norm_linear": forward(save, x (M, D), Normed, Layer, spare) returns y (M, O), what the activation was
# applied to if ``save``, and Normed with statistics if ``save``. spare takes the place of rows of x if x is normalized
# first, which is when the Normed returned holds rows. backward(dy, weight2, u, activation, keep) returns du = (dy W2)
# act'(u), the sums of its columns, and act(u) if ``keep``.
# A candidate of "linear_residual": forward(a (M, I), weight (D, I), bias (D,), Target) returns z and Normed of it.


def _normed(
    save: bool, x: Tensor, known: Normed, norm: Norm, dtype: torch.dtype, spare: "Spare | None" = None
) -> Normed:
    from ..triton.layer_norm import normalise

    if known.rows is not None and (known.mean is not None or not save):
        return known
    _, rows, mean, rstd = normalise(x, norm.weight, norm.bias, norm.eps, dtype, save, spare=spare)
    return Normed(rows, mean, rstd)


def _activate(save: bool, u: Tensor, activation: str) -> Tensor:
    if activation in GELUS:
        return F.gelu(u, approximate=GELUS[activation])
    from ..triton.quick_gelu import quick_gelu

    return quick_gelu(u, None if save else u)


def _library_norm_linear(
    save: bool, x: Tensor, known: Normed, layer: Layer, spare: "Spare | None" = None
) -> tuple[Tensor, Tensor | None, Normed]:
    norm, weight, bias, activation = layer
    known = _normed(save, x, known, norm, weight.dtype, spare)
    assert known.rows is not None
    y = torch.addmm(cast(bias, weight.dtype), known.rows, weight.T)
    return (_activate(save, y, activation), y, known) if activation else (y, None, known)


def _library_slope(
    dy: Tensor, weight: Tensor, u: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    dh = torch.mm(dy, weight)
    if activation in GELUS:
        du = torch.ops.aten.gelu_backward(dh, u, approximate=GELUS[activation])
        return du, du.sum(0, dtype=torch.float32), _activate(True, u, activation) if keep else None
    from ..triton.column_sums import scaled

    return scaled(dh, weight.dtype, slope_at=u, keep=keep)


def _library_residual(a: Tensor, weight: Tensor, bias: Tensor, to: Target) -> tuple[Tensor, Normed]:
    from ..triton.layer_norm import Branch, normalise

    # product, then one pass: bias, drop path, residual, LayerNorm, statistics
    branch = Branch(torch.mm(a, weight.T), bias, to.drop_scale, to.later)
    ln_weight, ln_bias, eps = to.norm or (None, None, 0.0)
    z, rows, mean, rstd = normalise(to.x, ln_weight, ln_bias, eps, to.dtype if to.norm else None, to.statistics, branch)
    return z, Normed(rows, mean, rstd)


def _triton_norm_linear(
    save: bool, x: Tensor, known: Normed, layer: Layer, spare: "Spare | None" = None
) -> tuple[Tensor, Tensor | None, Normed]:
    norm, weight, bias, activation = layer
    from ..triton.fold import fold
    from ..triton.gemm import gemm
    from ..triton.launching import tile
    from ..triton.layer_norm import row_statistics

    keep = bool(activation) and save
    sizes = {"m": x.shape[0], "n": weight.shape[0], "k": weight.shape[1]}
    half = x.dtype == weight.dtype != torch.float32
    if known.rows is None and half and tile("ln_linear", x.device, **sizes)["FOLD"]:
        mean, rstd = known.mean, known.rstd
        if mean is None or rstd is None:
            mean, rstd = row_statistics(x, norm.eps)
        folded, sums, shift = kept("fold", fold, weight, norm.weight, norm.bias, bias)
        y, *u = gemm(x, folded, bias=shift, norm=(mean, rstd, sums), activation=bool(activation), keep=keep)
        return y, u[0] if keep else None, Normed(None, mean, rstd)
    known = _normed(save, x, known, norm, weight.dtype, spare)
    assert known.rows is not None
    y, *u = gemm(known.rows, weight, bias=bias, activation=bool(activation), keep=keep)
    return y, u[0] if keep else None, known


def _triton_slope(
    dy: Tensor, weight: Tensor, u: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    from ..triton.gemm import gemm

    du, *rest = gemm(dy, weight.T, slope_at=u, keep=keep, sums=True)
    return du, rest[-1], rest[0] if keep else None


def _triton_residual(a: Tensor, weight: Tensor, bias: Tensor, to: Target) -> tuple[Tensor, Normed]:
    from ..triton.gemm import gemm

    eps = to.norm.eps if to.norm else 0.0
    wanted = eps if to.statistics or to.norm else None
    z, *found = gemm(a, weight, bias=bias, residual=to.x, drop_scale=to.drop_scale, statistics_eps=wanted)
    return z, Normed(None, *found)


def _cuda_norm_linear(
    save: bool, x: Tensor, known: Normed, layer: Layer, spare: "Spare | None" = None
) -> tuple[Tensor, Tensor | None, Normed]:
    norm, weight, bias, activation = layer
    keep = bool(activation) and save
    if known.rows is None and x.dtype == weight.dtype and x.shape[0] >= FOLD_FROM:
        mean, rstd = known.mean, known.rstd
        if mean is None or rstd is None:
            mean, rstd = cuda_library.row_statistics(x, norm.eps)
        folded, sums, shift = kept("cuda fold", cuda_library.fold, weight, norm.weight, norm.bias, bias)
        y, u = cuda_library.norm_linear(x, folded, shift, (mean, rstd, sums), activation=bool(activation), keep=keep)
        return y, u, Normed(None, mean, rstd)
    known = _normed(save, x, known, norm, weight.dtype, spare)
    assert known.rows is not None
    y, u = cuda_library.norm_linear(known.rows, weight, bias, activation=bool(activation), keep=keep)
    return y, u, known


def _cuda_slope(
    dy: Tensor, weight: Tensor, u: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    du, sums = cuda_library.linear_slope(dy, weight.T, u, column_sums=True)
    assert sums is not None
    return du, sums, _activate(True, u, activation) if keep else None


def _cuda_residual(a: Tensor, weight: Tensor, bias: Tensor, to: Target) -> tuple[Tensor, Normed]:
    scale = None
    if to.drop_scale is not None:
        samples = to.drop_scale.shape[0]
        scale = to.drop_scale.float()[:, None].expand(samples, to.x.shape[0] // samples).reshape(-1)
    if to.norm is None and not to.statistics:
        return cuda_library.linear_residual(a, weight, bias, to.x, scale), Normed()
    eps = to.norm.eps if to.norm else 0.0
    z, mean, rstd = cuda_library.linear_residual_statistics(a, weight, bias, to.x, scale, eps)
    return z, Normed(None, mean, rstd)


def _refuse_float32(case: Case) -> str | None:
    if case.activation in GELUS:
        return "its epilogue has quick_gelu only"
    if case.dtype == torch.float32 and case.forced != "triton":
        return "exact float32 products use no tensor cores: left to the library unless it is asked for"
    return None


def _refuse_cuda(case: Case) -> str | None:
    if case.activation in GELUS:
        return "its epilogue has quick_gelu only"
    if case.stream != case.dtype:
        return f"a residual stream of {case.stream} beside weights of {case.dtype}"
    if case.width % 8 or case.hidden % 8:
        return f"width {case.width}, {case.hidden} in the FFN: multiples of 8 wanted, for rows in whole 16 bytes"
    return cuda_library.refuse_device(case.device.type, case.device.index)


def _nothing(*_: Any) -> tuple[Tensor, ...]:
    """What a product saves beside what the block does."""
    return ()


def _candidates(library: Any, triton: Any, cuda: Any, *backward: Callable[..., Any] | None) -> tuple[Candidate, ...]:
    slopes = backward or (None, None, None)
    return (
        Candidate("library", library, slopes[0], dtypes=FLOATS, device_types=(), saved=_nothing),
        Candidate(
            "triton",
            triton,
            slopes[1],
            dtypes=FLOATS,
            capability=8,
            package="triton",
            opt_in=UNMEASURED,
            refuse=_refuse_float32,
            saved=_nothing,
        ),
        Candidate("cuda", cuda, slopes[2], device_types=(), opt_in=UNMEASURED, refuse=_refuse_cuda, saved=_nothing),
    )


NORM_LINEAR = Part(
    "norm_linear",
    *_candidates(
        _library_norm_linear,
        _triton_norm_linear,
        _cuda_norm_linear,
        _library_slope,
        _triton_slope,
        _cuda_slope,
    ),
)
LINEAR_RESIDUAL = Part("linear_residual", *_candidates(_library_residual, _triton_residual, _cuda_residual))
