"""Host time of eager inference: what a block, its module and a whole tower cost the CPU. Needs no GPU, only Triton.

    python benchmarks/host_time.py

Every launch goes through Triton's own path on a GPU that is not there (kernels/fake_gpu.py). What the GPU's driver and
cuBLAS would add is left out: compiled kernels and products return at once. All is narrow (64 channels), so that memory
costs nothing. A block takes the launches of B/16 at 32 videos; the tower has 12 of them and gets one video. Prints the
least processor time of many rounds.
"""

import importlib
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import arguments
import torch
from xclip_fast.kernels import fake_gpu
from xclip_fast.kernels.cct_block import plans
from xclip_fast.kernels.cct_block.example import example

from xclip_fast import XCLIP, FastCCTBlock, VisionConfig, XCLIPConfig, kernels
from xclip_fast.nn.cct import Stream

FRAMES, ROWS, WIDTH, VIDEO = 256, 18, 64, 8  # as many rows as LayerNorm is folded from


def calls(name: str) -> dict[str, Callable[[], Any]]:
    """A block between others (with Triton's products the one before it leaves its statistics), its module, a tower."""
    block = example(FRAMES, ROWS, WIDTH, VIDEO, dtype=torch.bfloat16)
    known = tuple(torch.zeros(2, FRAMES * ROWS).unbind(0)) if name == "triton" else None
    mean, rstd = known or (None, None)
    block = block._replace(mean=mean, rstd=rstd, statistics=True)
    module = FastCCTBlock(WIDTH, WIDTH // 64, VIDEO, batch_first=True).bfloat16().eval()
    stream = Stream(block.x, True, known)
    vision = VisionConfig(image_size=32, width=WIDTH, heads=WIDTH // 64)
    model = XCLIP(XCLIPConfig(vision=vision, num_frames=VIDEO)).bfloat16().eval()
    video = torch.zeros(1, VIDEO, 32, 32, 3, dtype=torch.uint8)
    return {
        "block": lambda: kernels.cct_block(block),
        "module of a block": lambda: module(stream, VIDEO),
        "encode_video": lambda: model.encode_video(video),
    }


def product(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    """In place of cuBLAS: memory for the result."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def measure(call: Callable[[], Any], launches: list[Any], rounds: int = 300) -> tuple[int, float]:
    """Kernels that a call launches, and the microseconds that it takes."""
    call()
    launches.clear()
    call()
    count, best = len(launches), float("inf")
    run, fake_gpu._Kernel.run = fake_gpu._Kernel.run, lambda *_: None  # type: ignore[method-assign]
    try:
        for _ in range(rounds):
            start = time.process_time_ns()
            for _ in range(5):
                call()
            best = min(best, (time.process_time_ns() - start) / 5000)
    finally:
        fake_gpu._Kernel.run = run  # type: ignore[method-assign]
    return count, best


def main() -> None:
    arguments.parser(__doc__).parse_args()
    torch.nn.functional.linear = product  # type: ignore[assignment]
    torch.addmm = lambda *args, out: out  # type: ignore[assignment]
    # a GPU's tensors are not asked
    importlib.import_module("xclip_fast.kernels.cct_block")._on_cpu = kernels.cpu.takes = lambda *_: False
    for name in ("triton", "library"):
        # the library's are what a GPU chooses for which nothing was measured
        forced = kernels.backend("auto" if name == "library" else name)
        with fake_gpu.fake_gpu(90, chooses=True) as made, forced, plans.swap("attention", "triton"), torch.no_grad():
            for what, call in calls(name).items():
                launches, microseconds = measure(call, made)
                print(f"products by {name}, {what}: {microseconds:.0f} us, {launches} launches of Triton's kernels")


if __name__ == "__main__":
    main()
