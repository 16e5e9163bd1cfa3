"""The products of a block with what rides in their epilogues, or in one pass beside them: cuBLAS, Triton, CUTLASS.

M rows, D width, I columns summed, O columns out.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cuda_library, triton
from ..common.block import GELUS
from ..common.derived import cast, kept
from ..dispatch.parts import Case, Part
from ..dispatch.support import HALF, ON_TRITON, TRITON, UNMEASURED, Backend

if TYPE_CHECKING:
    from ..triton.rows import Spare

# Rows from which LayerNorm is folded into a product: with fewer, folding the weight costs more than it saves. Not
# measured.
FOLD_FROM = 4096


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
# first, which is when the Normed returned holds rows.
# Its backward(dy (M, D), weight (D, O), u (M, O), activation, keep) is that of the product behind its activation: du =
# (dy W) act'(u), the sums of its columns in float32, and act(u), if ``keep`` asks for it.
# A candidate of "linear_residual": forward(a (M, I), weight (D, I), bias (D,), Target) returns z and Normed of it.


def _normed(
    save: bool, x: Tensor, known: Normed, norm: Norm, dtype: torch.dtype, spare: "Spare | None" = None
) -> Normed:
    if known.rows is not None and (known.mean is not None or not save):
        return known
    _, rows, mean, rstd = triton.layer_norm.normalize(x, norm.weight, norm.bias, norm.eps, dtype, save, spare=spare)
    return Normed(rows, mean, rstd)


def _activate(save: bool, u: Tensor, activation: str) -> Tensor:
    if activation in GELUS:
        return F.gelu(u, approximate=GELUS[activation])
    return triton.quick_gelu.quick_gelu(u, None if save else u)


def _library_norm_linear(
    save: bool, x: Tensor, known: Normed, layer: Layer, spare: "Spare | None" = None
) -> tuple[Tensor, Tensor | None, Normed]:
    norm, weight, bias, activation = layer
    known = _normed(save, x, known, norm, weight.dtype, spare)
    assert known.rows is not None
    y = F.linear(known.rows, weight, cast(bias, weight.dtype))
    return (_activate(save, y, activation), y, known) if activation else (y, None, known)


def _slope(dy: Tensor, weight: Tensor, u: Tensor, activation: str, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    dh = torch.mm(dy, weight)
    if activation in GELUS:
        du = torch.ops.aten.gelu_backward(dh, u, approximate=GELUS[activation])
        return du, du.sum(0, dtype=torch.float32), _activate(True, u, activation) if keep else None
    return triton.column_sums.scaled(dh, weight.dtype, slope_at=u, keep=keep)


def _library_residual(a: Tensor, weight: Tensor, bias: Tensor, to: Target) -> tuple[Tensor, Normed]:
    # product, then one pass: bias, drop path, residual, LayerNorm, statistics
    branch = triton.layer_norm.Branch(F.linear(a, weight), bias, to.drop_scale, to.later)
    ln_weight, ln_bias, eps = to.norm or (None, None, 0.0)
    dtype = to.dtype if to.norm else None
    z, rows, mean, rstd = triton.layer_norm.normalize(to.x, ln_weight, ln_bias, eps, dtype, to.statistics, branch)
    return z, Normed(rows, mean, rstd)


# The functions of the CUDA library take the same arguments as Triton's GEMM, as far as they have them.


def _fused_norm_linear(
    product: Callable[..., tuple[Tensor, ...]],
    save: bool,
    x: Tensor,
    known: Normed,
    layer: Layer,
    spare: "Spare | None" = None,
) -> tuple[Tensor, Tensor | None, Normed]:
    norm, weight, bias, activation = layer
    keep = bool(activation) and save
    options = {"activation": bool(activation), "keep": keep}
    if known.rows is None and x.dtype == weight.dtype != torch.float32 and x.shape[0] >= FOLD_FROM:
        mean, rstd = known.mean, known.rstd
        if mean is None or rstd is None:
            mean, rstd = triton.layer_norm.row_statistics(x, norm.eps)
        folded, sums, shift = kept("fold", triton.fold.fold, weight, norm.weight, norm.bias, bias)
        found, known = product(x, folded, bias=shift, norm=(mean, rstd, sums), **options), Normed(None, mean, rstd)
    else:
        known = _normed(save, x, known, norm, weight.dtype, spare)
        found = product(known.rows, weight, bias=bias, **options)
    return found[0], found[1] if keep else None, known


def _fused_residual(
    product: Callable[..., tuple[Tensor, ...]], a: Tensor, weight: Tensor, bias: Tensor, to: Target
) -> tuple[Tensor, Normed]:
    eps = to.norm.eps if to.norm else 0.0
    # a product reads only rows of its own dtype: what normalizes other rows first computes their statistics
    wanted = eps if (to.statistics or to.norm) and to.x.dtype == weight.dtype else None
    z, *found = product(a, weight, bias=bias, residual=to.x, drop_scale=to.drop_scale, statistics_eps=wanted)
    return z, Normed(None, *found)


def _refuse_float32(case: Case) -> str | None:
    if case.activation in GELUS:
        return "its epilogue has quick_gelu only"
    if case.dtype == torch.float32 and case.forced != "triton":
        return "exact float32 products use no tensor cores: left to the library unless it is asked for"
    return None


def _refuse_cuda(case: Case) -> str | None:
    if case.activation in GELUS:
        return "its epilogue has quick_gelu only"
    if case.training and not cuda_library.tiles("NormGeluKept", case.dtype):
        return f"it was not built for training in {case.dtype}"
    if case.width % 8 or case.hidden % 8:
        return f"width {case.width}, {case.hidden} in the FFN: multiples of 8 wanted, for rows in whole 16 bytes"
    return cuda_library.refuse_device(case.device.type, case.device.index)


def _refuse_cuda_residual(case: Case) -> str | None:
    if case.training:
        return "it computes no gradients"
    if case.stream != case.dtype:
        return f"a residual stream of {case.stream} beside weights of {case.dtype}"
    return _refuse_cuda(case)


def _backends(
    library: Any, fused: Any, on_cuda: Any, refuse_cuda: Any, slope: Any = None, cuda_slope: Any = None
) -> tuple[Backend, ...]:
    saved: dict[str, Any] = {"saved": lambda *_: ()}  # the block saves what they want
    own: dict[str, Any] = {"opt_in": UNMEASURED, **saved}
    on_cuda = functools.partial(fused, on_cuda)
    on_triton = functools.partial(fused, lambda *args, **options: triton.gemm.gemm(*args, **options))
    return (
        Backend("library", library, slope, dtypes=ON_TRITON, **saved),
        Backend("triton", on_triton, slope, refuse=_refuse_float32, **TRITON, **own),
        Backend("cuda", on_cuda, cuda_slope, dtypes=HALF, refuse=refuse_cuda, partial=True, **own),
    )


NORM_LINEAR = Part(
    "norm_linear",
    *_backends(
        *(_library_norm_linear, _fused_norm_linear, cuda_library.norm_linear, _refuse_cuda),
        *(_slope, lambda dy, weight, u, *_: cuda_library.slope(dy, weight, u)),
    ),
)
LINEAR_RESIDUAL = Part(
    "linear_residual",
    *_backends(_library_residual, _fused_residual, cuda_library.linear_residual, _refuse_cuda_residual),
)
