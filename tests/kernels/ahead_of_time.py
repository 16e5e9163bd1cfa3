"""Compile, without a GPU, every kernel that production shapes would launch; run by test_triton_compile.py.

    python tests/kernels/ahead_of_time.py ARCH

runs the launchers of kernels/triton on meta tensors, records what they launch, compiles each distinct kernel for the
architecture, and prints one JSON object a kernel: name, configuration, registers, stack, shared memory, instructions.
Not in the interpreter: TRITON_INTERPRET must be unset.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xclip_fast.kernels.triton import _launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
EPS = 1e-5


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return meta(width, dtype=dtype), meta(width, dtype=dtype)


def linear(out: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return meta(out, width, dtype=dtype), meta(out, dtype=dtype)


def cases(
    dtype: torch.dtype, width: int, heads: int, length: int, patch: int, batch: int
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(op, arguments) of one block and its surroundings: B videos of 8 frames of L tokens."""
    frames, size = 8 * batch, patch * int((length - 1) ** 0.5)
    x = meta(frames, length, width, dtype=dtype)
    hidden = meta(frames, length, 4 * width, dtype=dtype)
    drop = meta(batch, dtype=torch.float32)
    packed = linear(3 * width, width, dtype)
    yield "quick_gelu", (hidden,)
    yield "layer_norm", (x, *norm(width, dtype), EPS)
    yield "ln_linear", (x, *norm(width, dtype), *packed, EPS, False)
    yield "ln_linear", (x, *norm(width, dtype), *linear(4 * width, width, dtype), EPS, True)
    yield "ln_linear", (x[:, 0], *norm(width, dtype), meta(width, 512, dtype=dtype).T, None, EPS, False)
    yield "linear_residual", (x, *linear(width, width, dtype), x, None, EPS, False)
    yield "linear_residual", (x, *linear(width, width, dtype), x, drop, EPS, True)
    yield "mlp", (x, *norm(width, dtype), *linear(4 * width, width, dtype), *linear(width, 4 * width, dtype), EPS, drop)
    yield (
        "diffusion_attention",
        (meta(frames, length, 3, heads, 64, dtype=dtype), meta(frames, 2, heads, 64, dtype=dtype)),
    )
    message = (*linear(width, width, dtype), *norm(width, dtype), *packed, *linear(width, width, dtype))
    kv = (*norm(width, dtype), *linear(2 * width, width, dtype))
    yield "message_kv", (x[:, 0], 8, *message, *kv, heads, EPS, None)
    for pixels in (
        meta(frames, size, size, 3, dtype=torch.uint8),
        meta(frames, 3, size, size, dtype=dtype),
    ):
        embedding = (meta(width, 3, patch, patch, dtype=dtype), meta(width, dtype=dtype))
        position = meta(length, width, dtype=dtype)
        yield "patch_embed", (pixels, *embedding, position, *norm(width, dtype), [0.5] * 3, [0.2] * 3, EPS)
    embed = 512 if width == 768 else 768
    yield "cosine_logits", (meta(batch, embed, dtype=dtype), meta(batch, 400, embed, dtype=dtype), meta(dtype=dtype))
    offsets = meta(401, dtype=torch.int64)
    for longest in (12, 77):
        yield "causal_attention_packed", (meta(2400, 3, embed // 64, 64, dtype=dtype), offsets, longest)


SHAPES = {  # width, heads, tokens of a frame, patch
    "B/32": (768, 12, 50, 32),
    "B/16": (768, 12, 197, 16),
    "L/14": (1024, 16, 257, 14),
    "L/14@336": (1024, 16, 577, 14),
}


def launches(arch: int) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Every distinct kernel with its arguments and options, by a readable key."""
    recorded: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
    where = ""

    def record(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        signature, constants, _ = specialise(kernel, args, options)
        rest = {name: value for name, value in options.items() if name not in kernel.arg_names}
        key = f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__} {signature} {constants} {rest}"
        recorded.setdefault(key, (kernel, args, {**options, "where": where}))

    replacements: dict[str, Callable[..., Any]] = {
        "launch": record,
        "arch": lambda device: arch,
        "processors": lambda device: 132,
        "tile": lambda op, device, **sizes: _launch._tile(op, arch, tuple(sorted(sizes.items()))),
    }
    plan = [(torch.bfloat16, shape, batch) for shape in SHAPES for batch in (1, 32)]
    plan += [(torch.float16, "B/16", 32), (torch.float32, "B/16", 32)]
    for dtype, shape, batch in plan:
        for op, args in cases(dtype, *SHAPES[shape], batch):
            if dtype == torch.float16 and op not in ("mlp", "diffusion_attention"):
                continue  # the same code and tiles as bfloat16
            if op == "causal_attention_packed" and args[2] > 64 and (arch < 90 or dtype == torch.float32):
                continue  # the op refuses it
            where = f"{op} {shape} {dtype} B={batch}"
            module = importlib.import_module(f"xclip_fast.kernels.triton.{op}")
            for name, loaded in list(sys.modules.items()):
                if name.startswith("xclip_fast.kernels.triton."):
                    for attribute, replacement in replacements.items():
                        if hasattr(loaded, attribute):
                            setattr(loaded, attribute, replacement)
            no_gradient = {"linear_residual": 4, "mlp": 8, "message_kv": 16}.get(op)  # the drop path factors
            needs = [
                isinstance(arg, Tensor) and arg.dtype.is_floating_point and index != no_gradient
                for index, arg in enumerate(args)
            ]
            module.forward(False, *args)
            outputs, saved = module.forward(True, *args)
            module.backward([torch.empty_like(out) for out in outputs], saved, needs, *args)
    return recorded


def specialise(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes of a launch, as the runtime specialises it for aligned pointers."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | {
        name: value for name, value in options.items() if name in kernel.arg_names
    }
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(index,)] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return signature, constants, attributes


def compile_ahead(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: int) -> dict[str, Any]:
    """What the compiler makes of a launch: registers, stack and local bytes, shared bytes, tensor instructions."""
    signature, constants, attributes = specialise(kernel, args, options)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    rest = {name: value for name, value in options.items() if name not in (*kernel.arg_names, "where")}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=rest)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    ptx = compiled.asm["ptx"]
    return {
        "kernel": f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__}",
        "where": options["where"],
        "constants": {kernel.arg_names[index]: str(value) for (index,), value in constants.items()},
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]),
        "local": int(found["LOCAL"]),
        "shared": compiled.metadata.shared,
        "dot": "tt.dot" in compiled.asm["ttir"],
        "half": any(kind in ("*bf16", "*fp16") for kind in signature.values()),
        "wgmma": "wgmma" in ptx,
        "tma": "cp.async.bulk.tensor" in ptx,
    }


def main() -> None:
    arch = int(sys.argv[1])
    for launched in launches(arch).values():
        print(json.dumps(compile_ahead(*launched, arch)), flush=True)


if __name__ == "__main__":
    main()
