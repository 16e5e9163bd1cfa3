"""Shared by the benchmarks: timing, memory, GEMM limits, the description of the machine, atomic JSON."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from xclip_fast.kernels.linear import NATIVE_ON_CPU
from xclip_fast.kernels.tune.measuring import milliseconds as replayed

from xclip_fast import XCLIP, TextConfig, VisionConfig, XCLIPConfig, info, kernels, tokenize
from xclip_fast.files import write_text
from xclip_fast.flops import Product

SWIN_WARM_UPS, SWIN_RUNS = 50, 30  # the procedure of the paper's Table 1
CPU_RUNS = 10
clock = time.perf_counter  # for timed calls on a CPU; time.process_time leaves out what other processes compute


def environment(device: str) -> dict[str, Any]:
    """The machine, the packages, the commit and the command, for a file of results."""
    written = Path(__file__).with_name("COMMIT")  # in a bundle, which may lie in another checkout
    git = ["git", "-C", str(written.parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        commit = written.read_text().strip() if written.exists() else None
        commit = commit or subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        **info.environment(device),
        "cores": os.cpu_count(),
        "native_bf16": device == "cuda" or NATIVE_ON_CPU[torch.bfloat16],
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "clock": clock.__name__,
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def start_report(args: argparse.Namespace, precisions: Mapping[str, torch.dtype]) -> tuple[dict[str, Any], list[int]]:
    """The head of a report of throughput.py or training.py, without rows; and the tokens of each label.

    The load average is read here, before the run adds to it.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = environment(args.device)
    lengths = (tokenize(args.labels).argmax(1) + 1).tolist()
    labels = {"count": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}
    rates = {name: gemm_rate(dtype, args.device) for name, dtype in precisions.items()}
    report = {"environment": machine, "labels": labels, "backend": args.backend, "gemm_flop_per_s": rates, "rows": []}
    return report, lengths


def timed(call: Callable[[], Any], device: str) -> Callable[[], float]:
    """Runs ``call``. The result, when it is called, waits for the GPU, if any, and returns the seconds."""
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
    """The result of ``call``, and its peak memory in bytes above the memory in use before; None if it is unknown."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that earlier calls freed would hide growth
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
    """The error as one line for a row's note. Triton's errors are not RuntimeErrors, so their type is named."""
    said = str(error).strip().splitlines()
    name = "" if type(error) is RuntimeError and said else f"{type(error).__name__}: " if said else type(error).__name__
    return f"failed: {name}{said[0] if said else ''}"


def measure(
    contenders: dict[str, Callable[[], Any]], device: str, seconds: float, pause: float = 0.05
) -> dict[str, dict[str, Any]]:
    """Times the contenders in rounds for about ``seconds`` in all.

    Each round has an order of its own: a call depends on the one before it, which warms the caches, and by its power
    sets the clock of a GPU.

    Args:
        pause: seconds before each call on a CPU: an engine's threads go on spinning after its call, on the cores of
            the next.

    Returns:
        for each contender ``output``, ``peak_memory``, the ``seconds`` of every timed call and the number of
        ``warm_ups``; or a ``note`` that says how it failed. If two rounds do not fit, the first call of the
        slowest counts, and the others go on without it.
    """
    runs, warm_ups = (SWIN_RUNS, SWIN_WARM_UPS) if device == "cuda" else (CPU_RUNS, 1)
    begin = time.perf_counter()
    results: dict[str, dict[str, Any]] = {}
    for name, call in contenders.items():
        try:
            if device == "cuda":
                call()  # compiles what is missing
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
    if not live:
        return results
    if device == "cuda":
        begin = time.perf_counter()  # compiling does not count
    while live:  # two rounds, which make a ratio, or one of a single contender
        needed = min(len(live), 2) * sum(results[name]["first"] for name in live)
        if needed <= begin + seconds - time.perf_counter():
            break
        slowest = max(live, key=lambda name: results[name]["first"])
        results[slowest].update(seconds=[results[slowest]["first"]], warm_ups=0)
        del live[slowest]
    names, round_seconds = list(live), sum(results[name]["first"] for name in live)
    for name, call in live.items():
        while results[name]["warm_ups"] < warm_ups and time.perf_counter() - begin < seconds / 3:
            call()
            results[name]["warm_ups"] += 1
    pending: dict[str, list[Callable[[], float]]] = {name: [] for name in live}
    for done in range(runs):
        if done and time.perf_counter() - begin + round_seconds > seconds:
            break
        before = time.perf_counter()
        for name in random.Random(done).sample(names, len(names)):
            if device == "cpu":
                time.sleep(pause)
            pending[name].append(timed(live[name], device))
        round_seconds = time.perf_counter() - before
    for name, waits in pending.items():
        results[name]["seconds"] = [wait() for wait in waits]
    return results


def limit_seconds(rows: int, inner: int, columns: int, dtype: torch.dtype, device: str, seconds: float = 1.0) -> float:
    """Median seconds of one bare product. On a CPU, of the fastest of torch's, oneDNN's with a packed weight, and ours.

    A CPU without instructions for ``dtype`` computes in float32.
    """
    if device == "cpu" and not NATIVE_ON_CPU.get(dtype, True):
        dtype = torch.float32
    x, weight = (torch.randn(size, inner, device=device).to(dtype) for size in (rows, columns))
    products: dict[str, Callable[[], Any]] = {"torch": lambda: F.linear(x, weight)}
    if device == "cpu":
        bias = torch.zeros(columns, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        products["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        products["ours"] = torch.inference_mode()(lambda: kernels.cpu.linear(x, weight, bias))
    return fastest(products, device, seconds)


def fastest(calls: dict[str, Callable[[], Any]], device: str, seconds: float) -> float:
    """Seconds of the fastest call. On a GPU what its launch costs the CPU is not in it: a limit must not wait."""
    if device == "cuda":
        return 1e-3 * min(map(replayed, calls.values()))
    results = measure(calls, device, seconds, pause=0.0)
    return min(statistics.median(result["seconds"]) for result in results.values())


def gemm_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of a large square GEMM by torch."""
    size = 8192 if device == "cuda" else 2048
    x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / fastest({"gemm": lambda: F.linear(x, weight)}, device, 3.0)


