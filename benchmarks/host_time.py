"""Host time of a block: what eager inference costs the CPU before a kernel starts. Needs no GPU, only Triton.

    python benchmarks/host_time.py

Every launch goes through Triton's own path on a GPU that is not there (kernels/fake_gpu.py). What the GPU's driver and
cuBLAS would add is left out: compiled kernels and products return at once. The block is narrow (64 channels), so that
memory costs nothing, and takes the launches of B/16 at 32 videos. Prints the least processor time of many rounds.
"""

import importlib
import os
import time
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
from xclip_fast.kernels import fake_gpu
from xclip_fast.kernels.cct_block import Block, plans
from xclip_fast.kernels.cct_block.example import example

from xclip_fast import kernels

room = importlib.import_module("xclip_fast.kernels.cct_block")
FRAMES, ROWS, WIDTH, VIDEO = 256, 18, 64, 8  # as many rows as LayerNorm is folded from


def arguments(name: str) -> Block:
    """A block between others; with Triton's products the block before it leaves its statistics."""
    block = example(FRAMES, ROWS, WIDTH, VIDEO, dtype=torch.bfloat16)
    if name == "library":
        return block
    mean, rstd = torch.zeros(2, FRAMES * ROWS).unbind(0)
    return block._replace(mean=mean, rstd=rstd, statistics=True)


def product(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    """In place of cuBLAS: memory for the result."""
    return x.new_empty(x.shape[0], weight.shape[0])


def measure(name: str, rounds: int = 300, calls: int = 5) -> tuple[int, float]:
    """Kernels launched by a block with these products, and the microseconds that it takes."""
    block, op = arguments(name), room.cct_block
    with fake_gpu.fake_gpu(90) as launches, kernels.backend(name), plans.swap("attention", "triton"), torch.no_grad():
        op(block)
        launches.clear()
        op(block)
        count, best = len(launches), float("inf")
        run, fake_gpu._Kernel.run = fake_gpu._Kernel.run, lambda *_: None  # type: ignore[method-assign]
        try:
            for _ in range(rounds):
                start = time.process_time_ns()
                for _ in range(calls):
                    op(block)
                best = min(best, (time.process_time_ns() - start) / 1000 / calls)
        finally:
            fake_gpu._Kernel.run = run  # type: ignore[method-assign]
    return count, best


def main() -> None:
    torch.nn.functional.linear = product  # type: ignore[assignment]
    torch.addmm = lambda *args, out: out  # type: ignore[assignment]
    room._on_cpu = lambda block: False  # a GPU's tensors are not asked
    for name in ("triton", "library"):
        launches, microseconds = measure(name)
        print(f"products by {name}: {microseconds:.0f} us, {launches} launches of Triton's kernels")


if __name__ == "__main__":
    main()
