"""Measuring which kernels are the fastest on this GPU: ``xclip-fast tune``, and long jobs before they begin."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from ..console import Bar

if TYPE_CHECKING:
    import torch

    from ..config import XCLIPConfig

SECONDS = 60.0
# Milliseconds a video that measuring can save, in inference and in training. Computed, not measured: how much faster
# Triton's products are than the choice before anything is measured, by ``xclip-fast flops --time --gpu h100`` at 32
# videos. Attention and tiles may save more, and the next job gains too. On an H200, whose table is shipped, the table
# saves 0.10 ms of B/16's inference by the CUDA library's products (18.6 against 15.3 ms of kernels for 32 videos).
SAVED = {"B/32": (0.031, 0.079), "B/16": (0.13, 0.32), "L/14": (0.46, 1.1), "L/14@336": (2.1, 5.0)}


def tune(model: str, seconds: float = SECONDS, *, rehearse: bool = False) -> int:
    """Measure the tiles of the Triton kernels, then the backends; the winners go to ~/.cache/xclip_fast.

    Args:
        model: whose shapes: "B/32", "B/16", "L/14" or "L/14@336".
        seconds: nothing is begun after that long.
        rehearse: run everything on the CPU with small shapes, and write nothing.

    Returns:
        0, or 1 if something went wrong; standard error says what.
    """
    from ..kernels.tune.__main__ import main

    arguments = ["--model", model, "--seconds", str(seconds / 2), *(["--rehearse"] if rehearse else [])]
    for more in ([], ["--backends"]):
        with Bar(name="tables") as bar:
            if main([*arguments, *more], bar.update):
                return 1
    return 0


def tune_before(config: XCLIPConfig, videos: int, device: str | torch.device, *, training: bool = False) -> None:
    """Tune for a job that earns the time back, if nothing was measured on its GPU yet. A short job prints one line.

    One of several processes does not measure, because the others would disturb it: it prints the line as well.

    Args:
        videos: that go through the model, each as often as it does.
        training: with gradients.
    """
    import torch

    from ..kernels.dispatch import choices
    from ..kernels.tune.shapes import SHAPES

    sizes = tuple(getattr(config.vision, name, None) for name in ("width", "patch_size", "image_size"))
    model = next((name for name, each in SHAPES.items() if (each.width, each.patch, each.image) == sizes), None)
    architecture = choices.architecture(torch.device(device))
    if model is None or architecture is None or choices.measured_on(architecture):
        return
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if videos * SAVED[model][training] / 1000 < SECONDS or not alone:
        told = f"no kernel was measured on this GPU: `xclip-fast tune --model {model}` takes a minute, once"
        print(told, file=sys.stderr)
        return
    print(f"measuring which kernels are the fastest on this GPU, once, for up to {SECONDS:.0f} s", file=sys.stderr)
    with contextlib.redirect_stdout(sys.stderr):
        tune(model)
