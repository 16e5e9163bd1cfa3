"""Picks a backend for each op, and registers each op with torch.library.

A backend declares what it supports as data; one loop asks them in order of preference and keeps the reason of
every refusal. On a GPU the order is that of the measured table (choices.py) where it has a row, else the op's own.
``XCLIP_FAST_BACKEND`` (read once, at import) or ``with backend("triton"):`` overrides the choice.

A backend is either plain torch calls, differentiated by autograd, or a kernel with a backward of its own. Eager
calls run the chosen backend directly, because a registered Python op costs tens of microseconds. While torch.compile
or torch.export traces, plain torch calls are traced through, and a kernel is entered through its registered op:
``torch.ops.xclip_fast.<name>``, or ``<name>_saving`` and ``<name>_backward`` where gradients are wanted.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import logging
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import choices
from .example import Maker, Sizes

logger = logging.getLogger("xclip_fast")

OPS: dict[str, "Op"] = {}
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """No backend takes these arguments; the message holds every backend's reason."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of an op and what it supports.

    Plain torch: ``forward(*args)`` returns what the reference returns. A kernel, which has ``backward``:
    ``forward(save, *args)`` returns the outputs as a tuple and, if ``save``, the tensors that ``backward`` wants
    beside the arguments; ``backward(grads, saved, needs, *args)`` returns a gradient for every argument that needs
    one, in order. A ``partial`` kernel has no backward. ``refuse`` gets the op's arguments and returns a reason for
    what the fields cannot say, or None. ``unasked`` is why it is taken only where it is asked for or was measured to be
    fast, if that is so.
    """

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Sequence[Tensor]] | None = None
    device_types: tuple[str, ...] = ()  # empty: any
    dtypes: tuple[torch.dtype, ...] = FLOATS
    capability: int = 0  # the least major compute capability of a CUDA device
    package: str = ""
    unasked: str = ""
    refuse: Callable[..., str | None] | None = None
    # takes some shapes only and computes no gradients: asked for, it is the first choice, not the only one
    partial: bool = False
    parts: tuple[str, ...] = ()  # backends of its parts: who asks for one of these asks for this one

    def refusal(self, args: tuple[Any, ...], trained: bool = False) -> str | None:
        """Why this backend does not take ``args``, or None if it does; ``trained``: gradients are wanted."""
        if self.partial and trained:
            return "it computes no gradients"
        if self.package and self.package not in _INSTALLED:
            return f"the package {self.package} is not installed (pip install {self.package})"
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        for tensor in tensors:
            if (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in self.dtypes:
                return f"dtype {tensor.dtype} is not among {', '.join(str(dtype) for dtype in self.dtypes)}"
        if self.device_types and tensors[0].device.type not in self.device_types:
            return f"device {tensors[0].device.type} is not {' or '.join(self.device_types)}"
        if self.capability and tensors[0].device.type == "cuda":
            major = torch.cuda.get_device_properties(tensors[0].device).major
            if major < self.capability:
                return f"compute capability {major}.x is below {self.capability}.0"
        return self.refuse(*args) if self.refuse else None


_INSTALLED = frozenset(name for name in ("triton",) if importlib.util.find_spec(name))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Whether Triton's kernels take tensors that are on no GPU, if they are asked for. A compute capability (90 for 9.0):
# every choice is that of such a GPU, wherever the tensors are (fake_gpu.py).
off_gpu = int(INTERPRETED)


def triton_backend(op: str, refuse: Callable[..., str | None] | None = None) -> Backend:
    """The backend of ``kernels/triton/<op>.py``, imported at its first call: half and single precision, CUDA from
    compute capability 8.0, or, if asked for, any device in Triton's interpreter."""

    def module() -> Any:
        return importlib.import_module(f"{__package__}.triton.{op}")

    def refuse_elsewhere(*args: Any) -> str | None:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if first.device.type != "cuda" and off_gpu <= 1 and not (off_gpu and _forced == "triton"):
            where = "TRITON_INTERPRET=1 and backend triton run it slowly anywhere"
            return f"device {first.device.type} is not cuda ({where})"
        return refuse(*args) if refuse else None

    return Backend(
        "triton",
        forward=lambda save, *args: module().forward(save, *args),
        backward=lambda grads, saved, needs, *args: module().backward(grads, saved, needs, *args),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        capability=8,
        package="triton",
        refuse=refuse_elsewhere,
    )


