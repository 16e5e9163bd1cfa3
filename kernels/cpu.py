"""Inference on a CPU: a block in as few passes over memory as possible, on the fastest products there are.

No packed or folded copy of a weight is kept, so every change of a weight counts at once. With AVX2, products run in the
library of csrc/cpu.cpp: LayerNorm is part of the pass that rewrites its input, and bias, quick_gelu and residual are
added where a result is written. Where that library is not, oneDNN multiplies if the CPU has AVX-512, or instructions
for the half-precision dtype, and else torch's own choice (docs/performance.md). There quick_gelu is torch's SiLU, since
u sigmoid(1.702 u) = silu(1.702 u) / 1.702: the LayerNorm before the first product carries the factor, and the second
product carries its inverse. Without instructions for a half-precision dtype, a block is computed in float32 and rounded
once at its end.

F frames, L tokens of a frame, S = L + 1 rows of it, D width, H heads, M rows.
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

from . import cpu_library
from .arguments import GELUS, Block
from .attention import attention_reference
from .dispatch import forced_backend
from .linear import NATIVE_ON_CPU
from .quick_gelu import SLOPE

HIDDEN_BYTES = 24 << 20  # of the widest intermediate: rows are computed in parts of this size, which caches hold
Norm = tuple[Tensor, Tensor, float]  # weight, bias, eps of a LayerNorm
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_local = threading.local()
_pointwise: Any = torch.ops.mkldnn._linear_pointwise


def workspace() -> contextlib.AbstractContextManager[None]:
    """Until it ends, the calls of this thread share their intermediate buffers, which are freed at the end.

    Memory that comes from the system comes page by page, which takes time in every call.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _shared_buffers()


@contextlib.contextmanager
def _shared_buffers() -> Iterator[None]:
    if getattr(_local, "buffers", None) is not None:
        yield  # an outer one holds them
        return
    _keep_freed_memory()
    _local.buffers = {}
    try:
        yield
    finally:
        _local.buffers = None


@functools.cache
def _keep_freed_memory() -> None:
    """Makes glibc keep up to 64 MiB of freed memory for the next call: twice the largest block that was ever freed."""
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8, device="cpu")


