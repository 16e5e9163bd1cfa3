"""Stage 1: the machine, and its speed limits: memory and matrix products."""

from __future__ import annotations

import functools
import statistics
import subprocess
import time
from collections.abc import Iterator

import measuring
import torch

from .case import Job, Row


def versions(job: Job) -> Iterator[Row]:
    """The device and the versions; every other row gets the main ones."""
    from xclip_fast.kernels import cuda_library

    row = measuring.environment(job.device)
    if job.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {"sms": properties.multi_processor_count, "memory_gib": round(properties.total_memory / 2**30, 1)}
        row["capability"] = f"{properties.major}.{properties.minor}"
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        try:
            row["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            row["nvidia_smi"] = str(error)
    row["cuda_library"] = cuda_library.load(cuda_library.path())[1] or f"interface {cuda_library.ABI}"
    yield {"environment": row}


def ceilings(job: Job) -> Iterator[Row]:
    """A large copy on the device (bytes read and written) and large products of random matrices."""
    size = 1 << (20 if job.tiny else 32)
    data = torch.randint(256, (2, size // 8), dtype=torch.int64, device=job.device)
    # a kernel: in a CUDA graph a plain copy goes to the copy engine, which is slower
    ms = job.milliseconds(functools.partial(torch.add, data[1], 1, out=data[0]))
    yield {"contender": "copy", "ms": ms, "terabytes_per_s": 2e-9 * size / ms}
    del data
    n = 256 if job.tiny else 8192
    for dtype in (job.dtype,) if job.tiny else (torch.bfloat16, torch.float16):
        a, b = (torch.randn(n, n, device=job.device).to(dtype) for _ in range(2))
        ms = job.milliseconds(functools.partial(torch.mm, a, b))
        name = str(dtype).removeprefix("torch.")
        yield {"contender": f"mm {n}", "precision": name, "ms": ms, "teraflop_per_s": 2e-9 * n**3 / ms}


def overhead(job: Job) -> Iterator[Row]:
    """Host time of an eager call: of a small op, and of torch's own on the same tensor."""
    from xclip_fast.kernels.dispatch import OPS

    x = torch.ones(1024, device=job.device, dtype=job.dtype)
    for name, call in (("quick_gelu", lambda: OPS["quick_gelu"](x)), ("torch add", lambda: torch.add(x, 1))):
        times = []
        with torch.no_grad():
            for _ in range(20 if job.tiny else 300):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
        yield {"contender": name, "host_us": 1e6 * statistics.median(times)}
