"""A GPU that is not there: Triton's own launch path binds every call, and nothing runs.

    with fake_gpu(90) as launches, kernels.backend("triton"):
        block(x).sum().backward()  # x on the CPU or on meta
    print(len(launches), launches[0].kernel, launches[0].grid)

Inside the block ``kernel[grid](...)`` goes through Triton's binder and specialization, its front end (the kernel's
source becomes Triton IR for the architecture, once for each specialization), its allocator and a driver that checks the
arguments and records the launch. Outputs are uninitialized memory. Meta tensors make production shapes free. The
process must run without Triton's interpreter: TRITON_INTERPRET unset.
"""

import contextlib
import dataclasses
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import _allocation

from . import dispatch
from .triton import launching

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
GRID_LIMITS = (2**31 - 1, 65535, 65535)
DESCRIPTOR_BYTES = 128
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the name of its function, as ``"gemm_kernel"``.
        grid: programs along each axis.
        arguments: every argument by name; tensors as meta tensors of their shape, strides and dtype.
        options: what the compiler got: num_warps, num_stages and the rest.
        source: what Triton compiles, for ``triton.compile``. The same object for the same specialization.
        descriptors: how many tensor descriptors the kernel makes, and so how much memory it asks its allocator for.
        thread: the name of the thread that launched it.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]
    source: Any
    descriptors: int
    thread: str


@contextlib.contextmanager
def fake_gpu(architecture: int = 90, sms: int = 132, *, chooses: bool = False) -> Iterator[list[Launch]]:
    """Record what the kernels launch inside the block, in order, from any thread.

    Args:
        architecture: compute capability, 90 for 9.0.
        sms: streaming multiprocessors.
        chooses: backends are chosen as on such a GPU, where nothing was measured. By default kernels take tensors
            that are on no GPU only if they are asked for.

    Raises:
        RuntimeError: if this process runs Triton's interpreter.
        AssertionError, at the launch: if an argument does not fit the kernel's signature, a tensor is on another device
            than the rest, or a grid is too large.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("fake_gpu needs Triton's real launcher: unset TRITON_INTERPRET before the process starts")
    launches: list[Launch] = []
    config = triton.runtime.driver
    before = config._active
    compiler, off_gpu = triton.compiler.compile, dispatch.off_gpu
    config.set_active(_Driver(architecture, launches))
    triton.compiler.compile = _compile
    dispatch.off_gpu = architecture if chooses else 1
    try:
        with launching.assumed_gpu(architecture, sms):
            yield launches
    finally:
        config._active, triton.compiler.compile, dispatch.off_gpu = before, compiler, off_gpu


class _Driver:
    """What Triton's launch path asks of a driver."""

    def __init__(self, architecture: int, launches: list[Launch]) -> None:
        self.architecture, self.launches = architecture, launches

    def get_current_device(self) -> int:
        return 1000 + self.architecture  # Triton keeps compiled kernels by device: these must not be taken elsewhere

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


def _compile(source: Any, target: GPUTarget, options: dict[str, Any], **_: Any) -> "_Kernel":
    """In place of ``triton.compile``: the front end alone."""
    backend = make_backend(target)
    parsed = backend.parse_options(options)
    with _lock:
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        stages = backend.get_codegen_implementation(parsed), backend.get_module_map()
        text = str(source.make_ir(target, parsed, *stages, context))
    return _Kernel(source, dict(options), text.count("tt.make_tensor_descriptor"))


class _Kernel:
    """In place of Triton's compiled kernel."""

    function = packed_metadata = None

    def __init__(self, source: Any, options: dict[str, Any], descriptors: int) -> None:
        self.source, self.options, self.descriptors = source, options, descriptors
        self.name = source.fn.__name__
        self.metadata = types.SimpleNamespace(global_scratch_size=descriptors * DESCRIPTOR_BYTES)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        arguments = dict(zip(self.source.fn.arg_names, rest[5:], strict=True))
        grid = (x, y, z)
        assert all(1 <= size <= limit for size, limit in zip(grid, GRID_LIMITS, strict=True)), (self.name, grid)
        devices = {value.device for value in arguments.values() if isinstance(value, Tensor)}
        assert len(devices) == 1, f"{self.name}: tensors on {devices}"
        for name, kind in self.source.signature.items():
            _check(f"{self.name}: {name}", kind, arguments[name])
        if self.descriptors:
            size = x * y * z * self.descriptors * DESCRIPTOR_BYTES
            memory = _allocation._allocator.get()(size, DESCRIPTOR_BYTES, stream)
            assert memory.nbytes == size, self.name
            assert memory.device in devices, f"{self.name}: descriptor memory on {memory.device}, tensors on {devices}"
        plain = {
            name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            if isinstance(value, Tensor)
            else value
            for name, value in arguments.items()
        }
        thread = threading.current_thread().name
        launches = triton.runtime.driver.active.launches
        launches.append(Launch(self.name, grid, plain, self.options, self.source, self.descriptors, thread))


def _check(what: str, kind: str, value: Any) -> None:
    """Raise AssertionError unless a value is what the compiled kernel takes in this place."""
    if kind == "constexpr":
        return
    if kind.startswith("*"):
        assert isinstance(value, Tensor), f"{what} is {value!r}, a pointer is wanted"
        assert kind == "*" + TYPES[value.dtype], f"{what} of {value.dtype} for {kind}"
    elif kind.startswith("fp"):
        assert isinstance(value, float), f"{what} is {value!r}, {kind} is wanted"
    else:
        bits = int(kind[1:])
        low, high = (0, 2**bits) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
        assert isinstance(value, int), f"{what} is {value!r}, {kind} is wanted"
        assert low <= value < high, f"{what} = {value} is beyond {kind}"
