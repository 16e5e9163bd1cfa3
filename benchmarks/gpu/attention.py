"""Stage 5: the attention of each frame over its L tokens and the message: every library, and ours at each tile size."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from xclip_fast.kernels.tune.tiles import ATTENTION as TILES

from .case import Job, Row

SDPA = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def packed(job: Job, frames: int, tokens: int, heads: int) -> Tensor:
    """Queries, keys and values (F, L + 1, 3, H, C) of the tokens; the spare row holds the message's."""
    return torch.randn(frames, tokens + 1, 3, heads, 64, device=job.device).to(job.dtype)


def library_calls(qkv: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Each library on strided views of the packed tensor, as in a block, without copies."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (F, H, L + 1, C)
    for name in SDPA:
        kernel = getattr(torch.nn.attention.SDPBackend, name)

        def sdpa(kernel: Any = kernel) -> Tensor:
            with torch.nn.attention.sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        yield f"sdpa {name.lower().removesuffix('_attention')}", sdpa
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_qkvpacked_func

        yield "flash_attn", lambda: flash_attn_qkvpacked_func(qkv)
    if importlib.util.find_spec("xformers"):
        from xformers.ops import memory_efficient_attention

        yield "xformers", lambda: memory_efficient_attention(*qkv.unbind(2))


def libraries(job: Job, frames: int, tokens: int, heads: int, backward: bool = False) -> Iterator[Row]:
    """The rows of the libraries: forward, or forward and backward."""
    qkv = packed(job, frames, tokens, heads).requires_grad_(backward)
    exact = exactly(qkv.detach())
    for name, call in library_calls(qkv):
        row: Row = {"contender": name, "direction": "forward and backward" if backward else "forward"}
        with job.trying(f"{name} {row['direction']}", row):
            if f"{name} {row['direction']}" in job.without:
                continue
            yield timed(job, row, call, exact, qkv)
        if "note" in row:
            if "No viable backend" in row["note"] or "No available kernel" in row["note"]:
                row["note"] = f"refused: {row['note']}"
            yield row


def exactly(qkv: Tensor) -> Tensor:
    """Attention in float32, a few frames at a time: (F, L + 1, H, C)."""
    rows = [
        F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in part.float().unbind(2))).transpose(1, 2)
        for part in qkv.split(32)
    ]
    return torch.cat(rows)


def timed(job: Job, row: Row, call: Callable[[], Tensor], exact: Tensor, leaf: Tensor) -> Row:
    """The row with its error and time; with backward if the leaf requires gradients."""
    backward = leaf.requires_grad
    with torch.set_grad_enabled(backward):
        got = job.wrong(call())
        row["error"] = float((got.detach()[:, : exact.shape[1]].float() - exact).norm() / exact.norm())
        row["right"] = row["error"] <= 4 * torch.finfo(job.dtype).eps
        if not row["right"]:
            return {**row, "note": f"WRONG: error {row['error']:.3g}"}
        if backward:
            cotangent = torch.randn_like(got)
            row["ms"] = job.milliseconds(lambda: torch.autograd.grad(call(), leaf, cotangent))
        else:
            row["ms"] = job.milliseconds(call)
    return row


def sizes(job: Job, tokens: int, frames: int, heads: int) -> Iterator[Row]:
    """The libraries and ours at one number of tokens: forward, then forward and backward."""
    if job.tiny:
        tokens, frames, heads = 17, 4, 2
    base: Row = {"op": "attention", "tokens": tokens, "frames": frames, "precision": job.precision}
    best: dict[str, float] = {}
    for backward in (False, True):
        for row in (*libraries(job, frames, tokens, heads, backward), *ours(job, frames, tokens, heads, backward)):
            direction = row["direction"]
            if "ms" in row:
                best[direction] = min(best.get(direction, row["ms"]), row["ms"])
                row["to_best"] = row["ms"] / best[direction]
            yield {**base, **row}


class _Ours(torch.autograd.Function):
    """The Triton kernel with its own backward pass."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        from xclip_fast.kernels.triton import attention

        out, saved = attention.forward(qkv.requires_grad, qkv)
        ctx.save_for_backward(qkv, out, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        from xclip_fast.kernels.triton import attention

        qkv, out, *saved = ctx.saved_tensors
        return attention.backward(dout, qkv, out, saved)


def ours(job: Job, frames: int, tokens: int, heads: int, backward: bool) -> Iterator[Row]:
    """The Triton kernel at each tile size; backward takes its tile sizes from the table, so it is timed only once."""
    from xclip_fast.kernels.triton import launching

    qkv = packed(job, frames, tokens, heads).requires_grad_(backward)
    exact = exactly(qkv.detach())
    tiles = TILES[:2] if job.tiny else TILES
    for use in (None,) if backward else (None, *tiles):
        name = "xclip-fast triton" + (f" {use['BLOCK_M']}x{use['BLOCK_N']}" if use else "")
        row: Row = {"contender": name, "direction": "forward and backward" if backward else "forward", "tile": use}
        key = f"{name} {use} {row['direction']}"

        def call(use: dict[str, Any] | None = use) -> Tensor:
            with contextlib.nullcontext() if use is None else launching.forced_tile("attention", use):
                out: Tensor = _Ours.apply(qkv)
                return out

        with job.trying(key, row):
            if key in job.without:
                continue
            yield timed(job, row, call, exact, qkv)
        if "note" in row:
            yield row