def _buffer(name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized (rows, width); its content lasts until the next call with the same name and dtype ("": on)."""
    buffers = getattr(_local, "buffers", None)
    if buffers is None or not name:
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
    """A whole block (equations 7 to 9), or its rows that are asked for. A spare row comes out as zeros."""
    products = _Products(b.x.dtype)
    ffn = (b.ln_2_weight, b.ln_2_bias), (b.fc_weight, b.fc_bias), (b.projection_weight, b.projection_bias)
    if not b.frames:
        z = self_attention(b, products)
        y = z if z.dtype == b.x.dtype else torch.empty_like(z, dtype=b.x.dtype)
        return feed_forward(z, *ffn, b.eps, b.activation, out=y)
    message_FD = messages(b, products)
    y_FSD = b.x.new_empty(b.x.shape)
    y_FSD[:, -1] = 0.0
    count, length, width = b.x.shape
    for part in _parts(count, HIDDEN_BYTES // (4 * 4 * width * length)):
        z_FLD = cross_frame_attention(b, products, b.x[part], message_FD[part])
        feed_forward(z_FLD, *ffn, b.eps, b.activation, out=y_FSD[part, :-1])
    return y_FSD


def messages(b: Block, products: "_Products") -> Tensor:
    """Each frame's message (F, D): m = x_class Wm + bm, then m + CFA(LN_m(m)) (equation 7)."""
    m_FD = products.linear(b.x[:, 0].to(products.dtype), b.message_fc_weight, b.message_fc_bias)
    norm = b.message_ln_weight, b.message_ln_bias, b.eps
    qkv = products.linear(m_FD, b.message_in_weight, b.message_in_bias, norm=norm)
    mixed = attention_reference(qkv.view(-1, b.frames, 3, b.heads, m_FD.shape[1] // b.heads)).reshape(m_FD.shape)
    return products.linear(mixed, b.message_out_weight, b.message_out_bias, residual=m_FD)


def cross_frame_attention(b: Block, products: "_Products", x_FSD: Tensor, message_FD: Tensor) -> Tensor:
    """x + IFA(LN_1([x, m])) (equation 8) of some frames, (F, L, D), in the dtype of the products."""
    count, length, width = x_FSD.shape
    x = x_FSD.to(products.dtype)
    # the message takes the spare row's place in the projection
    norm = b.ln_1_weight, b.ln_1_bias, b.eps
    qkv = products.linear(x, b.in_weight, b.in_bias, norm=norm, last=message_FD, name="wide")
    query, key, value = qkv.view(count, length, 3, b.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query[:, :, :-1], key, value).transpose(1, 2).flatten(2)
    z_FLD = _buffer("stream", count * (length - 1), width, products.dtype).view(count, length - 1, width)
    return products.linear(mixed, b.out_weight, b.out_bias, residual=x[:, :-1], out=z_FLD)


def self_attention(b: Block, products: "_Products") -> Tensor:
    """x + attention(LN_1(x)) of a block without a message, or its rows that are asked for; in the dtype of products."""
    width = b.x.shape[-1]
    x = b.x.to(products.dtype)
    rows = x.reshape(-1, width)
    qkv = products.linear(rows, b.in_weight, b.in_bias, norm=(b.ln_1_weight, b.ln_1_bias, b.eps), name="wide")
    heads = qkv.view(*x.shape[:-1], 3, b.heads, -1)
    if b.offsets is None:
        mixed = attention_reference(heads, b.causal, b.bias)
    else:
        mixed = causal_attention_packed(heads, b.offsets.diff())
    mixed = mixed.reshape(-1, width)
    if b.rows is not None:
        x = rows = rows[b.rows]
        mixed = mixed[b.rows]
    return products.linear(mixed, b.out_weight, b.out_bias, residual=rows).view(x.shape)


def feed_forward(
    x: Tensor,
    ln: Sequence[Tensor],
    fc: Sequence[Tensor],
    projection: Sequence[Tensor],
    eps: float,
    activation: str = "quick_gelu",
    out: Tensor | None = None,
) -> Tensor:
    """x + W2 act(W1 LN(x) + b1) + b2 (equation 9).

    Args:
        x: (..., D), one of float32, bfloat16 and float16.
        ln, fc, projection: weight and bias; W1 (F, D), W2 (D, F).
        eps: of the LayerNorm.
        activation: "quick_gelu", "gelu" or "gelu_tanh".
        out: (..., D), overwritten with the result; it may be ``x``. If it is not contiguous, x is (F, L, D).

    Returns:
        (..., D), ``out`` or new.
    """
    width = x.shape[-1]
    products = _Products(x.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    given, taken = (x, y) if x.dim() == 3 else (x.reshape(-1, width), y.view(-1, width))
    for part in _parts(len(given), HIDDEN_BYTES // (4 * len(fc[0]) * given[0].numel() // width)):
        rows, result = given[part].to(products.dtype), taken[part]
        narrow = result.dtype != products.dtype
        written = products.mlp(rows, (*ln, eps), fc, projection, activation, None if narrow else result)
        if narrow:
            result.copy_(written.view(result.shape))
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b: x (..., I), weight (O, I), bias (O,) -> (..., O) in x's dtype."""
    products = _Products(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).to(products.dtype)
    return products.linear(rows, weight, bias).view(*x.shape[:-1], -1).to(x.dtype)


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
    levels, products = frames.dtype == torch.uint8, _Products(torch.float32)
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
        embedded = _buffer("stream", count * tokens, width, torch.float32).view(count, tokens, width)
        residual = position[1:].expand(count, -1, -1)
        products.linear(pixels, kernel, kernel.new_zeros(width), residual=residual, out=embedded[:, 1:])
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
    """Products with what surrounds them, in the dtype that this CPU computes ``given`` in."""

    def __init__(self, given: torch.dtype) -> None:
        self.dtype = given if NATIVE_ON_CPU.get(given, True) else torch.float32
        self.onednn = uses_onednn(self.dtype)

    def _library_takes(self, *weights: Tensor) -> bool:
        return self.dtype == torch.float32 and not self.onednn and cpu_library.takes(*weights)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        norm: Norm | None = None,
        last: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        name: str = "",
    ) -> Tensor:
        """LN(x) W^T + b + residual.

        Args:
            x: (M, I), or (F, L, I) of any strides.
            weight: (O, I). bias: (O,).
            norm: weight, bias and eps of LN; None: no LN.
            last: (F, I), in place of the last row of each frame of ``x``.
            residual: as many rows of O as ``x`` has, (M, O) or (F, L, O).
            out: like ``residual``, overwritten with the result; it may be ``residual``.
            name: of the buffer for the result if ``out`` is None; "": new memory.

        Returns:
            ``out``, or (M, O).
        """
        (columns, width), count = weight.shape, x.numel() // weight.shape[1]
        if not self._library_takes(weight):
            y = self._plain(_normed(x, norm, last), weight, bias, name)
            if residual is None:
                return y
            return torch.add(residual, y.view(residual.shape), out=out)
        y = _buffer(name, count, columns, torch.float32) if out is None else out
        cpu_library.product(
            count,
            _panels("panels", count, width),
            weight,
            bias.float(),
            x=_beside(x),
            norm=_in_float32(norm),
            last=last,
            y=y,
            residual=residual,
        )
        return y

    def mlp(
        self,
        x: Tensor,
        norm: Norm,
        fc: Sequence[Tensor],
        projection: Sequence[Tensor],
        activation: str,
        out: Tensor | None,
    ) -> Tensor:
        """x + W2 act(W1 LN(x) + b1) + b2: (M, D) or (F, L, D), written to ``out`` or new."""
        (hidden, width), count = fc[0].shape, x.numel() // x.shape[-1]
        if self._library_takes(fc[0], projection[0]):
            quick = activation == "quick_gelu"
            panels, inner = _panels("panels", count, width), _panels("wide", count, hidden)
            y = torch.empty_like(x) if out is None else out
            cpu_library.product(
                count,
                panels,
                fc[0],
                fc[1].float(),
                x=_beside(x),
                norm=_in_float32(norm),
                y_panels=inner,
                quick_gelu=quick,
            )
            if not quick:
                torch.ops.aten.gelu_(inner, approximate=GELUS[activation])
            cpu_library.product(count, inner, projection[0], projection[1].float(), y=y, residual=_beside(x))
            return y
        scale = SLOPE if activation == "quick_gelu" else 1.0
        at_least = torch.promote_types(self.dtype, torch.float32)  # the scaled vectors are not rounded once more
        normed = _normed(x, (norm[0].to(at_least) * scale, norm[1].to(at_least) * scale, norm[2]))
        bias = (fc[1].to(at_least) * scale).to(self.dtype)
        inner = self._plain(normed, fc[0], bias, "wide", activation)
        y = self._plain(inner, *projection, "product", alpha=1 / scale)
        return torch.add(x, y.view(x.shape), out=out)

    def _plain(
        self, x: Tensor, weight: Tensor, bias: Tensor, name: str, activation: str = "", alpha: float = 1.0
    ) -> Tensor:
        """act(alpha x W^T + b) by oneDNN or by torch's own choice: (M, I) to (M, O). act: SiLU for "quick_gelu", GELU."""
        weight = weight.to(self.dtype)
        if self.onednn:
            attribute = "gelu" if activation in GELUS else "swish" if activation else "none"
            y = _pointwise(x, weight, (bias / alpha).to(x.dtype), attribute, [], GELUS.get(activation, ""))
            return y if alpha == 1.0 else y.mul_(alpha)
        y = _buffer(name, len(x), len(weight), x.dtype)
        torch.addmm(bias.to(x.dtype), x, weight.T, alpha=alpha, out=y)
        if activation in GELUS:
            return torch.ops.aten.gelu_(y, approximate=GELUS[activation])
        return F.silu(y, inplace=True) if activation else y


def _normed(x: Tensor, norm: Norm | None, last: Tensor | None = None) -> Tensor:
    """LN(x) with ``last`` in place of each frame's last row, as (M, I)."""
    width = x.shape[-1:]
    if norm is not None:
        weight, bias, eps = norm[0].to(x.dtype), norm[1].to(x.dtype), norm[2]
        x = F.layer_norm(x, width, weight, bias, eps)
        if last is not None:
            x[:, -1] = F.layer_norm(last, width, weight, bias, eps)
    return x.reshape(-1, *width)


def _in_float32(norm: Norm | None) -> Norm | None:
    return None if norm is None else (norm[0].float(), norm[1].float(), norm[2])


def _panels(name: str, rows: int, width: int) -> Tensor:
    return _buffer(name, 1, cpu_library.panel_floats(rows, width), torch.float32)


def _beside(x: Tensor) -> Tensor:
    """x with neighboring columns."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _parts(count: int, most: int) -> Iterator[slice]:
    """``count`` rows in equal parts of at most ``most``, or of one."""
    size = math.ceil(count / math.ceil(count / max(1, most)))
    for start in range(0, count, size):
        yield slice(start, start + size)
