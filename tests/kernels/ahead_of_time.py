"""Compile, without a GPU, every kernel that production shapes would launch; run by test_triton_compile.py.

    python tests/kernels/ahead_of_time.py ARCH [--all]

runs the launchers of every op on meta tensors, on a GPU that is not there (fake_gpu.py), compiles each distinct
kernel for the architecture, and prints one JSON object a kernel: name, configuration, registers, stack, shared memory,
instructions. Without ``--all`` a kernel is left out that another one contains (``heaviest``). Not in the interpreter:
TRITON_INTERPRET must be unset.
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
from torch import Tensor
from triton.backends.compiler import GPUTarget
from xclip_fast.kernels.cct_block import fused
from xclip_fast.kernels.cct_block.example import example
from xclip_fast.kernels.common.block import LOWERED
from xclip_fast.kernels.fake_gpu import Launch, fake_gpu

from xclip_fast import kernels

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

    frames, size = 8 * batch, patch * int((length - 1) ** 0.5)
    x = meta(frames, length, width, dtype=wide)
    hidden = meta(frames, length, 4 * width, dtype=dtype)
    yield "quick_gelu", (hidden,)
    yield "layer_norm", (x[:, 1:], *norm(width, wide), EPS)  # the patches
    for drops in (False, True):
        yield "cct_block", block(example(frames, length + 1, width, 8, drops=drops, device="meta", dtype=wide), dtype)
    for pixels in (
        meta(frames, size, size, 3, dtype=torch.uint8),
        meta(frames, 3, size, size, dtype=wide),
    ):
        embedding = (meta(width, 3, patch, patch, dtype=dtype), meta(width, dtype=wide))
        position = meta(length, width, dtype=wide)
        yield "patch_embed", (pixels, *embedding, position, *norm(width, wide), [0.5] * 3, [0.2] * 3, EPS, True)
    embed = 512 if width == 768 else 768
    yield "cosine_logits", (meta(batch, embed, dtype=wide), meta(batch, 400, embed, dtype=wide), meta(dtype=wide))
    for longest in (12, 77):
        text = example(0, 0, embed, labels=[longest] * 40, device="meta", dtype=wide)
        yield "cct_block", block(text, dtype)


def block(given: kernels.Block, dtype: torch.dtype) -> tuple[Any, ...]:
    """A block's arguments with the weights of products in this dtype."""
    return tuple(
        given._replace(**{name: getattr(given, name).to(dtype) for name in LOWERED if getattr(given, name) is not None})
    )


def refused(op: str, args: tuple[Any, ...], arch: int) -> bool:
    """Whether these are labels that do not fit in a tile."""
    if op != "cct_block" or not kernels.Block(*args).longest:
        return False
    return kernels.Block(*args).longest > (
        32 if kernels.Block(*args).in_weight.dtype == torch.float32 else 64 if arch < 90 else 128
    )


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


class BehindABlock(torch.autograd.Function):
    """x as the output of a block, which gets a copy and sums with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.chosen = kernels.dispatch.OPS["cct_block"].backends[0]
        return x.view_as(x)


def run(op: str, args: tuple[Any, ...]) -> None:
    """Forward without gradients, forward with them, backward: every gradient but that of drop path factors."""
    if op == "cct_block":
        args = BehindABlock.apply(args[0].requires_grad_()), *args[1:]
        needs = [
            arg.dtype if isinstance(arg, Tensor) and arg.is_floating_point() and not name.startswith("drop") else None
            for name, arg in zip(kernels.Block._fields, args, strict=True)
        ]
        for backend in ("triton", "library"):  # both ways to compute products
            with kernels.backend(backend):
                fused.forward(False, *args)
                outputs, saved = fused.forward(True, *args)
                fused.backward([torch.empty_like(outputs[0])], saved, needs, *args)
        return
    module = importlib.import_module(f"xclip_fast.kernels.{op}.triton")
    needs = [arg.dtype if isinstance(arg, Tensor) and arg.dtype.is_floating_point else None for arg in args]
    module.forward(False, *args)
    outputs, saved = module.forward(True, *args)
    module.backward([torch.empty_like(out) for out in outputs], saved, needs, *args)


def launches(arch: int) -> dict[str, Launch]:
    """Every distinct kernel that the plan launches, one launch of each, by the case that it was first met in."""
    distinct: dict[int, tuple[str, Launch]] = {}
    with fake_gpu(arch) as recorded:
        for dtype, stream, shape, batch in PLAN:
            if stream is not None and arch != 90:
                continue
            for op, args in cases(dtype, *SHAPES[shape], batch, stream):
                if dtype == torch.float16 and op != "cct_block":
                    continue  # the same code and tiles as bfloat16
                if refused(op, args, arch):
                    continue
                before = len(recorded)
                run(op, args)
                where = f"{op} {shape} {dtype} in {stream or dtype} B={batch}"
                for launch in recorded[before:]:
                    distinct.setdefault(id(launch.source), (f"{len(distinct)} {where}", launch))
    return dict(distinct.values())


def heaviest(found: dict[str, Launch]) -> dict[str, Launch]:
    """The kernels that no other contains: one with the same tile and types, and with more of the optional arguments,
    each of which adds code. float16 counts as bfloat16, whose code differs in quick_gelu alone. Compiling them takes
    half the time of compiling all, but one that is left out may still use more registers than one that is kept:
    ``--all`` compiles every kernel."""

    def tensors(launch: Launch) -> set[tuple[str, str]]:
        kinds = launch.source.signature.items()
        return {(name, kind.replace("fp16", "bf16")) for name, kind in kinds if kind.startswith("*")}

    kinds: dict[Any, list[tuple[str, Launch]]] = {}
    for where, launch in found.items():
        names = launch.source.fn.arg_names
        constants = {names[index]: value for (index,), value in launch.source.constants.items()}
        plain = {name: value for name, value in constants.items() if not name.endswith("_ptr")}
        kinds.setdefault((launch.kernel, str(plain), str(launch.options)), []).append((where, launch))
    kept = {}
    for alike in kinds.values():
        for index, (where, launch) in enumerate(alike):
            mine = tensors(launch)
            others = [tensors(other) for _, other in alike]
            if not any(mine < other or (mine == other and at < index) for at, other in enumerate(others)):
                kept[where] = launch
    return kept


def compile_ahead(where: str, launch: Launch, arch: int) -> dict[str, Any]:
    """What the compiler makes of a launch: registers, stack and local bytes, shared bytes, tensor instructions."""
    source = launch.source
    with fake_gpu(arch):  # kernels ask for the architecture
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
    found = launches(arch)
    for where, launch in (found if "--all" in sys.argv else heaviest(found)).items():
        print(json.dumps(compile_ahead(where, launch, arch)), flush=True)


if __name__ == "__main__":
    main()
