"""What every launcher needs: the launch itself, the architecture, the tile table, tile arithmetic.

``assumed_gpu`` lets the tests run the launchers without a GPU, on CPU or meta tensors of production shapes.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from ..dispatch import INTERPRETED, tables

TABLE = Path(__file__).with_name("tiles.json")
Made = TypeVar("Made")


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. ``triton.cdiv`` does the same in 1.4 us a call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on the device of its tensors, from any thread. An empty grid is no launch."""
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    # Triton keeps the allocator in a ContextVar: what one thread sets is missing in autograd's and a server's threads
    triton.set_allocator(_descriptor_memory(device))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
    else:
        with torch.cuda.device(device):  # Triton launches on the current device
            kernel[grid](*args, **options)


class Prepared:
    """``launch`` of which only the tensors are missing: device, kernel, grid, numbers and choices at compile time.

    The kernel's parameters are its tensors, then ``numbers``, then ``options``. Triton works out in every launch which
    compiled kernel the arguments want. Here it is kept for the dtypes of the tensors, if all are in whole 16 bytes, and
    later calls run it. Everything else goes through Triton: another alignment, another current device, a hook or a knob
    that is set, a version of Triton whose compiled kernels are not known to be run like this.
    """

    def __init__(
        self,
        device: torch.device,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[int | float | None, ...],
        **options: Any,
    ) -> None:
        self.kernel, self.grid, self.numbers, self.options = kernel, grid, numbers, options
        self.allocator, self.index = _descriptor_memory(device), device.index if device.type == "cuda" else None
        self.compiled: dict[tuple[torch.dtype | None, ...], Any] = {}
        self.direct = DIRECT and isinstance(kernel, triton.JITFunction) and 0 not in grid
        self.whole_grid = (*grid, 1, 1)[:3]
        self.rest = (*numbers, *(options[name] for name in kernel.arg_names if name in options))

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch with these tensors. An empty grid is no launch."""
        if self.direct and not _observed(self.kernel):
            dtypes: list[torch.dtype | None] = []
            addresses = 0
            for tensor in tensors:
                if tensor is None:
                    dtypes.append(None)
                else:
                    dtypes.append(tensor.dtype)
                    addresses |= tensor.data_ptr()
            driver, key = triton.runtime.driver.active, tuple(dtypes)
            device = driver.get_current_device()
            if not addresses % 16 and (self.index is None or self.index == device):
                compiled = self.compiled.get(key)
                if compiled is None or compiled.metadata.global_scratch_size:  # of tensor descriptors
                    triton.set_allocator(self.allocator)
                if compiled is None:
                    self.compiled[key] = self.kernel[self.grid](*tensors, *self.numbers, **self.options)
                    return
                # no metadata and no hooks: only hooks read the metadata
                launched = driver.get_current_stream(device), compiled.function, compiled.packed_metadata
                compiled.run(*self.whole_grid, *launched, None, None, None, *tensors, *self.rest)
                return
        launch(self.kernel, self.grid, *tensors, *self.numbers, **self.options)


# the versions of Triton whose compiled kernels are run as above
DIRECT = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)


def _observed(kernel: Any) -> Any:
    """Whether somebody has set a hook of Triton's or a knob that a launch depends on."""
    knobs = triton.knobs
    runtime = knobs.runtime
    hooks = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or kernel.pre_run_hooks
    return hooks or runtime.__dict__ or knobs.compilation.__dict__


_prepared: list[Any] = []


def prepared(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keeps the last 4,096 results of a function of sizes and a device that makes a ``Prepared``."""
    cached = functools.lru_cache(4096, typed=True)(make)
    _prepared.append(cached)
    tables.kept.append(cached)
    return cached


def _forget_prepared() -> None:
    for cached in _prepared:
        cached.cache_clear()


@functools.cache
def _descriptor_memory(device: torch.device) -> Callable[[int, int, int | None], Tensor]:
    """The allocator of the memory that a kernel's tensor descriptors take, on this device."""
    return lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)


_assumed: tuple[int, int] | None = None


@contextlib.contextmanager
def assumed_gpu(architecture: int, sms: int) -> Iterator[None]:
    """Choose tiles and grids as for a GPU of this architecture and number of multiprocessors, whatever the device."""
    global _assumed
    before, _assumed = _assumed, (architecture, sms)
    _forget_prepared()
    try:
        yield
    finally:
        _assumed = before
        _forget_prepared()


def arch(device: torch.device) -> int:
    """The compute capability as one number: 80, 90, 100. The interpreter counts as 80."""
    return (_assumed or _gpu(device))[0]


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 2 in the interpreter, so that a persistent loop turns more than once."""
    return (_assumed or _gpu(device))[1]


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    if INTERPRETED or device.type != "cuda":
        return 80, 2
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def tile(op: str, device: torch.device, **sizes: int) -> dict[str, Any]:
    """The tile of ``op`` for these sizes on this device: the first row of the user's table, then of the shipped one,
    whose bounds hold; of those for the device's architecture or one below it, the newest first.

    Raises:
        LookupError: if the tables have no row; the shipped table has one for every size.
    """
    if op in _forced_tiles:
        return _forced_tiles[op]
    architecture = arch(device)
    row = tables.first(TABLE, op, range(architecture + 1), tuple(sizes.items()))
    if row is None:
        raise LookupError(f"no tile for {op} on architecture {architecture} with {sizes} in {TABLE}")
    use: dict[str, Any] = row["use"]
    return use


_forced_tiles: dict[str, dict[str, Any]] = {}


@contextlib.contextmanager
def forced_tile(op: str, use: dict[str, Any]) -> Iterator[None]:
    """Take this tile for ``op`` inside the block, whatever the tables say: for tuning and tests."""
    _forced_tiles[op] = use
    _forget_prepared()
    try:
        yield
    finally:
        del _forced_tiles[op]
        _forget_prepared()
