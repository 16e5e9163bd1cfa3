"""Two ops whose products are in float8 (e4m3), for inference: LayerNorm and a linear layer, and a whole FFN.

What is normalized is quantized row by row, a weight channel by channel. The products are those of the CUDA library;
without it the ops are emulated. M rows, D width, O columns. docs/kernels.md says what is quantized, and how.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cuda_library, triton
from ..common.example import FLOAT8, Maker, Sizes
from ..dispatch import Op
from ..dispatch.support import FLOATS, Backend, installed
from ..layer_norm import WIDEST_ROW
from ..quick_gelu import quick_gelu_reference

LARGEST = 448.0  # of e4m3
OPERANDS = (*FLOATS, FLOAT8)  # the dtypes among an op's arguments
STEP = 16  # widths are multiples of it where tensor cores read whole 16 bytes


def saturate(x: Tensor) -> Tensor:
    """x in e4m3, rounded to the nearest, what is too large to its largest."""
    return x.clamp(-LARGEST, LARGEST).to(FLOAT8)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) float32 as e4m3 (..., K) and a scale for each row (...), float32, so that the row's largest is 448.

    A row of zeros has the scale 1.
    """
    largest = x.abs().amax(-1)
    scale = torch.where(largest == 0, 1.0, largest / LARGEST)
    return saturate(x / scale[..., None]), scale


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight for the ops on float8, with a scale for each output channel.

    Args:
        weight: (O, I), floating.

    Returns:
        the weight / scale in e4m3 (O, I), and the scale (O,), float32: the channel's largest value / 448.
    """
    return quantize_rows(weight.detach().float())


def normed_rows(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``quantize_rows`` of LN(x), which is computed in float32 whatever the dtypes."""
    return quantize_rows(F.layer_norm(x.float(), (x.shape[-1],), ln_weight.float(), ln_bias.float(), eps))


def _exact_product(x8: Tensor, weight8: Tensor) -> Tensor:
    """x8 W8^T in float32, in which products of two e4m3 numbers are exact: (..., K), (N, K) -> (..., N)."""
    return F.linear(x8.float(), weight8.float())


