"""Every function of the CUDA library at the shapes of the model's blocks, compared with torch on one GPU.

    python benchmarks/cuda_library.py --json benchmarks/results/cuda-library.json

The baseline is the product alone, by cuBLAS in bfloat16 (``torch.mm``): an epilogue should cost nothing on top of it.
`of bare` is a contender's time divided by it. The other contenders are torch's own functions, the same under
torch.compile (most of this script's time: see --no-compile) and, for 8 bits, ``torch._scaled_mm``. Each contender's
results are first compared with float32: a wrong one is named and not timed, and the exit code is 1. Times are medians
with cold caches.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import arguments
import measuring
import torch
import torch.nn.functional as F
from torch import Tensor
from xclip_fast.kernels import cuda_library
from xclip_fast.kernels.quick_gelu import quick_gelu_reference as quick_gelu
from xclip_fast.kernels.tune.measuring import milliseconds

# tokens of one frame, of one video of 8 frames, of 8 and 32 videos: B/32, B/16 and L/14
ROWS = {768: (50, 400, 1576, 12608, 50432, 100864), 1024: (257, 2056, 16448, 65792)}
E4M3 = torch.float8_e4m3fn
EPS = 1e-5
DEVICE, DTYPE = "cuda", torch.bfloat16
Call = Callable[[], Any]  # returns a tensor or a tuple of them


@dataclasses.dataclass
class Case:
    """One computation: ``exact`` in float32, ``bare`` the product alone, and the contenders that do all of it."""

    name: str
    shape: tuple[int, int, int]  # M, N, K
    bare: Call
    exact: Call
    contenders: dict[str, Call]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).to(DTYPE)


def half_case(
    name: str, plain: Callable[..., Any], ours: Callable[[str], Any], tiles: tuple[str, ...], *args: Tensor
) -> Case:
    """A case in bfloat16: ``plain`` in torch takes x, W and the other arguments; ``ours`` takes one of the tiles."""
    x, w, *_ = args
    wide = [arg.float() for arg in args]
    contenders: dict[str, Call] = {"torch": lambda: plain(*args), "torch.compile": compiled(plain, args)}
    contenders |= {f"ours, {tile}": lambda tile=tile: ours(tile) for tile in tiles}  # type: ignore[misc]
    return Case(name, (len(x), *w.shape), lambda: torch.mm(x, w.T), lambda: plain(*wide), contenders)


def compiled(call: Callable[..., Any], args: tuple[Any, ...]) -> Call:
    once = torch.compile(call, mode="max-autotune-no-cudagraphs", dynamic=False)
    return lambda: once(*args)


def norm_case(M: int, N: int, D: int, activation: bool) -> Case:
    """LayerNorm, product and, with ``activation``, quick_gelu."""
    from xclip_fast.kernels.triton.fold import fold
    from xclip_fast.kernels.triton.layer_norm import row_statistics

    x, w, bias, gamma, beta = normal(M, D), normal(N, D, scale=D**-0.5), normal(N), 1 + normal(D, scale=0.1), normal(D)
    folded, sums, shift = fold(w, gamma, beta, bias)
    given = {"bias": shift, "norm": (*row_statistics(x, EPS), sums), "activation": activation}

    def plain(x: Tensor, w: Tensor, b: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        u = F.linear(F.layer_norm(x, (D,), gamma, beta, EPS), w, b)
        return quick_gelu(u) if activation else u

    def ours(tile: str) -> Tensor:
        return cuda_library.norm_linear(x, folded, **given, tile=tile)[0]

    tiles = cuda_library.tiles(DTYPE, activation=activation)
    return half_case("fc1" if activation else "qkv", plain, ours, tiles, x, w, bias, gamma, beta)


def residual_case(M: int, D: int, K: int, statistics: bool) -> Case:
    """The product that is added to the residual stream; ``statistics`` also returns mean and 1 / sigma of its rows."""
    h, w, bias, residual = normal(M, K), normal(D, K, scale=K**-0.5), normal(D), normal(M, D)

    def plain(h: Tensor, w: Tensor, b: Tensor, residual: Tensor) -> Any:
        y = residual + F.linear(h, w, b)
        if not statistics:
            return y
        variance, mean = torch.var_mean(y.float(), -1, correction=0)
        return y, mean, (variance + EPS).rsqrt()

    def ours(tile: str) -> Any:
        eps = EPS if statistics else None
        result = cuda_library.linear_residual(h, w, bias=bias, residual=residual, statistics_eps=eps, tile=tile)
        return result if statistics else result[0]

    name = ("out" if K == D else "fc2") + (" with statistics" if statistics else "")
    tiles = cuda_library.tiles(DTYPE, residual=True, statistics=statistics)
    return half_case(name, plain, ours, tiles, h, w, bias, residual)


def fp8_case(name: str, M: int, N: int, K: int) -> Case:
    """A float8 product with the epilogue of "qkv", "fc1" or "fc2"; the baseline is the one in bfloat16."""
    (x, x_scale, x_wide), (w, w_scale, w_wide) = (eight(rows, K) for rows in (M, N))
    bias, residual = torch.randn(N, device=DEVICE), normal(M, N).bfloat16()

    def exact() -> Tensor:
        product = (x.float() @ w.float().T) * w_scale
        if name == "fc2":  # the one scale of x is in w_scale
            return residual.float() + product + bias
        u = product * x_scale[:, None] + bias
        return quick_gelu(u) if name == "fc1" else u

    def ours(tile: str) -> Tensor:
        if name == "fc1":
            return cuda_library.fp8_linear(x, x_scale, w, w_scale, bias, 1.0, tile=tile)
        if name == "fc2":
            return cuda_library.fp8_linear_residual(x, w, w_scale, bias, residual, tile=tile)
        return cuda_library.fp8_linear(x, x_scale, w, w_scale, bias, tile=tile)

    def scaled_mm() -> Tensor:
        scales, kind = (x_scale[:, None], w_scale[None]), torch.bfloat16
        return torch._scaled_mm(x, w.T, *scales, bias=bias.to(kind), out_dtype=kind, use_fast_accum=True)

    tiles = cuda_library.tiles(E4M3, activation=name == "fc1", residual=name == "fc2")
    contenders: dict[str, Call] = {f"ours, {tile}": lambda tile=tile: ours(tile) for tile in tiles}  # type: ignore[misc]
    if name == "qkv":
        contenders["torch._scaled_mm"] = scaled_mm
    return Case(f"{name} in fp8", (M, N, K), lambda: torch.mm(x_wide, w_wide.T), exact, contenders)


def eight(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random matrix in e4m3, the scales of its rows, and itself in bfloat16."""
    wide = torch.randn(rows, columns, device=DEVICE)
    scale = wide.abs().amax(1) / 448
    return (wide / scale[:, None]).to(E4M3), scale, wide.bfloat16()


