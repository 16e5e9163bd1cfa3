"""Inference on a CPU: a block in as few passes over memory as torch's calls allow, on the fastest products there are.

No packed or folded copy of a weight is kept, so every change of a weight counts at once. quick_gelu is torch's SiLU,
since u sigmoid(1.702 u) = silu(1.702 u) / 1.702: the LayerNorm before the first product carries the factor, and the
second product carries its inverse.

Products run on oneDNN if the CPU has AVX-512, or instructions for the half-precision dtype: MKL does not use AVX-512 on
AMD, and oneDNN adds the bias and applies SiLU in its epilogue. Elsewhere they run on torch's own choice, MKL, which is
faster with AVX2 alone (docs/performance.md). There each thread computes some columns of the result, as one product of a
batch: with few rows up to 1.4 times as fast as MKL's own division among two threads. Without instructions for a
half-precision dtype, a block is computed in float32 and rounded once at its end.

F frames, L tokens of a frame, S = L + 1 rows of it, D width, H heads, M rows, P threads that share a product.
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

from .attention import attention_reference
from .common.block import GELUS, Block
from .dispatch import forced_backend
from .linear import NATIVE_ON_CPU
from .quick_gelu import SLOPE

HIDDEN_BYTES = 24 << 20  # of the widest intermediate: rows are computed in parts of this size, which caches hold
MOST_THREADS = 4  # that share a product by columns; with more, MKL divides it (not measured)
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
    parameters: dict[str, Any] = {
        name: value.to(products.dtype)
        for name, value in b._asdict().items()
        if isinstance(value, Tensor) and name.endswith(("_weight", "_bias"))
    }
    b = b._replace(**parameters)
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
    """LN_1 of each frame's message (F, D): m = x_class Wm + bm, then m + CFA(LN_m(m)) (equation 7)."""
    width = b.x.shape[-1:]
    m_FD = products.linear(b.x[:, 0].to(products.dtype), b.message_fc_weight, b.message_fc_bias)
    normed = F.layer_norm(m_FD, width, b.message_ln_weight, b.message_ln_bias, b.eps)
    qkv = products.linear(normed, b.message_in_weight, b.message_in_bias)
    mixed = attention_reference(qkv.view(-1, b.frames, 3, b.heads, width[0] // b.heads)).reshape(m_FD.shape)
    m_FD = m_FD + products.linear(mixed, b.message_out_weight, b.message_out_bias)
    return F.layer_norm(m_FD, width, b.ln_1_weight, b.ln_1_bias, b.eps)


def cross_frame_attention(b: Block, products: "_Products", x_FSD: Tensor, message_FD: Tensor) -> Tensor:
    """x + IFA(LN_1([x, m])) (equation 8) of some frames, (F, L, D), in the dtype of the products."""
    count, length, width = x_FSD.shape
    x = x_FSD.to(products.dtype)
    normed = F.layer_norm(x, (width,), b.ln_1_weight, b.ln_1_bias, b.eps)
    normed[:, -1] = message_FD  # the message takes the spare row's place in the projection
    channels = width // b.heads
    qkv = products.divided("wide", normed.view(-1, width), b.in_weight, b.in_bias, groups=3, unit=channels)
    # (3 P, F S, D / P) to (3, P F, H / P, S, C): each thread has computed the heads of its columns
    qkv = qkv.unflatten(0, (3, -1)).unflatten(-1, (-1, channels)).unflatten(2, (count, length)).flatten(1, 2)
    query, key, value = qkv.transpose(2, 3).unbind(0)
    mixed = F.scaled_dot_product_attention(query[:, :, :-1], key, value).transpose(1, 2)
    mixed = mixed.reshape(-1, count * (length - 1), mixed.shape[2] * channels).transpose(0, 1).reshape(-1, width)
    z_FLD = _buffer("stream", count * (length - 1), width, products.dtype).view(count, length - 1, width)
    products.add_linear(z_FLD, x[:, :-1], mixed, b.out_weight, b.out_bias)
    return z_FLD


def self_attention(b: Block, products: "_Products") -> Tensor:
    """x + attention(LN_1(x)) of a block without a message, or its rows that are asked for; in the dtype of products."""
    width = b.x.shape[-1]
    x = b.x.to(products.dtype)
    normed = F.layer_norm(x, (width,), b.ln_1_weight, b.ln_1_bias, b.eps)
    qkv = products.linear(normed.view(-1, width), b.in_weight, b.in_bias, "wide")
    heads = qkv.view(*x.shape[:-1], 3, b.heads, -1)
    if b.offsets is None:
        mixed = attention_reference(heads, b.causal, b.bias)
    else:
        mixed = causal_attention_packed(heads, b.offsets.diff())
    mixed = mixed.reshape(-1, width)
    if b.rows is not None:
        x, mixed = x.reshape(-1, width)[b.rows], mixed[b.rows]
    z = torch.empty_like(x, memory_format=torch.contiguous_format)
    products.add_linear(z, x, mixed, b.out_weight, b.out_bias)
    return z


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
    wide = products.dtype
    scale = SLOPE if activation == "quick_gelu" else 1.0
    at_least = torch.promote_types(wide, torch.float32)  # the scaled vectors are not rounded once more
    ln_weight, ln_bias = (parameter.to(at_least) * scale for parameter in ln)
    fc_weight, projection_weight = fc[0].to(wide), projection[0].to(wide)
    fc_bias, projection_bias = (fc[1].to(at_least) * scale).to(wide), projection[1].to(at_least)
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    given, taken = (x, y) if x.dim() == 3 else (x.reshape(-1, width), y.view(-1, width))
    for part in _parts(len(given), HIDDEN_BYTES // (4 * len(fc_weight) * given[0].numel() // width)):
        rows = given[part].to(wide)
        normed = F.layer_norm(rows, (width,), ln_weight, ln_bias, eps)
        hidden = products.activated(normed.view(-1, width), fc_weight, fc_bias, activation)
        products.add_linear(taken[part], rows, hidden, projection_weight, projection_bias, 1 / scale)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b: x (..., I), weight (O, I), bias (O,) -> (..., O) in x's dtype."""
    products = _Products(x.dtype)
    rows, weight, bias = (each.to(products.dtype) for each in (x.reshape(-1, x.shape[-1]), weight, bias))
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
        products.add_linear(
            embedded[:, 1:], position[1:].expand(count, -1, -1), pixels, kernel, kernel.new_zeros(width)
        )
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

    def _sharing(self, columns: int) -> int:
        """P, how many threads compute some of these columns each."""
        threads = torch.get_num_threads()
        mkl = torch.backends.mkl.is_available() and not self.onednn
        return threads if mkl and threads <= MOST_THREADS and columns % threads == 0 else 1

    def divided(
        self, name: str, x: Tensor, weight: Any, bias: Any, alpha: float = 1.0, groups: int = 1, unit: int = 1
    ) -> Tensor:
        """alpha x W^T + b, (M, I) to (G P, M, O / (G P)): the columns one after another.

        Args:
            name: of the buffer that holds the result, or "" for new memory.
            groups: G, of columns that belong together. unit: of so many neighboring columns none are parted.
        """
        (rows, width), columns = x.shape, len(weight)
        shared = groups * self._sharing(columns // groups // unit)
        if shared > groups:
            y = _buffer(name, shared * rows, columns // shared, x.dtype).view(shared, rows, -1)
            given, weight = x.expand(shared, rows, width), weight.view(shared, -1, width).transpose(1, 2)
            return torch.baddbmm(bias.view(shared, 1, -1), given, weight, alpha=alpha, out=y)
        if not self.onednn:
            y = torch.addmm(bias, x, weight.T, alpha=alpha, out=_buffer(name, rows, columns, x.dtype))
        else:
            y = _pointwise(x, weight, (bias / alpha).to(x.dtype), "none", [], "")
            y = y if alpha == 1.0 else y.mul_(alpha)
        return y.unflatten(-1, (groups, -1)).transpose(0, 1)

    def linear(self, x: Tensor, weight: Any, bias: Any, name: str = "") -> Tensor:
        """x W^T + b, (M, I) to (M, O)."""
        return self.divided(name, x, weight, bias).transpose(0, 1).reshape(len(x), -1)

    def activated(self, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        """SiLU ("quick_gelu") or GELU of x W^T + b, (M, I) to (M, O), in the buffer of the one before."""
        if self.onednn:
            attribute = "gelu" if activation in GELUS else "swish"
            return _pointwise(x, weight, bias, attribute, [], GELUS.get(activation, ""))
        # y^T = W x^T: so the columns of all threads are one matrix
        (rows, width), columns = x.shape, len(weight)
        shared = self._sharing(columns)
        y = _buffer("wide", columns, rows, x.dtype)
        if shared == 1:
            torch.addmm(bias[:, None], weight, x.T, out=y)
        else:
            given, weight = x.T.expand(shared, width, rows), weight.view(shared, -1, width)
            torch.baddbmm(bias.view(shared, -1, 1), weight, given, out=y.view(shared, -1, rows))
        if activation == "quick_gelu":
            F.silu(y, inplace=True)
        else:
            torch.ops.aten.gelu_(y, approximate=GELUS[activation])
        return y.T

    def add_linear(self, y: Tensor, x: Tensor, h: Tensor, weight: Any, bias: Any, alpha: float = 1.0) -> None:
        """Writes x + alpha h W^T + b into y: x and y (..., O) of any strides, h (M, I) a row for each of theirs."""
        if self.onednn and alpha == 1.0:
            y.copy_(_pointwise.binary(h, x.reshape(len(h), -1), weight, bias.to(h.dtype), "add").view(x.shape))
            return
        product = self.divided("product", h, weight, bias, alpha)
        parts = len(product), -1
        product = product.unflatten(1, x.shape[:-1]).movedim(0, -2)
        torch.add(x.unflatten(-1, parts), product, out=y.unflatten(-1, parts))


def _parts(count: int, most: int) -> Iterator[slice]:
    """``count`` rows in equal parts of at most ``most``, or of one."""
    size = math.ceil(count / math.ceil(count / max(1, most)))
    for start in range(0, count, size):
        yield slice(start, start + size)
