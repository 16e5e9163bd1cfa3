"""Inference on a CPU: the two residual branches of a block in as few passes over memory as torch's calls allow.

No packed or folded copy of a weight is kept, so every change of a weight counts at once. quick_gelu is torch's SiLU,
since u sigmoid(1.702 u) = silu(1.702 u) / 1.702: the LayerNorm before the first product carries the factor, and the
second product carries its inverse.

Products run on oneDNN if the CPU has AVX-512, or instructions for the half-precision dtype: MKL does not use AVX-512 on
AMD, and oneDNN adds the bias and applies SiLU in its epilogue. Elsewhere they run on torch's own choice, MKL: with AVX2
alone it is 20 % faster than oneDNN, whose SiLU takes ten times as long as torch's (docs/performance.md). Without
instructions for a half-precision dtype, both branches are computed in float32 and rounded once at their end.

F frames, L tokens of a frame, D width, H heads, M rows.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import GELUS, Block
from .attention import attention_reference
from .dispatch import forced_backend
from .linear import NATIVE_ON_CPU, linear
from .quick_gelu import SLOPE

HIDDEN_BYTES = 24 << 20  # of the widest intermediate: rows are computed in parts of this size, which caches hold
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_local = threading.local()
_pointwise: Any = torch.ops.mkldnn._linear_pointwise


def workspace() -> contextlib.AbstractContextManager[None]:
    """Until it ends, the calls of this thread share their intermediate buffers.

    A buffer of many megabytes comes from the system page by page whenever it is allocated; twelve blocks need the same
    ones. They are freed at the end.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _shared_buffers()


@contextlib.contextmanager
def _shared_buffers() -> Iterator[None]:
    if getattr(_local, "buffers", None) is not None:
        yield  # an outer one holds them
        return
    _local.buffers = {}
    try:
        yield
    finally:
        _local.buffers = None


