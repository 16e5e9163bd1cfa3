"""What tuning tiles and tuning backends share: contenders are compared, then timed, until the time is over."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .. import cuda_library
from ..common.example import TINY, Sizes
from ..dispatch import INTERPRETED, choices
from . import shapes

DEVICE, DTYPE = "cuda", torch.bfloat16  # of what is measured
Where = dict[str, list[Any]]  # where a row holds: the least and the largest value of sizes


class Contest(NamedTuple):
    """The contenders, and whether what one of them returns is right."""

    calls: dict[str, Callable[[], Any]]
    agrees: Callable[[Any], bool]


Contests = Iterator[tuple[Where, Callable[[], Contest]]]  # where a row holds, and what makes its contest


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def milliseconds(call: Callable[[], Any]) -> float:
    """Median GPU time of a call over about 20 ms, replayed from a CUDA graph: what a launch costs the CPU is not in it.

    The call finds in the L2 cache what the one before left there. In a rehearsal it is one call on the CPU.
    """
    if DEVICE == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    once = _replayed(call, 1, 3)
    calls = max(1, min(100, round(0.5 / once)))  # of half a millisecond: a short graph would wait for its own start
    return _replayed(call, calls, max(5, min(100, round(20 / (calls * once)))))


def _replayed(call: Callable[[], Any], calls: int, replays: int) -> float:
    """Median milliseconds of a call, of which a graph has ``calls``."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call()  # compiles, and asks cuBLAS for its workspace on this stream
        torch.cuda.synchronize()
        graph.capture_begin()  # torch.cuda.graph would empty the allocator's cache each time
        try:
            for _ in range(calls):
                call()
        finally:
            graph.capture_end()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / calls


def failures() -> tuple[type[Exception], ...]:
    """What a kernel raises that does not fit the GPU, does not compile for it, or finds no memory."""
    from triton.errors import TritonError

    return TritonError, RuntimeError


def measure(
    module: Any, name: str, shape: Sizes, batches: tuple[int, ...], deadline: float, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], int]:
    """The rows of one table, and how many contenders were left out as wrong.

    Nothing is begun after ``deadline`` (of ``time.monotonic``); a row has what was timed until then.

    Args:
        module: ``tiles`` or ``backends``: its ``contests`` are held, its ``row`` says what is kept of one.
    """
    from ..triton.launching import arch

    rows, wrong, device = [], 0, torch.device(DEVICE)
    architecture = choices.architecture(device) or arch(device)
    for where, contest in module.contests(name, shape, batches, say):
        if time.monotonic() >= deadline:
            say(f"{name} {where}: the time is over")
            break
        try:
            calls, agrees = contest()
        except failures() as error:  # the float64 reference finds no memory
            say(f"{name} {where}: is not measured: {_first_line(error)}")
            continue
        found: dict[str, float] = {}
        for contender, call in calls.items():
            if found and time.monotonic() >= deadline:
                break
            try:
                if agrees(call()):
                    found[contender] = milliseconds(call)
                else:
                    say(f"{name} {where}: {contender} COMPUTES SOMETHING ELSE, and is left out")
                    wrong += 1
            except failures() as error:  # a tile that was not built, a kernel that does not fit, no memory
                say(f"{name} {where}: {contender} does not run: {_first_line(error)}")
        if found:
            found = dict(sorted(found.items(), key=lambda item: item[1]))
            say(f"{name} {where}: " + ", ".join(f"{contender} {ms:.4f} ms" for contender, ms in found.items()))
            rows.append({"arch": architecture, "where": where, **module.row(found)})
    return rows, wrong


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def provenance() -> dict[str, Any]:
    """On what a row was measured, and when."""
    version = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "a rehearsal",
        "torch": torch.__version__,
        "triton": version,
        "library": cuda_library.ABI if cuda_library.load(cuda_library.path())[0] else None,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


@contextlib.contextmanager
def rehearsed() -> Iterator[None]:
    """Until it ends, tuning runs on the CPU: small shapes, Triton's interpreter, in float16, which that computes."""
    global DEVICE, DTYPE
    if not INTERPRETED:
        raise RuntimeError("a rehearsal runs Triton's interpreter: set TRITON_INTERPRET=1 (xclip-fast tune --rehearse)")
    before, table = (DEVICE, DTYPE), dict(shapes.SHAPES)
    DEVICE, DTYPE = "cpu", torch.float16
    shapes.SHAPES.update(dict.fromkeys(table, TINY))
    try:
        yield
    finally:
        DEVICE, DTYPE = before
        shapes.SHAPES.update(table)
