"""Picks a backend for each op, and registers each op with torch.library.

A backend declares what it supports as data; one loop asks them in order of preference and keeps the reason of
every refusal. ``XCLIP_FAST_BACKEND`` (read once, at import) or ``with backend("triton"):`` overrides the choice.

Eager calls run the chosen backend directly, because a registered Python op costs tens of microseconds. While
torch.compile or torch.export traces, a backend of plain torch calls is traced through and a kernel is entered
through its registered op, ``torch.ops.xclip_fast.<name>``.
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("xclip_fast")

BACKENDS = ("reference", "triton", "cuda", "library", "sdpa", "flash_attn", "xformers", "apex")
OPS: dict[str, "Op"] = {}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """No backend takes these arguments; the message holds every backend's reason."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an op and what it supports.

    ``forward`` takes the op's arguments. ``opaque`` marks a kernel that torch.compile cannot trace.
    ``refuse`` gets the op's arguments and returns a reason for what the fields cannot say, or None.
    """

    name: str
    forward: Callable[..., Any]
    device_types: tuple[str, ...] = ()  # empty: any
    dtypes: tuple[torch.dtype, ...] = FLOATS
    opaque: bool = False
    refuse: Callable[..., str | None] | None = None

    def refusal(self, args: tuple[Any, ...]) -> str | None:
        """Why this backend does not take ``args``, or None if it does."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        for tensor in tensors:
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in self.dtypes:
                return f"dtype {tensor.dtype} is not among {', '.join(str(dtype) for dtype in self.dtypes)}"
        if self.device_types and tensors[0].device.type not in self.device_types:
            return f"device {tensors[0].device.type} is not {' or '.join(self.device_types)}"
        return self.refuse(*args) if self.refuse else None


def _checked(name: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"no backend is called {name!r}; choose one of auto, {', '.join(BACKENDS)}")
    return name


_forced = os.environ.get("XCLIP_FAST_BACKEND", "auto")  # checked at the first call


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for every op that has it, in this process, until the block ends.

    Args:
        name: ``"auto"`` or one of ``BACKENDS``. An op without that backend keeps the automatic choice.

    Raises:
        ValueError: if there is no such backend. An op that has the backend but cannot use it for its arguments
            raises ``BackendError`` with the reasons.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


class Op:
    """An op: its reference, its other backends in order of preference, and its torch.library registration.

    The reference is plain differentiable torch on any device and dtype. The registered op saves its inputs only
    and differentiates the reference again in backward.
    """

    def __init__(self, reference: Callable[..., Any], *backends: Backend) -> None:
        self.name = reference.__name__.removesuffix("_reference")
        self.reference = reference
        self.backends = (*backends, Backend("reference", reference))
        self.names = tuple(candidate.name for candidate in self.backends)
        OPS[self.name] = self
        self.registered = _register(self)

    def choose(self, args: tuple[Any, ...]) -> Backend:
        """The backend for these arguments; ``BackendError`` with every reason if there is none."""
        candidates = self.backends
        if _checked(_forced) in self.names:
            candidates = tuple(candidate for candidate in candidates if candidate.name == _forced)
        reasons = []
        for candidate in candidates:
            reason = candidate.refusal(args)
            if reason is None:
                return candidate
            reasons.append(f"{candidate.name}: {reason}")
        shapes = ", ".join(f"{tuple(arg.shape)} {arg.dtype}" for arg in args if isinstance(arg, Tensor))
        forced = f" (backend {_forced!r} was asked for)" if _forced in self.names else ""
        raise BackendError(f"no backend of {self.name} takes ({shapes}){forced}: {'; '.join(reasons)}")

    def __call__(self, *args: Any) -> Any:
        chosen = self.choose(args)
        if chosen.opaque and torch.compiler.is_compiling():
            return self.registered(*args)
        return chosen.forward(*args)


def _register(op: Op) -> Callable[..., Any]:
    """Define ``xclip_fast::<name>`` with its fake and autograd."""

    def contiguous(result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(contiguous(item) for item in result)
        return result.contiguous()

    def forward(*args: Any) -> Any:
        return contiguous(op.choose(args).forward(*args))

    def fake(*args: Any) -> Any:
        return contiguous(op.reference(*args))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(arg for arg in inputs if isinstance(arg, Tensor)))
        ctx.rest = [None if isinstance(arg, Tensor) else (arg,) for arg in inputs]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [
            next(saved).detach().requires_grad_(need) if other is None else other[0]
            for other, need in zip(ctx.rest, ctx.needs_input_grad, strict=True)
        ]
        with torch.enable_grad():
            outputs = op.reference(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        kept = [index for index, out in enumerate(outputs) if out.requires_grad]
        wanted = [arg for arg, need in zip(inputs, ctx.needs_input_grad, strict=True) if need]
        result = iter(
            torch.autograd.grad(
                [outputs[index] for index in kept], wanted, [grads[index] for index in kept], allow_unused=True
            )
        )
        return tuple(next(result) if need else None for need in ctx.needs_input_grad)

    schema = torch.library.infer_schema(op.reference, mutates_args=())
    registered = torch.library.custom_op(f"xclip_fast::{op.name}", forward, mutates_args=(), schema=schema)
    registered.register_fake(fake)
    registered.register_autograd(backward, setup_context=setup_context)
    return registered