def own_gemms(products: Iterable[Product], dtype: torch.dtype, device: str) -> float:
    """Seconds of the bare GEMMs of the model's own shapes, one after another, without attention and the rest."""
    shapes: dict[tuple[int, int, int], int] = {}
    for product in products:
        if product.weight:
            shape = (product.rows, product.inner, product.columns)
            shapes[shape] = shapes.get(shape, 0) + product.times
    return sum(times * limit_seconds(*shape, dtype, device, 0.3) for shape, times in shapes.items())


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Writes the file, if one is wanted, whole or not at all, with one line for each key and for each row of a list."""

    def lines(value: Any) -> str:
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(json.dumps(row, allow_nan=False) for row in value) + "\n ]"
        return json.dumps(value, allow_nan=False)

    if path:
        write_text(path, "{\n" + ",\n".join(f" {json.dumps(key)}: {lines(content[key])}" for key in content) + "\n}\n")


def small_model(image_size: int = 64, patch_size: int = 16) -> XCLIP:
    """A small model of 8 frames with random weights, for the benchmarks that measure what is around a model."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=image_size, patch_size=patch_size, width=128, layers=2, heads=2)
    text = TextConfig(width=64, layers=2, heads=1)
    return XCLIP(XCLIPConfig(vision=vision, text=text, embed_dim=64, num_frames=8)).eval()


def rows(
    results: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any], tolerance: float, baseline: bool = False
) -> list[dict[str, Any]]:
    """A row for each result of ``measure``: ``base``, the contender, a note, every timing, and the ratio to the first.

    Args:
        tolerance: of the largest error; a result that differs more has a note, and no timings.
        baseline: whether the first is what the others are compared with. Else it is ours, compared with each of them.
    """
    first = next(iter(results.values()))
    found = []
    for name, result in results.items():
        row = {**base, "contender": name, "note": result.get("note", "")}
        found.append(row)
        seconds = result.get("seconds")
        if not seconds:
            continue
        if result is not first and "output" in first:
            error = largest_error(result["output"], first["output"])
            row["largest_error"] = error if math.isfinite(error) else None
            if not error <= tolerance:
                other = next(iter(results))
                row["note"] = f"outputs differ from those of {other} by {error:.1g}, more than {tolerance}: no ratio"
                continue
            row["ratio"] = ratio(*((first["seconds"], seconds) if baseline else (seconds, first["seconds"])))
        row |= {"seconds": seconds, "n": len(seconds), "warm_ups": result["warm_ups"]}
        row["median_s"] = statistics.median(seconds)
    return found


def ratio(theirs: Sequence[float], mine: Sequence[float]) -> dict[str, float]:
    """How many times faster ``mine`` is: by medians, and the extremes of calls in the same turn.

    Empty for a single pair, which is no measurement.
    """
    pairs = [a / b for a, b in zip(theirs, mine, strict=False)]
    if len(pairs) < 2:
        return {}
    return {"median": statistics.median(theirs) / statistics.median(mine), "low": min(pairs), "high": max(pairs)}


def ratio_text(found: Mapping[str, float] | None) -> str:
    """A ratio for people; "" for none."""
    return f"{found['median']:.2f}x ({found['low']:.2f}-{found['high']:.2f})" if found else ""


def shown(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else form.format(value * unit)


def largest_error(got: Any, exact: Any) -> float:
    """The largest difference of two outputs, relative to the largest value; over all parts of a tuple."""
    if isinstance(got, tuple):
        return max(largest_error(*pair) for pair in zip(got, exact, strict=True))
    if got.shape != exact.shape:
        return math.inf
    got, exact = got.float(), exact.float()
    return ((got - exact).abs().max() / exact.abs().max()).item()


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile, to six digits."""
    found = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return [float(f"{value:.6g}") for value in found]
