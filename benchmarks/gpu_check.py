"""Everything a GPU should be asked, in one command: `make gpu-check`, within ten minutes, without a network.

Runs the GPU tests, then each op of one block against its peers, then throughput.py, and writes their JSON under
benchmarks/results/. A failed test ends it: there is no timing of a wrong answer. Needs torch, triton and pytest, and
compares with what else is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measuring
import torch
import torch.nn.functional as F
from ops.test_ops import CASES, cast, first
from xclip_fast.kernels._dispatch import OPS, backend

HERE = Path(__file__).parent
TESTS = ("tests/test_ops.py", "tests/test_cct.py", "tests/test_gpu.py")
PYTEST = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib"]


def milliseconds(call: Callable[[], Any]) -> float:
    """Median GPU time of a call, caches cold."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def peers(op: str, args: list[Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What else computes this op: torch eager and compiled, and the libraries that are installed."""

    def reference(*given: Any) -> Any:
        return first(OPS[op].reference(*given))

    yield "torch eager", reference
    torch._dynamo.reset()
    yield "torch.compile", torch.compile(reference, mode="max-autotune-no-cudagraphs")
    if op == "diffusion_attention":
        qkv, message = args
        # the libraries want L + 1 contiguous keys: made outside of the timing, in their favour
        keys = torch.cat([qkv.detach()[:, :, 1:], message.detach()[:, None]], 1).unbind(2)
        query, key, value = (t.contiguous() for t in (qkv.detach()[:, :, 0], *keys))
        heads_first = [t.transpose(1, 2).contiguous() for t in (query, key, value)]
        for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
            kernel = getattr(torch.nn.attention.SDPBackend, name)

            def sdpa(*_: Any, kernel: Any = kernel) -> Any:
                with torch.nn.attention.sdpa_kernel(kernel):
                    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

            yield f"sdpa {name.lower().removesuffix('_attention')}, keys given", sdpa
        with contextlib.suppress(ImportError):
            from flash_attn import flash_attn_func

            yield "flash-attn, keys given", lambda *_: flash_attn_func(query, key, value)
        with contextlib.suppress(ImportError):
            from xformers.ops import memory_efficient_attention

            yield "xformers, keys given", lambda *_: memory_efficient_attention(query, key, value)
    if op == "layer_norm":
        with contextlib.suppress(ImportError):
            from apex.normalization import fused_layer_norm_affine  # NVIDIA's apex, not PyPI's

            yield "apex", lambda x, weight, bias, eps: fused_layer_norm_affine(x, weight, bias, x.shape[-1:], eps)


def measure_op(op: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Rows of one op: every backend and peer, forward, and with gradients where the peer has them."""
    torch.manual_seed(0)
    args = cast(CASES[op](), dtype)
    exact = first(OPS[op].reference(*cast(args, torch.float32))).float()
    contenders: list[tuple[str, Callable[..., Any]]] = []
    for candidate in OPS[op].backends:
        if candidate.name != "reference" and candidate.refusal(tuple(args)) is None:

            def ours(*given: Any, name: str = candidate.name) -> Any:
                with backend(name):
                    return first(OPS[op](*given))

            contenders.append((f"xclip-fast {candidate.name}", ours))
    contenders += peers(op, args)
    leaves = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()]
    rows = []
    for name, call in contenders:
        row: dict[str, Any] = {"op": op, "dtype": str(dtype).removeprefix("torch."), "contender": name}
        rows.append(row)
        try:
            with torch.no_grad():
                row["error"] = float((call(*args).float() - exact).norm() / exact.norm())
                row["forward_ms"] = milliseconds(lambda call=call: call(*args))
            if "keys given" not in name:
                for leaf in leaves:
                    leaf.requires_grad_()
                grad = torch.ones_like(call(*args))

                def both(call: Callable[..., Any] = call, grad: torch.Tensor = grad) -> None:
                    torch.autograd.grad(call(*args), leaves, grad, allow_unused=True)

                row["forward_backward_ms"] = milliseconds(both)
        except (RuntimeError, ImportError) as error:
            row["note"] = str(error).splitlines()[0]
        finally:
            for leaf in leaves:
                leaf.requires_grad_(False)
    ours_best = min(
        (row["forward_ms"] for row in rows if "xclip" in row["contender"] and "forward_ms" in row), default=0
    )
    for row in rows:
        if "forward_ms" in row and ours_best:
            row["ratio_to_ours"] = row["forward_ms"] / ours_best
        numbers = {
            key: f"{row[key]:.4g}"
            for key in ("forward_ms", "forward_backward_ms", "ratio_to_ours", "error")
            if key in row
        }
        print(row["op"], row["dtype"], row["contender"], numbers, row.get("note", ""), flush=True)
    return rows


def launch_overhead() -> float:
    """Microseconds of host time that one eager call of a small op takes."""
    import time

    x = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    times = []
    with torch.no_grad():
        for _ in range(200):
            begin = time.perf_counter()
            OPS["quick_gelu"](x)
            times.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=240, help="for throughput.py (default 240)")
    parser.add_argument("--skip-tests", action="store_true", help="only measure; the tests were just run")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    environment = {**os.environ, "XCLIP_FAST_REQUIRE_GPU": "1"}
    if (
        not args.skip_tests
        and subprocess.run([*PYTEST, *TESTS], cwd=HERE.parent, env=environment, check=False).returncode
    ):
        print("error: the GPU tests fail; nothing is measured", file=sys.stderr)
        return 1
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    rows = [row for op in OPS for row in measure_op(op, torch.bfloat16)]
    report = {"environment": measuring.environment("cuda"), "launch_us": launch_overhead(), "rows": rows}
    measuring.write_json(results / f"ops-{name}.json", report)
    throughput = [sys.executable, str(HERE / "throughput.py"), "--variants", "B/32-8f,B/16-8f,L/14-8f"]
    throughput += ["--precisions", "bf16", "--compile", "--seconds", str(args.seconds)]
    throughput += ["--json", str(results / f"throughput-{name}.json")]
    return subprocess.run(throughput, cwd=HERE.parent, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