def cases(widths: tuple[int, ...], most_rows: int, compiles: bool) -> Iterator[Case]:
    for case in all_cases(widths, most_rows):
        if not compiles:
            case.contenders.pop("torch.compile", None)
        yield case


def all_cases(widths: tuple[int, ...], most_rows: int) -> Iterator[Case]:
    for D in widths:
        for M in (rows for rows in ROWS[D] if rows <= most_rows):
            yield norm_case(M, 3 * D, D, False)
            yield norm_case(M, 4 * D, D, True)
            for statistics in (False, True):
                yield residual_case(M, D, D, statistics)
                yield residual_case(M, D, 4 * D, statistics)
            for name, N, K in (("qkv", 3 * D, D), ("fc1", 4 * D, D), ("fc2", D, 4 * D)):
                yield fp8_case(name, M, N, K)


def measure(case: Case) -> list[dict[str, Any]]:
    """A row for each contender: its time in ms, or a note why there is none; ``wrong`` if its result is."""
    M, N, K = case.shape
    exact, bare = case.exact(), milliseconds(case.bare)
    rows = [{"contender": "bare cuBLAS", "ms": bare}]
    for name, call in case.contenders.items():
        row: dict[str, Any] = {"contender": name}
        rows.append(row)
        try:
            got = call()
            row["error"] = measuring.largest_error(got, exact)  # even one wrong tile of thousands shows
            if not row["error"] < (2**-3 if isinstance(got, Tensor) and got.dtype == E4M3 else 2**-6):
                row |= {"wrong": True, "note": f"WRONG: off by {row['error']:.3g} of the largest value"}
            else:
                row["ms"] = milliseconds(call)
        except Exception as failed:  # a missing backend, an error of Triton's
            row["note"] = measuring.failure(failed).removeprefix("failed: ")
    for row in rows:
        row |= {"case": case.name, "m": M, "n": N, "k": K}
        if "ms" in row:
            row |= {"tflops": 2e-9 * M * N * K / row["ms"], "of_bare": row["ms"] / bare}
    return rows


def line(row: dict[str, Any]) -> str:
    start = f"{row['case']:20} {row['m']:6} x {row['n']:4} x {row['k']:4}  {row['contender']:18}"
    if "ms" not in row:
        return f"{start} {row['note']}"
    return f"{start} {row['ms']:9.4f} ms {row['tflops']:6.0f} TFLOP/s {row['of_bare']:6.3f} of bare"


def main(argv: list[str] | None = None) -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--widths", default="768,1024", help="widths of the tokens (default 768,1024)")
    parser.add_argument("--most-rows", type=int, default=70_000, help="leave out more rows than this (default 70000)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args(argv)
    try:
        widths = tuple(int(width) for width in args.widths.split(","))
    except ValueError:
        widths = ()
    if not widths or set(widths) - set(ROWS):
        parser.error(f"--widths {args.widths}: give some of {', '.join(map(str, ROWS))}, separated by commas")
    if not torch.cuda.is_available():
        print("error: no CUDA device: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    if reason := cuda_library.refuse_device("cuda", None):
        print(f"error: {reason}", file=sys.stderr)
        return 1
    rows: list[dict[str, Any]] = []
    report = {"environment": measuring.environment("cuda"), "rows": rows}
    with torch.no_grad():
        for case in cases(widths, args.most_rows, not args.no_compile):
            rows += measure(case)
            if args.json:  # after every case: an interrupted run keeps its rows
                measuring.write_json(args.json, report)
            print(*map(line, rows[-1 - len(case.contenders) :]), sep="\n", flush=True)
            torch._dynamo.reset()
    return 1 if any(row.get("wrong") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