def _normed_in_one_pass(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``normed_rows`` of x (M, K): one pass of Triton's on a GPU."""
    if not (x.is_cuda and installed("triton")) or x.shape[-1] > WIDEST_ROW:
        return normed_rows(x, ln_weight, ln_bias, eps)
    return triton.layer_norm.layer_norm_fp8(x, ln_weight, ln_bias, eps)


def _refuse(x: Tensor, *weights: Tensor) -> str | None:
    """Why no product in float8 is taken for x and these weights, or None."""
    if x.dtype != torch.bfloat16:
        return f"x of dtype {x.dtype} is not bfloat16"
    for weight in weights:
        if weight.shape[0] % STEP or weight.shape[1] % STEP:
            return f"weight {tuple(weight.shape)}: both sizes must be multiples of {STEP}"
    return None


def _op(
    reference: Callable[..., Tensor],
    compute: Callable[..., Tensor],
    weights: slice,
    example: Callable[[Sizes, Maker], tuple[Any, ...]],
) -> Op:
    """An op with its backend. weights: the places of its weights among the arguments."""
    return Op(
        reference,
        Backend(
            "cuda",
            lambda save, *args: ((compute(*args),), ()),
            dtypes=OPERANDS,
            refuse=lambda x, *args: (
                cuda_library.refuse_device(x.device.type, x.device.index) or _refuse(x, *args[weights])
            ),
            inference_only=True,
        ),
        example=example,
        dtypes=OPERANDS,
        differentiable=False,
    )


def _check(x: Tensor, *weights: Tensor) -> None:
    """Raise TypeError unless x is floating and no float8, and the weights are e4m3."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x of dtype {x.dtype} given; the residual stream wanted, as it is: the op quantizes LN(x)")
    for weight in weights:
        if weight.dtype != FLOAT8:
            raise TypeError(f"a weight of dtype {weight.dtype} given; {FLOAT8} wanted, from kernels.quantize_weight")


def _example_linear(make: Maker, out: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight in float8, its scales, and the bias of a linear layer."""
    weight, bias = make.linear(out, inner)
    if make.empty:
        return weight.to(FLOAT8), bias.float(), bias
    return *quantize_weight(weight), bias


# ---- ln_linear_fp8


def ln_linear_fp8_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        x8, x_scale = normed_rows(x, ln_weight, ln_bias, eps)
        y = _exact_product(x8, weight8) * x_scale[..., None] * weight_scale.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _ln_linear(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, *rest: Any) -> Tensor:
    *linear, eps = rest
    normed = _normed_in_one_pass(x.reshape(-1, x.shape[-1]), ln_weight, ln_bias, eps)
    return cuda_library.fp8_linear(*normed, *linear).view(*x.shape[:-1], linear[0].shape[0])


_ln_linear_op = _op(
    ln_linear_fp8_reference,
    _ln_linear,
    slice(2, 3),
    lambda sizes, make: (
        make.normal(sizes.sequences, sizes.tokens, sizes.width),
        *make.norm(sizes.width),
        *_example_linear(make, 3 * sizes.width, sizes.width),
        1e-5,
    ),
)


def ln_linear_fp8(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    """LN(x) W^T + b with the product in float8 (e4m3), for inference: ``ln_linear`` of equation 8.

    LN(x), in float32, is quantized with the scale s_m = its row's largest value / 448, so the result is
    s_m weight_scale (x8 W8^T) + b.

    Args:
        x: (..., D), floating.
        ln_weight, ln_bias: (D,).
        weight8: (O, D), float8_e4m3fn; weight_scale: (O,), from ``quantize_weight``. bias: (O,) or None.
        eps: of the LayerNorm.

    Returns:
        (..., O) in x's dtype.

    Raises:
        TypeError: if the weight is not in e4m3, or x is in float8.
        RuntimeError: if a gradient is wanted.
    """
    _check(x, weight8)
    return _ln_linear_op(x, ln_weight, ln_bias, weight8, weight_scale, bias, eps)


# ---- mlp_fp8


def mlp_fp8_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1_8: Tensor,
    weight1_scale: Tensor,
    bias1: Tensor,
    weight2_8: Tensor,
    weight2_scale: Tensor,
    bias2: Tensor,
    hidden_scale: float,
    eps: float,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        x8, x_scale = normed_rows(x, ln_weight, ln_bias, eps)
        u = _exact_product(x8, weight1_8) * x_scale[..., None] * weight1_scale.float() + bias1.float()
        hidden8 = saturate(quick_gelu_reference(u) / hidden_scale)
        y = x.float() + (_exact_product(hidden8, weight2_8) * weight2_scale.float() + bias2.float())
    return y.to(x.dtype)


def _mlp(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1_8: Tensor,
    weight1_scale: Tensor,
    bias1: Tensor,
    weight2_8: Tensor,
    weight2_scale: Tensor,
    bias2: Tensor,
    hidden_scale: float,
    eps: float,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    normed = _normed_in_one_pass(rows, ln_weight, ln_bias, eps)
    hidden8 = cuda_library.fp8_linear(*normed, weight1_8, weight1_scale, bias1, hidden_scale)
    return cuda_library.fp8_linear_residual(hidden8, weight2_8, weight2_scale, bias2, rows).view(x.shape)


def _mlp_example(sizes: Sizes, make: Maker) -> tuple[Any, ...]:
    width, scale = sizes.width, 8.0 / 448  # for quick_gelu up to 8
    weight, weight_scale, bias = _example_linear(make, width, 4 * width)
    x = make.normal(sizes.sequences, sizes.tokens, width)
    return (
        *(x, *make.norm(width), *_example_linear(make, 4 * width, width)),
        *(weight, weight_scale * scale, bias, scale, 1e-5),
    )


_mlp_op = _op(mlp_fp8_reference, _mlp, slice(2, 6, 3), _mlp_example)


def mlp_fp8(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1_8: Tensor,
    weight1_scale: Tensor,
    bias1: Tensor,
    weight2_8: Tensor,
    weight2_scale: Tensor,
    bias2: Tensor,
    hidden_scale: float,
    eps: float = 1e-5,
) -> Tensor:
    """x + W2 quick_gelu(W1 LN(x) + b1) + b2 with both products in float8 (e4m3), for inference: ``mlp`` of equation 9.

    LN(x), in float32, is quantized with the scale s_m = its row's largest value / 448, quick_gelu's output h with
    ``hidden_scale`` whatever its values: h8 = h / hidden_scale, and what is beyond 448 saturates.

    Args:
        x: (..., D), floating.
        ln_weight, ln_bias: (D,).
        weight1_8: (F, D), float8_e4m3fn; weight1_scale: (F,), from ``quantize_weight``. bias1: (F,).
        weight2_8: (D, F), float8_e4m3fn; weight2_scale: (D,), that of ``quantize_weight`` times hidden_scale, so that
            the second product is weight2_scale (h8 W8^T). bias2: (D,).
        hidden_scale: the largest |h| to represent / 448.
        eps: of the LayerNorm.

    Returns:
        (..., D) in x's dtype.

    Raises:
        TypeError: if a weight is not in e4m3, or x is in float8.
        RuntimeError: if a gradient is wanted.
    """
    _check(x, weight1_8, weight2_8)
    first, second = (weight1_8, weight1_scale, bias1), (weight2_8, weight2_scale, bias2)
    return _mlp_op(x, ln_weight, ln_bias, *first, *second, hidden_scale, eps)
