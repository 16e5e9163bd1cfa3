"""Measure on this GPU: ``python -m xclip_fast.kernels.tune [--backends] [--op NAME ...] [--commit]``.

Tiles of the Triton kernels: for every tile table and every shape of the X-CLIP blocks, each of the op's candidates that
compiles, fits and agrees with the table's tile is timed, and the fastest is written. With ``--backends``, to be run
after that, the backends of every op and the tiles of the CUDA library's products (tune_backends.py).

It goes into the user's own table (``tiles.json`` or ``choices.json`` in ``~/.cache/xclip_fast``), which is asked before
the shipped one, or with ``--commit`` into the shipped one (in ``kernels/triton`` or ``kernels``).
"""

import argparse
import functools
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WIDTHS = (768, 1024)
ROWS = (8, 64, 400, 1576, 12608, 50432)  # M: messages, a short batch, one video of B/32 and B/16, batches of 8 and 32
LENGTHS = (50, 197, 257, 577)
Work = tuple[dict[str, list[int]], Callable[[], Any]]  # where a row of the table holds, and what to time


def boundaries(values: tuple[int, ...], value: int) -> list[int]:
    """The range of sizes that a measured value stands for: up to the middle, by ratio, of its neighbours."""
    index = values.index(value)
    low = 0 if index == 0 else int((values[index - 1] * value) ** 0.5) + 1
    high = 2**31 - 1 if index == len(values) - 1 else int((value * values[index + 1]) ** 0.5)
    return [low, high]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def gemm_work() -> Iterator[Work]:
    from .triton.gemm import gemm

    for width in WIDTHS:
        for k, n in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
            for m in ROWS:
                x, weight, bias = _normal(m, k), _normal(n, k) * k**-0.5, _normal(n)
                where = {"m": boundaries(ROWS, m), "n": [n, n], "k": [k, k], "bytes": [2, 2]}
                residual = _normal(m, n) if n == width else None  # the block's narrow outputs join the residual stream
                where |= {"heavy": [int(residual is not None)] * 2, "aligned": [1, 1]}
                yield where, functools.partial(gemm, x, weight, bias=bias, residual=residual)


def attention_work(backward: bool) -> Iterator[Work]:
    from .attention import ONE_TILE
    from .triton import attention

    for length in LENGTHS:
        qkv = _normal(256, length + 1, 3, 12, 64)
        where = {"length": boundaries(tuple(each + 1 for each in LENGTHS), length + 1), "bytes": [2, 2]}
        if not backward:
            yield where, functools.partial(attention.forward, False, qkv)
        elif length + 1 > ONE_TILE[2]:  # shorter ones have a kernel without tiles
            out, saved = attention.forward(True, qkv)
            yield where, functools.partial(attention.backward, torch.randn_like(out), qkv, out, saved)


def product(**choices: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Every combination of the choices."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


ATTENTION = product(BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), num_warps=(4, 8), num_stages=(1, 2, 3))
GEMM = [
    {"GROUP_M": 8, **use}
    for use in product(
        BLOCK_M=(64, 128),
        BLOCK_N=(64, 128, 256),
        BLOCK_K=(64,),
        SUBTILES=(1, 4),
        FLATTEN=(False, True),
        num_warps=(4, 8),
        num_stages=(3, 4),
    )
]
# tile table -> (candidates, work)
WORK: dict[str, tuple[list[dict[str, Any]], Callable[[], Iterator[Work]]]] = {
    "gemm": (GEMM, gemm_work),
    "attention": (ATTENTION, lambda: attention_work(False)),
    "attention_dq": (ATTENTION, lambda: attention_work(True)),
    "attention_dk_dv": (ATTENTION, lambda: attention_work(True)),
}


def first_tensor(result: Any) -> Tensor:
    while not isinstance(result, Tensor):
        result = result[0]
    return result


def tune(op: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The measured rows of one table, fastest tile of each shape."""
    import triton
    from triton.testing import do_bench

    from .triton import _launch

    candidates, work = WORK[op]
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    rows = []
    for where, run in work():
        wanted = first_tensor(run()).float()
        shipped = do_bench(run, return_mode="median")
        best: tuple[float, dict[str, Any]] | None = None
        for use in candidates:
            with _launch.forced_tile(op, use):
                try:
                    got = first_tensor(run()).float()
                except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError):
                    continue  # does not fit this device, or does not compile for it
                if (got - wanted).abs().max() > 0.02 * wanted.abs().max():
                    raise RuntimeError(f"{op} with {use} at {where} computes something else: do not use this build")
                milliseconds = do_bench(run, return_mode="median")
            if best is None or milliseconds < best[0]:
                best = milliseconds, use
        if best is None:
            raise RuntimeError(f"no candidate of {op} runs on {name} at {where}")
        say(f"{op} {where}: {best[0]:.4f} ms, before {shipped:.4f} ms: {best[1]}")
        rows.append(
            {"arch": _launch.arch(device), "where": where, "use": best[1], "measured": f"{name}, {best[0]:.4f} ms"}
        )
    return rows


def merge(path: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Put measured rows before the others of their table, in place of what was measured for the same bounds."""
    table: dict[str, list[dict[str, Any]]] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for op, measured in rows.items():
        done = [(row["arch"], row["where"]) for row in measured]
        kept = [row for row in table.get(op, []) if (row["arch"], row.get("where")) not in done]
        table[op] = [*measured, *kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
        lines = ",\n".join(
            f"  {json.dumps(op)}: [\n" + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]"
            for op, rows in table.items()
        )
        file.write("{\n" + lines + "\n}\n")
    os.replace(file.name, path)


def main(arguments: list[str] | None = None) -> int:
    from . import _choices, tune_backends
    from ._tables import user_table

    parser = argparse.ArgumentParser(prog="python -m xclip_fast.kernels.tune", description=__doc__)
    parser.add_argument("--backends", action="store_true", help="the backends of the ops instead of Triton's tiles")
    known = sorted({*WORK, *tune_backends.WORK, *tune_backends.SLOTS, *tune_backends.TILE_WORK})
    parser.add_argument("--op", action="append", choices=known, help="one table only; may be repeated")
    parser.add_argument("--commit", action="store_true", help="write the shipped table instead of the user's own")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: tuning measures on a GPU, and torch.cuda.is_available() is False here", file=sys.stderr)
        return 1
    work: Any = {**tune_backends.TILE_WORK, **tune_backends.SLOTS, **tune_backends.WORK} if options.backends else WORK
    if options.backends:
        table = _choices.TABLE
    else:
        from .triton import _launch

        table = _launch.TABLE
    path = table if options.commit else user_table(table.name)
    wrong = 0
    for op in options.op or list(work):
        if op not in work:
            other = "without" if options.backends else "with"
            parser.error(f"--op {op} is measured {other} --backends; here: {', '.join(work)}")
        if options.backends:
            rows, refused = tune_backends.measure(op, print)
            wrong += refused
        else:
            rows = tune(op, print)
        merge(path, {op: rows})
        _choices.forget()  # the backend cuda is measured with the tiles that were found for it
    print(f"written to {path}")
    if wrong:
        print(f"error: {wrong} backends or tiles compute something else and were left out", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
