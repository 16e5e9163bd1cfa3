"""What the benchmarks share: timing, memory, the GEMM limits, the machine's description, atomic JSON."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from xclip_fast.kernels._linear import NATIVE_ON_CPU

import xclip_fast
from xclip_fast.flops import Product

SWIN_WARM_UPS, SWIN_RUNS = 50, 30  # the procedure of the paper's Table 1
CPU_RUNS = 10
clock = time.perf_counter  # of timed calls on a CPU; time.process_time counts what this process alone computed


def environment(device: str) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in ("torch", "triton", "transformers", "numpy", "av"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        written = Path(__file__).with_name("COMMIT")  # in a bundle, which has no git
        commit = written.read_text().strip() if written.exists() else None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "native_bf16": device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "python": platform.python_version(),
        "xclip_fast": xclip_fast.__version__,
        **versions,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def timed(call: Callable[[], Any], device: str) -> Callable[[], float]:
    """Run ``call``; the result gives its seconds and, on a GPU, waits for them."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()

        def seconds_on_gpu() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1e3

        return seconds_on_gpu
    begin = clock()
    call()
    seconds = clock() - begin
    return lambda: seconds


def peak_memory(call: Callable[[], Any], device: str) -> tuple[Any, int | None]:
    """The result of ``call`` and the bytes it took at its peak above what was taken before; None if unknown."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # give back what earlier calls left, or it would hide growth
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    except OSError:  # not Linux, or not allowed
        return call(), None
    before = resident("VmRSS")
    result = call()
    return result, max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def failure(error: BaseException) -> str:
    """One line for a row's note. Triton's own errors (OutOfResources, CompilationError) are no RuntimeErrors."""
    said = str(error).strip().splitlines()
    name = "" if type(error) is RuntimeError and said else f"{type(error).__name__}: " if said else type(error).__name__
    return f"failed: {name}{said[0] if said else ''}"


def measure(contenders: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, dict[str, Any]]:
    """Time the contenders in turn (A B C, B C A, ...), within about ``seconds``.

    Returns:
        of each contender ``output``, ``peak_memory``, ``seconds`` of every timed call and the number of ``warm_ups``
        before them; or a ``note`` that says how it failed. Where no second call fits, the first one counts.
    """
    runs, warm_ups = (SWIN_RUNS, SWIN_WARM_UPS) if device == "cuda" else (CPU_RUNS, 1)
    begin = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    for name, call in contenders.items():
        try:
            first = clock()
            output, peak = peak_memory(call, device)
            first = clock() - first
        except Exception as error:  # out of memory, or a compiler that fails: the others go on
            results[name] = {"note": failure(error)}
            continue
        # a CUDA graph writes its next result to the same place
        output = tuple(part.clone() for part in output) if isinstance(output, tuple) else output.clone()
        results[name] = {"output": output, "peak_memory": peak, "seconds": [], "warm_ups": 1, "first": first}
    live = {name: contenders[name] for name, result in results.items() if "first" in result}
    round_seconds = sum(results[name]["first"] for name in live)
    if time.perf_counter() - begin + round_seconds > seconds:
        for name, call in live.items():
            if time.perf_counter() - begin + results[name]["first"] <= seconds:
                results[name]["seconds"] = [timed(call, device)()]
            else:
                results[name].update(seconds=[results[name]["first"]], warm_ups=0)
        return results
    for name, call in live.items():
        while results[name]["warm_ups"] < warm_ups and time.perf_counter() - begin < seconds / 3:
            call()
            results[name]["warm_ups"] += 1
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in live}
    for done in range(runs):
        if done and time.perf_counter() - begin + round_seconds > seconds:
            break
        before = time.perf_counter()
        names = list(live)
        for name in names[done % len(names) :] + names[: done % len(names)]:
            if device == "cpu":
                time.sleep(0.05)  # an engine's threads go on spinning after its call, on the cores of the next
            pending[name].append(timed(live[name], device))
        round_seconds = time.perf_counter() - before
    for name, waits in pending.items():
        results[name]["seconds"] = [wait() for wait in waits]
    return results


def gemm_seconds(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str, seconds: float = 1.0) -> float:
    """Median time of one bare ``linear`` on random data."""
    x, weight = (torch.randn(size, inner, device=device).to(dtype) for size in (rows, columns))
    return fastest({"gemm": lambda: F.linear(x, weight)}, device, seconds)


def limit_seconds(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str, seconds: float = 1.0) -> float:
    """As ``gemm_seconds``, by the faster of torch's own choice and, on a CPU, oneDNN with a packed weight.

    In float32 if the CPU has no instructions for ``dtype``.
    """
    if device != "cpu":
        return gemm_seconds(rows, inner, columns, dtype, device, seconds)
    if not NATIVE_ON_CPU.get(dtype, True):
        dtype = torch.float32
    x, weight = (torch.randn(size, inner).to(dtype) for size in (rows, columns))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    products = {
        "torch": lambda: F.linear(x, weight),
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
    }
    return fastest(products, device, seconds)


def fastest(calls: dict[str, Callable[[], Any]], device: str, seconds: float) -> float:
    results = measure(calls, device, math.inf if device == "cuda" else seconds)
    return min(statistics.median(result["seconds"]) for result in results.values())


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large square GEMM."""
    size = 8192 if device == "cuda" else 2048
    return 2 * size**3 / gemm_seconds(size, size, size, dtype, device, 3.0)


def own_gemms(products: Iterable[Product], dtype: torch.dtype, device: str) -> float:
    """Seconds of the bare GEMMs of the model's own shapes, one after another: attention and all else for nothing."""
    shapes: dict[tuple[int, int, int], int] = {}
    for product in products:
        if product.weight:
            shape = (product.rows, product.inner, product.columns)
            shapes[shape] = shapes.get(shape, 0) + product.times
    return sum(times * limit_seconds(*shape, dtype, device, 0.3) for shape, times in shapes.items())


def write_json(path: Path, content: Any) -> None:
    """Write whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
