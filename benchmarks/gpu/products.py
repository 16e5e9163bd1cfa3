"""Stage 4: the four products of a block of B/16 with their epilogues: cuBLAS, Triton's, each CUTLASS tile.

`xclip-fast tune` times Triton's tiles.

qkv = LN(x) W + b; out = x + h W + b with row statistics; fc1 = quick_gelu(LN(x) W + b); fc2 like out. A product sums
over K and has M rows and N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Job, Row

EPS = 1e-5
SHAPES = {"qkv": (2304, 768), "out": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}  # N, K
TINY = {"qkv": (192, 64), "out": (64, 64), "fc1": (256, 64), "fc2": (64, 256)}
ROWS = (1576, 12608, 50432)  # 1, 8 and 32 videos of 8 frames of 197 tokens


class Operands(NamedTuple):
    """The operands of a product: x (M, K), W (N, K), the residual (M, N) and the vectors, in half precision."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor
    residual: Tensor


def operands(job: Job, product: str, rows: int) -> Operands:
    torch.manual_seed(rows)
    n, k = (TINY if job.tiny else SHAPES)[product]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=job.device) * scale).to(job.dtype)

    x, residual = normal(rows, k), normal(rows, n)
    return Operands(x, normal(n, k, scale=k**-0.5), normal(n), 1 + normal(k, scale=0.1), normal(k), residual)


def quick_gelu(u: Tensor) -> Tensor:
    return u * torch.sigmoid(1.702 * u)


def plain(product: str, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Any:
    """The product in torch (cuBLAS and separate passes), with the row statistics where the product has them."""
    if product in ("qkv", "fc1"):
        u = F.linear(F.layer_norm(x, gamma.shape, gamma, beta, EPS), weight, bias)
        return (quick_gelu(u),) if product == "fc1" else (u,)
    y = torch.addmm(residual, x, weight.T) + bias
    variance, mean = torch.var_mean(y.float(), -1, correction=0)
    return y, mean, (variance + EPS).rsqrt()


def folded_weight(product: str, given: Operands) -> tuple[torch.Tensor, Row]:
    """The weight with LayerNorm folded in, and what a product with it takes besides."""
    from xclip_fast.kernels.layer_norm.triton import row_statistics
    from xclip_fast.kernels.triton.fold import fold

    x, weight, bias, gamma, beta, _ = given
    folded, sums, shift = fold(weight, gamma, beta, bias)
    return folded, {"bias": shift, "norm": (*row_statistics(x, EPS), sums), "activation": product == "fc1"}


def triton_call(product: str, given: Operands) -> Callable[[], Any]:
    from xclip_fast.kernels.triton.gemm import gemm

    x, weight, bias, _, _, residual = given
    if product in ("out", "fc2"):
        return lambda: gemm(x, weight, bias=bias, residual=residual, statistics_eps=EPS)
    folded, options = folded_weight(product, given)
    return lambda: gemm(x, folded, **options)


def cutlass_call(product: str, given: Operands, use: str) -> Callable[[], Any]:
    from xclip_fast.kernels import cuda_library

    x, weight, bias, _, _, residual = given
    if product in ("out", "fc2"):
        return lambda: cuda_library.linear_residual(
            x, weight, bias=bias, residual=residual, statistics_eps=EPS, tile=use
        )
    folded, options = folded_weight(product, given)
    return lambda: cuda_library.norm_linear(x, folded, **options, tile=use)


def contenders(job: Job, product: str, given: Operands) -> Iterator[tuple[str, Row, Callable[[], Callable[[], Any]]]]:
    """Each contender's name, entries for its row, and function that makes its call."""
    from xclip_fast.kernels import cuda_library

    yield "cuBLAS alone", {"kind": "bare"}, lambda: lambda: F.linear(given.x, given.weight)
    yield "cuBLAS, torch's passes", {"kind": "cublas"}, lambda: lambda: plain(product, *given)
    yield "triton", {"kind": "triton"}, lambda: triton_call(product, given)
    if cuda_library.refuse_device(job.device, 0) is None:
        epilogue = {"qkv": "Norm", "fc1": "NormGelu"}.get(product, "ResidualStatistics")
        for name in cuda_library.tiles(epilogue, job.dtype):
            row = {"kind": "cutlass", "tile": name}
            yield f"cutlass {name}", row, lambda name=name: cutlass_call(product, given, name)


def product(job: Job, product: str, rows: int) -> Iterator[Row]:
    """Each contender at one shape: its error, its time, and its time relative to the product alone."""
    from xclip_fast.kernels import cuda_library

    from . import compare

    rows = 24 + rows % 7 if job.tiny else rows
    given = operands(job, product, rows)
    exact = plain(product, *(part.double() for part in given))
    torchs = plain(product, *given)
    n, k = given.weight.shape
    base: Row = {"op": product, "m": rows, "n": n, "k": k, "precision": job.precision}
    bare = 0.0
    with torch.no_grad():
        for name, more, make in contenders(job, product, given):
            row: Row = {**base, "contender": name, **more}
            key = f"{name} {more.get('tile')}"
            if key in job.without:
                continue
            with job.trying(key, row):
                call = make()
                if more["kind"] != "bare":
                    compare.check(job, row, call, exact, torchs)
                if row.get("right", True):
                    row["ms"] = job.milliseconds(call)
                    bare = bare or row["ms"]
                    row |= {"over_bare": row["ms"] / bare, "teraflop_per_s": 2e-9 * rows * n * k / row["ms"]}
            yield row
    if (reason := cuda_library.refuse_device(job.device, 0)) is not None:
        yield {**base, "contender": "cutlass", "kind": "cutlass", "note": f"refused: {reason}"}
