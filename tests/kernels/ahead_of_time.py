"""Compile, without a GPU, every kernel that production shapes would launch; run by test_triton_compile.py.

    python tests/kernels/ahead_of_time.py ARCH

runs the launchers of kernels/triton on meta tensors, on a GPU that is not there (fake_gpu.py), compiles each distinct
kernel for the architecture, and prints one JSON object a kernel: name, configuration, registers, stack, shared memory,
instructions. Not in the interpreter: TRITON_INTERPRET must be unset.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from fake_gpu import Launch, fake_gpu
from torch import Tensor
from triton.backends.compiler import GPUTarget

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
EPS = 1e-5


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return meta(width, dtype=dtype), meta(width, dtype=dtype)


def cases(
    dtype: torch.dtype, width: int, heads: int, length: int, patch: int, batch: int, stream: torch.dtype | None = None
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(op, arguments) of one block and its surroundings: B videos of 8 frames of L tokens.

    ``dtype`` is that of weights and products; ``stream`` that of the residual stream, norms and biases, as autocast
    leaves them in float32.
    """
    wide = stream or dtype

    def linear(out: int, width: int) -> tuple[Tensor, Tensor]:
        return meta(out, width, dtype=dtype), meta(out, dtype=wide)

    frames, size = 8 * batch, patch * int((length - 1) ** 0.5)
    x = meta(frames, length, width, dtype=wide)
    narrow = meta(frames, length, width, dtype=dtype)
    hidden = meta(frames, length, 4 * width, dtype=dtype)
    drop = meta(batch, dtype=torch.float32)
    packed = linear(3 * width, width)
    yield "quick_gelu", (hidden,)
    yield "layer_norm", (x, *norm(width, wide), EPS)
    yield "ln_linear", (x, *norm(width, wide), *packed, EPS, False)
    yield "ln_linear", (x, *norm(width, wide), *linear(4 * width, width), EPS, True)
    yield "ln_linear", (x[:, 0], *norm(width, wide), meta(width, 512, dtype=dtype).T, None, EPS, False)
    yield "linear_residual", (narrow, *linear(width, width), x, None, EPS, False)
    yield "linear_residual", (narrow, *linear(width, width), x, drop, EPS, True)
    yield "mlp", (x, *norm(width, wide), *linear(4 * width, width), *linear(width, 4 * width), EPS, drop)
    yield (
        "diffusion_attention",
        (meta(frames, length, 3, heads, 64, dtype=dtype), meta(frames, 2, heads, 64, dtype=dtype)),
    )
    message = (*linear(width, width), *norm(width, wide), *packed, *linear(width, width))
    kv = (*norm(width, wide), *linear(2 * width, width))
    yield "message_kv", (x[:, 0], 8, *message, *kv, heads, EPS, None)
    for pixels in (
        meta(frames, size, size, 3, dtype=torch.uint8),
        meta(frames, 3, size, size, dtype=wide),
    ):
        embedding = (meta(width, 3, patch, patch, dtype=dtype), meta(width, dtype=wide))
        position = meta(length, width, dtype=wide)
        yield "patch_embed", (pixels, *embedding, position, *norm(width, wide), [0.5] * 3, [0.2] * 3, EPS)
    embed = 512 if width == 768 else 768
    yield "cosine_logits", (meta(batch, embed, dtype=wide), meta(batch, 400, embed, dtype=wide), meta(dtype=wide))
    offsets = meta(401, dtype=torch.int64)
    for longest in (12, 77):
        yield "causal_attention_packed", (meta(2400, 3, embed // 64, 64, dtype=dtype), offsets, longest)


SHAPES = {  # width, heads, tokens of a frame, patch
    "B/32": (768, 12, 50, 32),
    "B/16": (768, 12, 197, 16),
    "L/14": (1024, 16, 257, 14),
    "L/14@336": (1024, 16, 577, 14),
}


BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
PLAN = [
    *[(BFLOAT16, None, shape, batch) for shape in SHAPES for batch in (1, 32)],
    (FLOAT16, None, "B/16", 32),
    (FLOAT32, None, "B/16", 32),
    (BFLOAT16, FLOAT32, "B/16", 1),  # autocast
    (BFLOAT16, FLOAT32, "L/14", 32),
]


def run(op: str, args: tuple[Any, ...]) -> None:
    """Forward without gradients, forward with them, backward: every gradient but that of drop path factors."""
    module = importlib.import_module(f"xclip_fast.kernels.triton.{op}")
    no_gradient = {"linear_residual": 4, "mlp": 8, "message_kv": 16}.get(op)
    needs = [
        isinstance(arg, Tensor) and arg.dtype.is_floating_point and index != no_gradient
        for index, arg in enumerate(args)
    ]
    module.forward(False, *args)
    outputs, saved = module.forward(True, *args)
    module.backward([torch.empty_like(out) for out in outputs], saved, needs, *args)


def launches(arch: int) -> dict[str, Launch]:
    """Every distinct kernel that the plan launches, one launch of each, by the case that it was first met in."""
    distinct: dict[int, tuple[str, Launch]] = {}
    with fake_gpu(arch) as recorded:
        for dtype, stream, shape, batch in PLAN:
            for op, args in cases(dtype, *SHAPES[shape], batch, stream):
                if dtype == torch.float16 and op not in ("mlp", "diffusion_attention"):
                    continue  # the same code and tiles as bfloat16
                if op == "causal_attention_packed" and args[2] > 64 and (arch < 90 or dtype == torch.float32):
                    continue  # the op refuses it
                before = len(recorded)
                run(op, args)
                where = f"{op} {shape} {dtype} in {stream or dtype} B={batch}"
                for launch in recorded[before:]:
                    distinct.setdefault(id(launch.source), (f"{len(distinct)} {where}", launch))
    return dict(distinct.values())


def compile_ahead(where: str, launch: Launch, arch: int) -> dict[str, Any]:
    """What the compiler makes of a launch: registers, stack and local bytes, shared bytes, tensor instructions."""
    source = launch.source
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    ptx = compiled.asm["ptx"]
    return {
        "kernel": launch.kernel,
        "where": where,
        "constants": {source.fn.arg_names[index]: str(value) for (index,), value in source.constants.items()},
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "local": int(found["LOCAL"]),
        "shared": compiled.metadata.shared,
        "dot": "tt.dot" in compiled.asm["ttir"],
        "half": any(kind in ("*bf16", "*fp16") for kind in source.signature.values()),
        "wgmma": "wgmma" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
    }


def main() -> None:
    arch = int(sys.argv[1])
    for where, launch in launches(arch).items():
        print(json.dumps(compile_ahead(where, launch, arch)), flush=True)


if __name__ == "__main__":
    main()