def backends() -> tuple[str, ...]:
    """The names of all backends: those of the ops, those of the parts of a block, and onednn (cpu.py)."""
    return tuple(sorted({"onednn", *(name for op in OPS.values() for name in op.names)}))


def _checked(name: str) -> str:
    if name != "auto" and name not in backends():
        raise ValueError(f"no backend is called {name!r}; choose one of auto, {', '.join(backends())}")
    return name


_forced = os.environ.get("XCLIP_FAST_BACKEND") or "auto"  # checked at the first call


def forced_backend() -> str:
    """The backend that is asked for, or ``"auto"``."""
    return _forced


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force a backend for every op that has it, in this process, until the block ends.

    Args:
        name: ``"auto"`` or one of ``backends()``. An op without that backend keeps the automatic choice.

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

    The reference is plain differentiable torch on any device and dtype.

    Args:
        reference: its name, without ``_reference``, is the op's.
        backends: the others; the reference comes last.
        example: makes the op's arguments from ``example.Sizes`` and ``example.Maker``. Tests, benchmarks and ``info``
            call the op with them.
        saved: for kernels: the tensors (as empty ones) that ``forward(True, *args)`` saves.
        autocast: the arguments that kernels take in the dtype of an enclosing ``torch.autocast``. Plain torch calls
            obey autocast themselves.
        sizes: of the arguments, by name: what the speed of the backends depends on. None: not in the measured table.
        dtypes: floating dtypes that the reference takes.
        differentiable: False for an op for inference, which refuses arguments whose gradient is wanted.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        *backends: Backend,
        example: Callable[[Sizes, Maker], tuple[Any, ...]],
        saved: Callable[..., tuple[Tensor, ...]] | None = None,
        autocast: tuple[str, ...] = (),
        sizes: Callable[..., dict[str, int]] | None = None,
        dtypes: tuple[torch.dtype, ...] = FLOATS,
        differentiable: bool = True,
    ) -> None:
        self.name = reference.__name__.removesuffix("_reference")
        self.reference = reference
        self.example = example
        self.saved = saved
        self.sizes = sizes
        self.differentiable = differentiable
        self.backends = (*backends, Backend("reference", reference, dtypes=dtypes))
        self.names = tuple(name for candidate in self.backends for name in (candidate.name, *candidate.parts))
        returned = inspect.signature(reference, eval_str=True).return_annotation
        self.outputs = len(typing.get_args(returned)) or 1
        parameters = list(inspect.signature(reference).parameters)
        self.autocast = tuple(parameters.index(name) for name in autocast)
        OPS[self.name] = self
        self.registered, self.registered_saving = _register(self)

    def choose(self, args: tuple[Any, ...], trained: bool = False, kernels: bool = False) -> Backend:
        """The backend for these arguments; ``BackendError`` with every reason if there is none.

        Args:
            trained: gradients are wanted.
            kernels: only those with a backward of their own will do.
        """
        measured: tuple[str, ...] = ()
        candidates = self.backends
        if _checked(_forced) in self.names:
            candidates = tuple(each for each in candidates if _forced in (each.name, *each.parts))
            if candidates[0].partial:
                candidates += tuple(candidate for candidate in self.backends if candidate.name != _forced)
            elif _forced == "library":
                candidates += self.backends[-1:]  # the reference: its products are the library's too
        else:
            if _forced != "auto" and not torch.compiler.is_compiling():
                _log_once(f"{self.name} has no backend {_forced}; the choice is automatic")
            measured = self.measured(args, trained)
            if measured:
                candidates = tuple(sorted(candidates, key=lambda each: (*measured, each.name).index(each.name)))
        if kernels:
            candidates = tuple(candidate for candidate in candidates if candidate.backward is not None)
        reasons: list[str] = []
        for candidate in candidates:
            reason = self.refusal(candidate, args, measured, trained)
            if reason is None:
                if reasons and not torch.compiler.is_compiling():
                    _log_fallback(self.name, candidate.name, "; ".join(reasons), args)
                return candidate
            reasons.append(f"{candidate.name}: {reason}")
        shapes = ", ".join(f"{tuple(arg.shape)} {arg.dtype}" for arg in args if isinstance(arg, Tensor))
        forced = f" (backend {_forced!r} was asked for)" if _forced in self.names else ""
        raise BackendError(f"no backend of {self.name} takes ({shapes}){forced}: {'; '.join(reasons)}")

    def refusal(
        self, candidate: Backend, args: tuple[Any, ...], measured: tuple[str, ...] = (), trained: bool = False
    ) -> str | None:
        """Why ``candidate`` is not taken for these arguments, or None; ``measured``: what was measured for them."""
        if candidate.unasked and candidate.name not in (_forced, *measured):
            return candidate.refusal(args, trained) or candidate.unasked
        return candidate.refusal(args, trained)

    def measured(self, args: tuple[Any, ...], trained: bool = False) -> tuple[str, ...]:
        """The backends that were measured for such arguments on this GPU, the fastest first; none if nothing was.

        While torch.compile or torch.export traces, none: kernels that a graph enters by their registered ops choose
        when they run.
        """
        if self.sizes is None or torch.compiler.is_compiling() or not choices.known(self.name):
            return ()
        architecture = choices.architecture(args[0])
        if architecture is None:
            return ()
        dtype = args[self.autocast[0] if self.autocast else 0].dtype
        mixed = args[0].is_floating_point() and args[0].dtype != dtype
        if mixed or torch.is_autocast_enabled(args[0].device.type):
            return ()  # everything is measured in one dtype
        where = {"dtype": str(dtype).removeprefix("torch."), "training": trained, **self.sizes(*args)}
        return choices.order(self.name, architecture, where)

    def __call__(self, *args: Any) -> Any:
        trained = _wants_gradient(args)
        if trained and not self.differentiable:
            raise RuntimeError(
                f"{self.name} is for inference only, and a gradient is wanted: call it under torch.inference_mode() or "
                "torch.no_grad()"
            )
        chosen = self.choose(args, trained)
        if chosen.backward is None and not chosen.partial:
            return chosen.forward(*args)
        args = self._lowered(args)
        if torch.compiler.is_compiling():
            if not trained:
                return self.registered(*args)
            outputs = self.registered_saving(*args)
        elif trained:
            outputs = _Kernel.apply(chosen, *args)
        else:
            outputs = chosen.forward(False, *args)[0]
        outputs = tuple(outputs[: self.outputs])
        return outputs if len(outputs) > 1 else outputs[0]

    def _lowered(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments under the enclosing autocast."""
        device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        available = self.autocast and torch.amp.is_autocast_available(device_type)
        if not available or not torch.is_autocast_enabled(device_type):
            return args
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(
            arg.to(dtype) if index in self.autocast and arg is not None else arg for index, arg in enumerate(args)
        )


def _wants_gradient(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)


_logged: set[str] = set()


def _log_fallback(op: str, chosen: str, reasons: str, args: tuple[Any, ...]) -> None:
    """Say once why an op on a GPU does not run its first choice; on a CPU nothing else is expected."""
    if any(isinstance(arg, Tensor) and arg.is_cuda for arg in args):
        _log_once(f"{op} runs on the backend {chosen}; {reasons}")


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.warning(message)


class _Kernel(torch.autograd.Function):
    """A kernel in eager mode: saves its arguments and what its forward hands over."""

    @staticmethod
    def forward(ctx: Any, chosen: Backend, *args: Any) -> tuple[Tensor, ...]:
        outputs, saved = chosen.forward(True, *args)
        ctx.chosen = chosen
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[1:])  # row statistics: the first output alone has a gradient
        _save(ctx, args, saved)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[1:])
        args, saved = _restore(ctx)
        result = iter(ctx.chosen.backward(grads, saved, needs, *args))
        return (None, *(next(result) if need else None for need in needs))


def _save(ctx: Any, args: Sequence[Any], saved: Sequence[Tensor]) -> None:
    ctx.save_for_backward(*saved, *(arg for arg in args if isinstance(arg, Tensor)))
    ctx.rest = [None if isinstance(arg, Tensor) else (arg,) for arg in args]
    ctx.saved_count = len(saved)


def _restore(ctx: Any) -> tuple[list[Any], tuple[Tensor, ...]]:
    kept = ctx.saved_tensors  # read once: recomputed activations cannot be unpacked twice
    saved = kept[: ctx.saved_count]
    tensors = iter(kept[ctx.saved_count :])
    return [next(tensors) if other is None else other[0] for other in ctx.rest], saved


def _contiguous(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_contiguous(item) for item in result)
    return result.contiguous()


def _register(op: Op) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Define the op's torch.library ops with their fakes and autograd; return the plain and the saving one."""
    name = f"xclip_fast::{op.name}"
    schema = torch.library.infer_schema(op.reference, mutates_args=())
    arguments = schema[1 : schema.rindex(") -> ")]

    # <name>: differentiated through the reference, which runs again in backward

    def forward(*args: Any) -> Any:
        chosen = op.choose(args)
        if chosen.backward is None and not chosen.partial:
            return _contiguous(chosen.forward(*args))
        outputs = tuple(chosen.forward(False, *args)[0])
        return outputs if len(outputs) > 1 else outputs[0]

    def fake(*args: Any) -> Any:
        return _contiguous(op.reference(*args))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        args, _ = _restore(ctx)
        inputs = [
            arg.detach().requires_grad_(need) if isinstance(arg, Tensor) else arg
            for arg, need in zip(args, ctx.needs_input_grad, strict=True)
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

    registered = torch.library.custom_op(name, forward, mutates_args=(), schema=schema)
    registered.register_fake(fake)
    if op.differentiable:
        registered.register_autograd(backward, setup_context=lambda ctx, inputs, output: _save(ctx, inputs, ()))
    if op.saved is None:
        return registered, registered

    # <name>_saving and <name>_backward: a kernel and its own backward

    def fresh(tensors: Sequence[Tensor], args: Sequence[Any]) -> list[Tensor]:
        """Contiguous, and no storage of an argument nor one storage twice, as torch.library demands."""
        taken = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        result = []
        for tensor in tensors:
            tensor = tensor.contiguous()
            result.append(tensor.clone() if tensor.untyped_storage().data_ptr() in taken else tensor)
            taken.add(result[-1].untyped_storage().data_ptr())
        return result

    def forward_saving(*args: Any) -> list[Tensor]:
        outputs, saved = op.choose(args, trained=True, kernels=True).forward(True, *args)
        return fresh([*outputs, *saved], args)

    def fake_saving(*args: Any) -> list[Tensor]:
        outputs = fake(*args)
        return [*(outputs if isinstance(outputs, tuple) else (outputs,)), *op.saved(*args)]  # type: ignore[misc]

    def kernel_backward(grads: list[Tensor], saved: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        chosen = op.choose(args, trained=True, kernels=True)
        assert chosen.backward is not None
        return fresh(chosen.backward(grads, saved, needs, *args), [*args, *grads, *saved])

    def fake_backward(grads: list[Tensor], saved: list[Tensor], needs: list[bool], *args: Any) -> list[Tensor]:
        return [
            torch.empty_like(arg, memory_format=torch.contiguous_format)
            for arg, need in zip(args, needs, strict=True)
            if need
        ]

    def setup_saving(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        _save(ctx, inputs, output[len(output) - len(op.saved(*inputs)) :])  # type: ignore[misc]

    def backward_saving(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        args, saved = _restore(ctx)
        needs = list(ctx.needs_input_grad)
        given = [grad for grad in grads[: len(grads) - len(saved)] if grad is not None]
        result = iter(library_backward(given, list(saved), needs, *args))
        return tuple(next(result) if need else None for need in needs)

    library_saving = torch.library.custom_op(
        f"{name}_saving", forward_saving, mutates_args=(), schema=f"({arguments}) -> Tensor[]"
    )
    library_backward = torch.library.custom_op(
        f"{name}_backward",
        kernel_backward,
        mutates_args=(),
        schema=f"(Tensor[] grads, Tensor[] saved, bool[] needs, {arguments}) -> Tensor[]",
    )
    library_saving.register_fake(fake_saving)
    library_backward.register_fake(fake_backward)
    library_saving.register_autograd(backward_saving, setup_context=setup_saving)
    return registered, library_saving
