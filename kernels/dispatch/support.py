"""A backend: one implementation of an op, or of a part of a block, and what it supports as data.

One loop asks the backends in order of preference and keeps the reason of every refusal.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .. import triton

HALF = (torch.bfloat16, torch.float16)
ON_TRITON = (*HALF, torch.float32)
FLOATS = (*ON_TRITON, torch.float64)
UNMEASURED = (
    "not measured on this GPU, so taken only if asked for (XCLIP_FAST_BACKEND or backend(...)); "
    "xclip-fast tune measures"
)


class Call(NamedTuple):
    """What every backend asks of a call, whatever it computes."""

    device: torch.device
    dtypes: Sequence[torch.dtype]  # of its floating tensors
    training: bool = False
    interpreted: int = 0  # Triton's kernels take tensors that are on no GPU (see dispatch.off_gpu)


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation and what it supports.

    Of an op, plain torch: ``forward(*args)`` returns what the reference returns. Of an op, a kernel, which has
    ``backward``: ``forward(save, *args)`` returns the outputs as a tuple and, if ``save``, the tensors that
    ``backward`` wants beside the arguments; ``backward(grads, saved, needs, *args)`` returns a gradient for every
    argument that needs one, in order. ``needs`` holds the dtype wanted of each, or None: that of a weight that autocast
    lowered is wider than the argument. Of a part of a block: what the functions take is said where the part is defined.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    device_types: tuple[str, ...] = ()  # empty: any
    capability: int = 0  # the least major compute capability of a CUDA device
    last_capability: int = 99  # the greatest
    package: str = ""
    install: str = ""  # the command that installs the package
    opt_in: str = ""  # why it is taken only where it is asked for or was measured to be fast
    partial: bool = False  # takes some kinds of call only: asked for, it is the first choice, not the only one
    # gets the op's arguments, or the part's Case: a reason for what the fields cannot say, or None
    refuse: Callable[..., str | None] | None = None
    parts: tuple[str, ...] = ()  # backends of its parts: who asks for one of these asks for this one
    # of a part: empty tensors of the kind that forward saves; None: not known beforehand, so not in a traced graph
    saved: Callable[..., tuple[torch.Tensor, ...]] | None = None

    def refusal(self, call: Call, *about: Any) -> str | None:
        """Why it does not take this call, or None; ``about``: what ``refuse`` gets."""
        if self.package and not installed(self.package):
            return f"the package {self.package} is not installed ({self.install or f'pip install {self.package}'})"
        for dtype in call.dtypes:
            if dtype not in self.dtypes:
                return f"dtype {dtype} is not among {', '.join(str(dtype) for dtype in self.dtypes)}"
        assumed, kind = call.interpreted > 1, call.device.type
        if self.device_types and kind not in self.device_types and not assumed:
            if self.name != "triton":
                return f"device {kind} is not {' or '.join(self.device_types)}"
            if not call.interpreted:
                return f"device {kind} is not cuda (TRITON_INTERPRET=1 and backend triton run it slowly anywhere)"
        if self.capability and (assumed or kind == "cuda"):
            major = call.interpreted // 10 if assumed else torch.cuda.get_device_properties(call.device).major
            if major < self.capability:
                return f"compute capability {major}.x is below {self.capability}.0"
            if major > self.last_capability:
                return f"compute capability {major}.x is above {self.last_capability}.x, the last one with kernels"
        return self.refuse(*about) if self.refuse else None


# what Triton's kernels support: half and single precision, CUDA from compute capability 8.0
TRITON: dict[str, Any] = {"dtypes": ON_TRITON, "device_types": ("cuda",), "capability": 8, "package": "triton"}


def on_triton(op: str, **more: Any) -> Backend:
    """The backend of ``forward`` and ``backward`` in ``kernels/<op>/triton.py``, which the first call imports."""
    return Backend(
        "triton",
        lambda *args: getattr(triton, op).forward(*args),
        lambda *args: getattr(triton, op).backward(*args),
        **TRITON,
        **more,
    )


_found: dict[str, bool] = {}  # a look takes some 80 us if a package is missing, or not imported yet


def installed(package: str) -> bool:
    """Whether a package can be imported; it is not. Looked up once."""
    if package not in _found:
        try:
            _found[package] = importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:  # of a part of a package whose parent is missing
            _found[package] = False
    return _found[package]


# what torch.compiler.assume_constant_result does, which would import the compiler with this package
installed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def asked(
    backends: Sequence[Backend],
    forced: str,
    measured: tuple[str, ...],
    refusal: Callable[[Backend], str | None],
) -> Iterator[tuple[Backend, str | None]]:
    """The backends in the order in which they are asked, each with the reason why it is not taken, or None.

    Args:
        forced: the backend that is asked for. Where there is none of this name, the choice is automatic.
        measured: those that were measured for such a call, the fastest first.
    """
    candidates: Sequence[Backend] = backends
    if forced != "auto" and (named := [each for each in backends if forced in (each.name, *each.parts)]):
        if named[0].partial:
            named += [each for each in backends if each not in named]
        elif forced == "library":  # the products of the reference are the library's too
            named += [each for each in backends if each.name == "reference"]
        candidates = named
    elif measured:
        names = [*measured, *(each.name for each in backends)]
        candidates = sorted(backends, key=lambda each: names.index(each.name))
    for each in candidates:
        taken = each.name in (forced, *measured)
        yield each, refusal(each) or (None if taken else each.opt_in or None)
