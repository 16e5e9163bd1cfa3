"""Everything a GPU should be asked, in one command: `make gpu-check`, within ten minutes, without a network.

Runs the GPU tests, then each op of one block against its peers, throughput.py, training.py, with the CUDA library
cuda_library.py, a short training run on video files, and with DALI decode.py; writes their JSON under
benchmarks/results/. A failed test ends it: there is no timing of a wrong answer. Needs torch, triton and pytest, and
compares with what else is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import measuring
import torch
import torch.nn.functional as F
from ops.test_ops import CASES, cast, first
from xclip_fast.kernels import _cuda
from xclip_fast.kernels._dispatch import OPS, backend

from xclip_fast import XCLIP
from xclip_fast.data.decode.dali_support import missing
from xclip_fast.kernels import _overlap as overlap

HERE = Path(__file__).parent
NO_GPU = 77  # what the program of checks says where it finds none
TESTS = ("tests/kernels", "tests/nn", "tests/inference")
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
        with backend(candidate.name):  # some are taken only where they are asked for
            refused = candidate.refusal(tuple(args))
        if candidate.name != "reference" and refused is None:

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
            if "keys given" not in name and OPS[op].differentiable:
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


def tower_milliseconds() -> dict[str, float]:
    """The video tower of B/16 8f on one video in bfloat16: eager, from a CUDA graph, and from one that was captured
    without the message path beside the projection."""
    model = XCLIP("B/16-8f").cuda().bfloat16().eval()
    video = torch.randint(256, (1, 8, 224, 224, 3), dtype=torch.uint8, device="cuda")
    found = {}
    with torch.inference_mode():
        found["eager"] = milliseconds(lambda: model.encode_video(video))
        graphed = model.graphed()
        found["graph"] = milliseconds(lambda: graphed(video))
        graphed.clear()
        with mock.patch.object(overlap, "_is_captured", return_value=False):
            found["graph, one after the other"] = milliseconds(lambda: graphed(video))
    return found


def data_wait(
    folder: Path, clips: int = 60, size: tuple[int, int] = (256, 340), overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """How a trainer fares with video files: B/16 8f on H.264 of 340x256 with a keyframe every 12, 50 steps of 32.

    The share of the time that it waited for data, and clips/s, after the first ten steps. `clips` files are made and
    each stands in the manifest often, so that an epoch is long; they are in the page cache, so no disk is measured.
    """
    from xclip_fast.data.manifest.manifest import index
    from xclip_fast.data.motion import CLASSES, write_dataset
    from xclip_fast.train import loop as train

    videos = folder / "videos"
    write_dataset(videos, -(-clips // len(CLASSES)), size=size, frames=64, preset="veryfast", g=12, bf=0)
    found = index(videos, workers=0)
    found.select([row % len(found) for row in range(2000)]).write(videos / "often.jsonl")
    data = [f"data.train={videos / 'often.jsonl'}", "data.val=null", "data.val_fraction=0", "model.init=null"]
    run = ["optim.batch_size=32", "stop_after=50", f"output={folder / 'run'}", "log.progress=false"]
    train.main("k400-b16-8f", [*data, *run, *overrides])
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["kind"] == "train"][1:]
    mean = {key: statistics.fmean(row[key] for row in rows) for key in ("data_wait", "clips_per_second")}
    return mean | {"dali": missing() is None, "rows": rows}


def library_is_right() -> bool:
    """Whether the CUDA library, if there is one, passes its own program of checks (csrc/tests/check.cu)."""
    library = _cuda.path()
    if not library.exists() or shutil.which("nvcc") is None:
        print("CUDA library: not checked; it is not built, or nvcc is not on the PATH")
        return True
    with tempfile.TemporaryDirectory() as folder:
        sources = HERE.parent / "csrc"
        options = ["-std=c++17", "-arch=sm_90a", "-I", str(sources / "include"), "-Xlinker", f"-rpath={library.parent}"]
        program = Path(folder) / "check"
        command = ["nvcc", *options, str(sources / "tests" / "check.cu"), str(library), "-o", str(program)]
        subprocess.run(command, check=True)
        return subprocess.run([str(program)], check=False).returncode in (0, NO_GPU)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=150, help="for throughput.py (default 150)")
    parser.add_argument("--skip-tests", action="store_true", help="only measure; the tests were just run")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA device: torch.cuda.is_available() is False", file=sys.stderr)
        return 1
    environment = {**os.environ, "XCLIP_FAST_REQUIRE_GPU": "1"}
    dali = missing() is None
    tests = [*TESTS, "tests/data/test_dali.py"] if dali else TESTS
    if (
        not args.skip_tests
        and subprocess.run([*PYTEST, *tests], cwd=HERE.parent, env=environment, check=False).returncode
    ):
        print("error: the GPU tests fail; nothing is measured", file=sys.stderr)
        return 1
    if not args.skip_tests and not library_is_right():
        print("error: the CUDA library's check program fails; nothing is measured", file=sys.stderr)
        return 1
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    rows = [row for op in OPS for row in measure_op(op, torch.bfloat16)]
    tower = tower_milliseconds()
    print("video tower of B/16 8f, one video:", ", ".join(f"{name} {ms:.3f} ms" for name, ms in tower.items()))
    report = {"environment": measuring.environment("cuda"), "launch_us": launch_overhead(), "tower_ms": tower}
    report["rows"] = rows
    measuring.write_json(results / f"ops-{name}.json", report)
    seconds = str(args.seconds)
    scripts = {
        "throughput": [
            "--variants=B/32-8f,B/16-8f,L/14-8f",
            "--precisions=bf16",
            "--compile",
            "--fp8",
            "--seconds",
            seconds,
        ],
        "training": ["--variants=B/16-8f", "--precisions=bf16", "--recompute=no,yes", "--seconds=60"],
    }
    if _cuda.refuse_device("cuda", None) is None:
        scripts["cuda_library"] = ["--widths=768", "--most-rows=20000", "--no-compile"]
    if dali:
        scripts["decode"] = ["--works=loader", "--seconds=60"]
    failed = 0
    for script, options in scripts.items():
        command = [
            sys.executable,
            str(HERE / f"{script}.py"),
            *options,
            "--json",
            str(results / f"{script}-{name}.json"),
        ]
        failed |= subprocess.run(command, cwd=HERE.parent, env=environment, check=False).returncode
    with tempfile.TemporaryDirectory() as folder:
        found = data_wait(Path(folder))
    print(
        f"training on files: {found['clips_per_second']:.0f} clips/s, {found['data_wait']:.1%} of it waiting for data"
    )
    measuring.write_json(results / f"data-wait-{name}.json", {"environment": measuring.environment("cuda"), **found})
    return failed


if __name__ == "__main__":
    sys.exit(main())
