"""For a rehearsal: the launches of the GPU run at their real shapes, checked by Triton's launcher but not executed.

``launches`` runs this file in a process without Triton's interpreter, on the fake GPU of kernels/fake_gpu.py. The
process prints a row of JSON for each part.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from .case import Job, Row


def launches(job: Job) -> Iterator[Row]:
    """The rows of this file, run in another process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gpu.bind"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    job.at("launches")
    yield from map(json.loads, process.stdout)
    if process.wait():
        raise RuntimeError(f"gpu.bind ended with exit code {process.returncode}")


def main() -> None:
    import torch
    from xclip_fast.kernels import backend
    from xclip_fast.kernels.attention import triton as kernel
    from xclip_fast.kernels.fake_gpu import fake_gpu
    from xclip_fast.kernels.triton import launching

    import xclip_fast
    from xclip_fast.config import VARIANTS

    from . import attention, products

    def say(row: Row, count: int) -> None:
        print(json.dumps({"contender": "triton", "direction": "launches", "launches": count, **row}), flush=True)

    job: Any = SimpleNamespace(device="meta", dtype=torch.bfloat16, tiny=False)
    for product in ("fc1", "fc2"):  # the two kinds of epilogue
        with fake_gpu(90) as seen:
            for use, rows in itertools.product(products.TILES, products.ROWS):
                products.forced(use, products.triton_call(product, products.operands(job, product, rows)))()
        say({"op": product, "tiles": len(products.TILES)}, len(seen))
    for tokens in (197,):
        whole = attention.packed(job, 256, tokens, 12)
        with fake_gpu(90) as seen:
            for use in attention.TILES:
                with launching.forced_tile("attention", use):
                    kernel.forward(False, whole)
        say({"op": "attention", "tokens": tokens, "tiles": len(attention.TILES)}, len(seen))
    for variant in ("B/16-8f",):
        config = VARIANTS[variant]
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, layers=1))
        config = dataclasses.replace(config, text=dataclasses.replace(config.text, layers=1))
        model = xclip_fast.XCLIP(config).bfloat16()
        video = torch.zeros(1, 8, 224, 224, 3, dtype=torch.uint8)
        with fake_gpu(90) as seen, backend("triton"):
            with torch.inference_mode():
                model.eval().encode_video(video)
            model.train().encode_video(video).video.sum().backward()
        say({"op": "tower, forward and backward", "variant": variant, "batch": 1}, len(seen))


if __name__ == "__main__":
    main()
