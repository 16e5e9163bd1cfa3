"""Inference on a CPU: a block in as few passes over memory as possible.

No packed or folded copy of a weight is kept, so every change of a weight counts at once. Without instructions for a
half-precision dtype, a block is computed in float32 and rounded once at its end. The library of csrc/cpu computes a
whole block by one call. What it does not take is composed here of products.

F frames, L tokens of a frame, S = L + 1 rows of it, D width, H heads, M rows.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attention_reference
from ..common.block import Block
from ..dispatch import forced_backend
from . import buffers, library
from .buffers import workspace
from .products import Products

__all__ = ["block", "feed_forward", "linear", "patch_embed", "takes", "workspace"]

HIDDEN_BYTES = 24 << 20  # of the widest intermediate: rows are computed in parts of at most this size
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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


def block(b: Block) -> Tensor:
    """A whole block (equations 7 to 9), or its rows that are asked for. A spare row comes out as zeros."""
    products = Products(b.x.dtype)
    if products.takes_block(b):
        return _block_of_library(b, products.dtype)
    ffn = (b.ln_2_weight, b.ln_2_bias), (b.fc_weight, b.fc_bias), (b.projection_weight, b.projection_bias)
    if not b.frames:
        z = self_attention(b, products)
        y = z if z.dtype == b.x.dtype else torch.empty_like(z, dtype=b.x.dtype)
        return feed_forward(z, *ffn, b.eps, b.activation, out=y)
    if b.rows is not None:
        return block(b._replace(rows=None)).flatten(0, 1)[b.rows]
    message_FD = messages(b, products)
    y_FSD = b.x.new_empty(b.x.shape)
    y_FSD[:, -1] = 0.0
    count, length, width = b.x.shape
    for part in _parts(count, HIDDEN_BYTES // (4 * 4 * width * length)):
        z_FLD = cross_frame_attention(b, products, b.x[part], message_FD[part])
        feed_forward(z_FLD, *ffn, b.eps, b.activation, out=y_FSD[part, :-1])
    return y_FSD


def _block_of_library(b: Block, dtype: torch.dtype) -> Tensor:
    """The same by one call of the library, with rows of ``dtype``."""
    count, length, width = b.x.shape
    x = b.x.to(dtype)
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = x.new_empty(x.shape if b.rows is None else (count, width))
    part = next(_parts(count, HIDDEN_BYTES // (4 * len(b.fc_bias) * length))).stop
    linear = ("message_fc", "message_in", "message_out", "in", "out", "fc", "projection")
    parameters = [
        *(getattr(b, f"{name}_{kind}") for name in linear for kind in ("weight", "bias")),
        *(getattr(b, f"{name}_{kind}") for name in ("message_ln", "ln_1", "ln_2") for kind in ("weight", "bias")),
    ]
    parameters = [p if p is None or p.dim() == 2 else p.to(dtype).contiguous() for p in parameters]
    library.block(x, y, b.heads, b.frames, part, b.eps, parameters)
    return y.to(b.x.dtype)


def messages(b: Block, products: Products) -> Tensor:
    """Each frame's message (F, D): m = x_class Wm + bm, then m + CFA(LN_m(m)) (equation 7)."""
    m_FD = products.linear(b.x[:, 0].to(products.dtype), b.message_fc_weight, b.message_fc_bias)
    norm = b.message_ln_weight, b.message_ln_bias, b.eps
    qkv = products.linear(m_FD, b.message_in_weight, b.message_in_bias, norm=norm)
    mixed = products.attention(qkv.view(-1, b.frames, 3, b.heads, m_FD.shape[1] // b.heads), b.frames)
    mixed = mixed.reshape(m_FD.shape)
    return products.linear(mixed, b.message_out_weight, b.message_out_bias, residual=m_FD)


def cross_frame_attention(b: Block, products: Products, x_FSD: Tensor, message_FD: Tensor) -> Tensor:
    """x + IFA(LN_1([x, m])) (equation 8) of some frames, (F, L, D), in the dtype of the products."""
    count, length, width = x_FSD.shape
    x = x_FSD.to(products.dtype)
    # the message takes the spare row's place in the projection
    norm = b.ln_1_weight, b.ln_1_bias, b.eps
    qkv = products.linear(x, b.in_weight, b.in_bias, norm=norm, last=message_FD, name="wide")
    mixed = products.attention(qkv.view(count, length, 3, b.heads, -1), length - 1)
    z_FLD = buffers.take("stream", count * (length - 1), width, products.dtype).view(count, length - 1, width)
    return products.linear(mixed, b.out_weight, b.out_bias, residual=x[:, :-1], out=z_FLD)


def self_attention(b: Block, products: Products) -> Tensor:
    """x + attention(LN_1(x)) of a block without a message, or its rows that are asked for; in the dtype of products."""
    width = b.x.shape[-1]
    x = b.x.to(products.dtype)
    rows = x.reshape(-1, width)
    qkv = products.linear(rows, b.in_weight, b.in_bias, norm=(b.ln_1_weight, b.ln_1_bias, b.eps), name="wide")
    heads = qkv.view(*x.shape[:-1], 3, b.heads, -1)
    if b.offsets is None and not b.causal and b.bias is None:
        mixed = products.attention(heads, x.shape[1])
    elif b.offsets is None:
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
    products = Products(x.dtype)
    y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    if x.numel() == 0:
        return y
    given, taken = (x, y) if x.dim() == 3 else (x.reshape(-1, width), y.view(-1, width))
    for part in _parts(len(given), HIDDEN_BYTES // (4 * len(fc[0]) * given[0].numel() // width)):
        products.mlp(given[part].to(products.dtype), (ln[0], ln[1], eps), fc, projection, activation, taken[part])
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b: x (..., I), weight (O, I), bias (O,) -> (..., O) in x's dtype."""
    products = Products(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).to(products.dtype)
    return products.linear(rows, weight, bias).view(*x.shape[:-1], len(weight)).to(x.dtype)


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
    products, kernel, position = Products(torch.float32), weight.reshape(width, -1), position.float()
    first, bias = class_embedding.float() + position[0], torch.zeros(width, dtype=torch.float32, device="cpu")
    ln_weight, ln_bias = (parameter.float() for parameter in ln)
    x_FLD = weight.new_empty(len(frames), tokens, width)
    for part in _parts(len(frames), HIDDEN_BYTES // (4 * kernel.shape[1] * tokens)):
        given = frames[part]
        pixels = buffers.take("wide", len(given) * (tokens - 1), kernel.shape[1], torch.float32)
        if given.dtype == torch.uint8 and products.library is not None:
            library.patches(given.contiguous(), patch, tuple(mean), tuple(std), pixels)
        else:
            _rewrite_pixels(given, patch, mean, std, pixels)
        embedded = buffers.take("stream", len(given) * tokens, width, torch.float32).view(-1, tokens, width)
        residual = position[1:].expand(len(given), -1, -1)
        products.linear(pixels, kernel, bias, residual=residual, out=embedded[:, 1:])
        embedded[:, 0] = first
        x_FLD[part] = F.layer_norm(embedded, (width,), ln_weight, ln_bias, eps)
    return x_FLD


def _rewrite_pixels(frames: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], out: Tensor) -> None:
    """As ``library.patches``, by torch; also for frames (F, 3, H, W) that are normalized already."""
    levels = frames.dtype == torch.uint8
    given = frames.permute(0, 3, 1, 2) if levels else frames
    height, length = given.shape[2:]
    grid = given.unflatten(3, (length // patch, patch)).unflatten(2, (height // patch, patch))
    grid = grid.permute(0, 2, 4, 1, 3, 5)
    out.view(grid.shape).copy_(grid)
    if levels:
        scale, shift = (x.repeat_interleave(patch * patch) for x in library.scale_and_shift(mean, std))
        torch.addcmul(shift, out, scale, out=out)


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


def _parts(count: int, most: int) -> Iterator[slice]:
    """``count`` rows in equal parts of at most ``most``, or of one."""
    size = math.ceil(count / math.ceil(count / max(1, most)))
    for start in range(0, count, size):
        yield slice(start, start + size)