def _buffer(name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized (rows, width); its content lasts until the next call with the same name and dtype."""
    buffers = getattr(_local, "buffers", None)
    if buffers is None:
        return torch.empty(rows, width, dtype=dtype, device="cpu")
    key = name, dtype, torch.is_inference_mode_enabled()
    flat = buffers.get(key)
    if flat is None or flat.numel() < rows * width:
        flat = buffers[key] = torch.empty(rows * width, dtype=dtype, device="cpu")
    return flat[: rows * width].view(rows, width)


def takes(x: Tensor, *parameters: Tensor) -> bool:
    """Whether the functions of this file compute with these: plain CPU tensors of one dtype, and no gradient, autocast,
    tracing or transform in sight."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype not in _DTYPES or x.numel() == 0:
        return False
    if forced_backend() not in ("auto", "onednn"):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in parameters)):
        return False
    return (
        type(x) in (Tensor, nn.Parameter)
        and all(type(p) in (Tensor, nn.Parameter) and p.dtype == x.dtype and p.device == x.device for p in parameters)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


@functools.cache
def _has_avx512() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def uses_onednn(dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` go to oneDNN instead of torch's own choice."""
    if forced_backend() == "onednn":
        return True
    return NATIVE_ON_CPU[dtype] if dtype in NATIVE_ON_CPU else _has_avx512()


def block(b: Block) -> Tensor:
    """A whole block (equations 7 to 9), or its rows that are asked for."""
    z = cross_frame_attention(b) if b.frames else self_attention(b)
    fc, projection = (b.fc_weight, b.fc_bias), (b.projection_weight, b.projection_bias)
    return feed_forward(z, (b.ln_2_weight, b.ln_2_bias), fc, projection, b.eps, b.activation, inplace=True)


def cross_frame_attention(b: Block) -> Tensor:
    """x + IFA(LN_1([x, m])) with m from CFA (equations 7 and 8), (F, S, D) with the spare row, new."""
    count, length, width = b.x.shape
    products = _Products(b.x.dtype)
    wide = products.dtype

    def attend(qkv: Tensor) -> Tensor:
        query, key, value = qkv.unflatten(-1, (3, b.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)

    def norm(rows: Tensor, weight: Any, bias: Any) -> Tensor:
        return F.layer_norm(rows, (width,), weight.to(wide), bias.to(wide), b.eps)

    def product(rows: Tensor, weight: Any, bias: Any) -> Tensor:
        return F.linear(rows, weight.to(wide), bias.to(wide))

    # m = x_class Wm + bm, then m + CFA(LN_m(m)) over the frames of a video
    m_FD = product(b.x[:, 0].to(wide), b.message_fc_weight, b.message_fc_bias)
    qkv = product(norm(m_FD, b.message_ln_weight, b.message_ln_bias), b.message_in_weight, b.message_in_bias)
    mixed = attend(qkv.unflatten(0, (-1, b.frames))).flatten(0, 1)
    m_FD = m_FD + product(mixed, b.message_out_weight, b.message_out_bias)
    message_FD = norm(m_FD, b.ln_1_weight, b.ln_1_bias)

    # the message takes the spare row's place in the projection
    in_weight, in_bias = products.widened(b.in_weight), products.widened(b.in_bias)
    out_weight, out_bias = products.widened(b.out_weight), products.widened(b.out_bias)
    y_FSD = b.x.new_empty(b.x.shape)
    for part in _parts(count, HIDDEN_BYTES // (4 * 4 * width * length)):
        x = b.x[part].to(wide)
        normed = norm(x, b.ln_1_weight, b.ln_1_bias)
        normed[:, -1] = message_FD[part]
        qkv = products.linear(normed.view(-1, width), in_weight, in_bias).view(len(x), length, 3 * width)
        mixed = attend(qkv).reshape(-1, width)
        products.add_linear(y_FSD[part].view(-1, width), x.reshape(-1, width), mixed, out_weight, out_bias)
    return y_FSD


def self_attention(b: Block) -> Tensor:
    """x + attention(LN_1(x)), or its rows that are asked for, of a block without a message."""
    width = b.x.shape[-1]
    qkv = linear(F.layer_norm(b.x, (width,), b.ln_1_weight, b.ln_1_bias, b.eps), b.in_weight, b.in_bias)
    heads = qkv.unflatten(-1, (3, b.heads, -1))
    if b.offsets is None:
        mixed = attention_reference(heads, b.causal, b.bias).flatten(-2)
    else:
        mixed = causal_attention_packed(heads, b.offsets.diff()).flatten(-2)
    x = b.x
    if b.rows is not None:
        x, mixed = x.reshape(-1, width)[b.rows], mixed.reshape(-1, width)[b.rows]
    return x + linear(mixed, b.out_weight, b.out_bias)


def feed_forward(
    x: Tensor,
    ln: Sequence[Tensor],
    fc: Sequence[Tensor],
    projection: Sequence[Tensor],
    eps: float,
    activation: str = "quick_gelu",
    inplace: bool = False,
) -> Tensor:
    """x + W2 act(W1 LN(x) + b1) + b2 (equation 9).

    Args:
        x: (..., D), one of float32, bfloat16 and float16, as all weights.
        ln, fc, projection: weight and bias; W1 (F, D), W2 (D, F).
        eps: of the LayerNorm.
        activation: "quick_gelu", "gelu" or "gelu_tanh".
        inplace: whether ``x``, contiguous, is overwritten.

    Returns:
        (..., D), new or ``x``.
    """
    width = x.shape[-1]
    products = _Products(x.dtype)
    wide = products.dtype
    scale = SLOPE if activation == "quick_gelu" else 1.0
    at_least = torch.promote_types(wide, torch.float32)  # the scaled vectors are not rounded once more
    ln_weight, ln_bias = (parameter.to(at_least) * scale for parameter in ln)
    fc_weight, projection_weight = products.widened(fc[0]), products.widened(projection[0])
    fc_bias, projection_bias = (bias.to(at_least) for bias in (fc[1], projection[1]))
    x_MD = x.reshape(-1, width)
    y_MD = x_MD if inplace else x_MD.new_empty(x_MD.shape)
    for part in _parts(len(x_MD), HIDDEN_BYTES // (4 * len(fc_weight))):
        rows = x_MD[part].to(wide)
        normed = F.layer_norm(rows, (width,), ln_weight, ln_bias, eps)
        hidden = products.linear(normed, fc_weight, (fc_bias * scale).to(wide), activation)
        products.add_linear(y_MD[part], rows, hidden, projection_weight, projection_bias, 1 / scale)
    return y_MD.view(x.shape)


def patch_embed(
    frames: Tensor,
    weight: Tensor,
    class_embedding: Tensor,
    position: Tensor,
    ln: Sequence[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    eps: float,
) -> Tensor:
    """LN_pre([x_class, E x_1, ..., E x_N] + e_spa) (equation 4), as ``kernels.patch_embed``, by one product."""
    (width, _, patch, _), tokens = weight.shape, len(position)
    # in float32: the levels of pixels are not exact in half precision once they are normalized
    kernel, position = weight.reshape(width, -1).float(), position.float()
    first = class_embedding.float() + position[0]
    ln_weight, ln_bias = (parameter.float() for parameter in ln)
    levels = frames.dtype == torch.uint8
    # (u / 255 - mean) / std, in the kernel's order: channel, row, column of a patch
    per_pixel = patch * patch
    scale = torch.tensor([1 / (255 * deviation) for deviation in std]).repeat_interleave(per_pixel)
    shift = torch.tensor([-m / deviation for m, deviation in zip(mean, std, strict=True)]).repeat_interleave(per_pixel)
    x_FLD = weight.new_empty(len(frames), tokens, width)
    for part in _parts(len(frames), HIDDEN_BYTES // (4 * kernel.shape[1] * tokens)):
        given = frames[part].permute(0, 3, 1, 2) if levels else frames[part]
        count, _, height, length = given.shape
        grid = given.unflatten(3, (length // patch, patch)).unflatten(2, (height // patch, patch))
        grid = grid.permute(0, 2, 4, 1, 3, 5)
        pixels = _buffer("wide", count * (tokens - 1), kernel.shape[1], torch.float32)
        pixels.view(grid.shape).copy_(grid)
        if levels:
            torch.addcmul(shift, pixels, scale, out=pixels)
        embedded = _buffer("normed", count * tokens, width, torch.float32).view(count, tokens, width)
        torch.add(F.linear(pixels, kernel).view(count, -1, width), position[1:], out=embedded[:, 1:])
        embedded[:, 0] = first
        x_FLD[part] = F.layer_norm(embedded, (width,), ln_weight, ln_bias, eps)
    return x_FLD


def causal_attention_packed(qkv_S3HC: Tensor, lengths: Tensor) -> Tensor:
    """Causal attention of packed labels of these lengths, (K,): nothing is padded.

    Labels of one length beside each other are one call on views. Returns (S, H, C).
    """
    mixed, start = [], 0
    for length, count in zip(*(each.tolist() for each in lengths.unique_consecutive(return_counts=True)), strict=True):
        labels = qkv_S3HC[start : start + count * length].unflatten(0, (count, length))
        query, key, value = labels.permute(2, 0, 3, 1, 4).unbind(0)
        mixed.append(F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(0, 1))
        start += count * length
    return torch.cat(mixed)


class _Products:
    """x W^T + b in the dtype that this CPU computes ``given`` in, by the library that is the fastest there."""

    def __init__(self, given: torch.dtype) -> None:
        self.dtype = given if NATIVE_ON_CPU.get(given, True) else torch.float32
        self.onednn = uses_onednn(self.dtype)

    def widened(self, parameter: Tensor) -> Tensor:
        return parameter.to(self.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, activation: str = "") -> Tensor:
        """(M, I) to (M, O), with SiLU ("quick_gelu") or GELU behind it; it may lie in the buffer of the one before."""
        if self.onednn:
            attribute = "gelu" if activation in GELUS else {"": "none", "quick_gelu": "swish"}[activation]
            return _pointwise(x, weight, bias, attribute, [], GELUS.get(activation, ""))
        if not activation:
            return torch.addmm(bias, x, weight.T, out=_buffer("wide", len(x), len(weight), x.dtype))
        # y^T = W x^T: MKL divides the longer side of a result among threads, and is 5 to 8 % faster this way round
        y = torch.addmm(bias[:, None], weight, x.T, out=_buffer("wide", len(weight), len(x), x.dtype)).T
        if activation == "quick_gelu":
            F.silu(y, inplace=True)
        elif activation in GELUS:
            torch.ops.aten.gelu_(y, approximate=GELUS[activation])
        return y

    def add_linear(self, y: Tensor, x: Tensor, h: Tensor, weight: Tensor, bias: Tensor, alpha: float = 1.0) -> None:
        """Writes x + alpha h W^T + b, (M, O), into y; where their dtypes differ, x is overwritten too."""
        if self.onednn and alpha == 1.0:
            y.copy_(_pointwise.binary(h, x, weight, bias.to(x.dtype), "add"))
        elif self.onednn:
            product = _pointwise(h, weight, (bias / alpha).to(x.dtype), "none", [], "")
            torch.add(x, product, alpha=alpha, out=y)
        elif y.dtype == x.dtype:
            torch.add(x, bias, out=y).addmm_(h, weight.T, alpha=alpha)
        else:
            y.copy_(x.addmm_(h, weight.T, alpha=alpha).add_(bias))


def _parts(count: int, most: int) -> Iterator[slice]:
    """``count`` rows in equal parts of at most ``most``, or of one."""
    size = math.ceil(count / math.ceil(count / max(1, most)))
    for start in range(0, count, size):
        yield slice(start, start + size)
